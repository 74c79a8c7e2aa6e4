"""Features of a whole split on all ranks, and the metrics over them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from c4c.config import override_data
from c4c.files import replace_text
from c4c.losses import world_size
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.metrics import ranks, report
from c4c.training.run_folder import is_run
from c4c.training.screen import EvalReport, metrics_table
from c4c.zero import checkpoint
from c4c.zero.distributed import launched, start_distributed, stop_distributed
from c4c.zero.patches import quiet_libraries
from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.requests import texts_of
from pipelines.survey import notes
from pipelines.tokens import tokenize
from shards.split import Split

Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # frames, mask, tokens -> texts, videos
Tell = Callable[[str, int, int], None]  # "videos" or "captions", how many of them all ranks have encoded, of how many


@torch.no_grad()
def features(
    encode: Encode, split: Split, config: DataConfig, device: torch.device, tell: Tell = lambda *_: None
) -> tuple[Tensor, Tensor, Tensor]:
    """(texts [N, D], videos [M, ...], video of each text int64 [N]), complete and in the split's order on every rank.

    Ranks share the work; each video and each caption is encoded once.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    captions = [(v, text) for v in range(len(split)) for text in texts_of(split, v, config)]
    size, own = config.eval_batch_size, np.arange(rank, len(captions), world)
    raw, side = device.type == "cuda", config.image_size  # there the model normalises
    shape, dtype = ((side, side, 3), torch.uint8) if raw else ((3, side, side), torch.float32)
    none = torch.zeros(1, config.num_frames, *shape, dtype=dtype, device=device)
    no_mask = torch.zeros(1, config.num_frames, dtype=torch.bool, device=device)
    no_text = tokenize(["none"], config.max_words).to(device)

    reader = EvalLoader(split, config, rank=rank, world=world, device=device, raw=raw)
    videos: dict[int, Tensor] = {}
    texts: dict[int, Tensor] = {}
    try:
        for turn, (indices, frames, mask) in enumerate(reader, 1):
            # a rank without videos left still runs the model, for ZeRO-3's collectives
            _, encoded = encode(*((frames, mask) if len(indices) else (none, no_mask)), no_text)
            videos |= {int(i): f for i, f in zip(indices, encoded.float(), strict=False)}
            tell("videos", min(turn * world * size, len(split)), len(split))
    finally:
        reader.close()
    for i in range(-(-len(captions) // (world * size))):
        indices = own[i * size : (i + 1) * size]
        tokens = tokenize([captions[j][1] for j in indices], config.max_words).to(device) if len(indices) else no_text
        encoded, _ = encode(none, no_mask, tokens)
        texts |= {int(j): f for j, f in zip(indices, encoded.float(), strict=False)}
        tell("captions", min((i + 1) * world * size, len(captions)), len(captions))
    owner = torch.tensor([v for v, _ in captions], device=device)
    return _collect(texts, len(captions), device), _collect(videos, len(split), device), owner


def _collect(rows: dict[int, Tensor], total: int, device: torch.device) -> Tensor:
    """All ranks' rows, by index."""
    if world_size() > 1:
        parts: list = [None] * world_size()
        dist.all_gather_object(parts, {i: row.cpu() for i, row in rows.items()})
        rows = {i: row for part in parts for i, row in part.items()}
    return torch.stack([rows[i] for i in range(total)]).to(device)


@torch.no_grad()
def evaluate(
    model: CLIP4Clip,
    encode: Encode,
    split: Split,
    config: DataConfig,
    device: torch.device,
    tell: Tell = lambda *_: None,
) -> tuple[dict, Tensor]:
    """(t2v and v2t metrics of `split`, 0-based rank of each text's video [N]); the same on every rank."""
    texts, videos, owner = features(encode, split, config, device, tell)
    by_text, by_video = ranks(texts, videos, owner, model.head.score)
    return report(by_text, by_video), by_text


def evaluate_checkpoint(
    name: str,
    tag: str | None,
    split: Split,
    words: list[str],
    device: str | None = None,
    json_to: Path | None = None,
    ranks_to: Path | None = None,
) -> dict:
    """What `launch/eval.py` does, on every rank that a launcher started: print the metrics of a checkpoint on a split.

    name, tag: as `c4c.models.pretrained.open_checkpoint` takes them; words: `data.key=value`, over the checkpoint's own settings;
    json_to, ranks_to: files to write as well. Raises ValueError for what cannot be done.
    """
    quiet_libraries()
    rank, world, place = _start(device)
    try:
        if is_run(name):
            tag = checkpoint.resolve(Path(name), tag)
        model, data = open_checkpoint(name, tag)
        data = override_data(data, words)
        model.check_data(data, name)
        model.set_pixels(data)
        for note in notes(None, split, data) if rank == 0 else ():
            print(f"warning: {note}", file=sys.stderr)
        with EvalReport(on=rank == 0) as progress:
            model = model.to(place)
            result, by_text = evaluate(model, model, split, data, place, progress.tell)
        result |= {
            "checkpoint": str(Path(name) / checkpoint.FOLDER / tag) if tag else name,
            "split": str(split.path),
            "split_digest": split.digest,
        }
        if rank == 0:
            if json_to:
                replace_text({json_to: json.dumps(result, indent=2) + "\n"})
            if ranks_to:
                write_ranks(ranks_to, split, data, by_text)
            where = f"{world} x {place.type}" if world > 1 else str(place)
            _show(result, f"checkpoint  {result['checkpoint']}{_better(name, tag)}", f"split       {split.path}",
                  f"encoded     {progress.pace}, {where}")  # fmt: skip
        return result
    finally:
        if launched() > 1:  # whoever calls this in a process of its own keeps its group
            stop_distributed()


def _show(result: dict, *lines: str) -> None:
    """Print the metrics. Raises OSError."""
    console = Console()
    try:
        console.print(metrics_table(result))
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    except OSError as error:
        raise OSError(f"the metrics cannot be printed ({error.strerror}); --json FILE writes them") from error


def _start(device: str | None) -> tuple[int, int, torch.device]:
    """Rank, world and device."""
    if device and device.startswith("cuda"):
        index, gpus = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(f"--device {device}: this machine has {gpus} GPUs that torch can use")
    if launched() > 1:
        if device and ":" in device:
            raise ValueError(
                f"--device {device}: each of {launched()} ranks takes a GPU of its own; write --device cuda"
            )
        rank, world, own = start_distributed()
        return rank, world, torch.device("cpu") if device == "cpu" else own
    return 0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _better(name: str, tag: str | None) -> str:
    """A word on a run's best checkpoint, if it is another."""
    best = checkpoint.best(Path(name)) if tag else None
    return "" if best in (None, tag) else f"    (the best of the run's own validations is {best}: --tag best)"


def write_ranks(path: Path, split: Split, config: DataConfig, by_text: Tensor) -> None:
    """One JSON object a text: the text, its video's id and meta, and the video's rank, from 1."""
    ranks_of_texts = iter(by_text.tolist())
    lines = []
    for index in range(len(split)):
        video = split.video(index)
        meta = split.json(video).get("meta", {})
        for text in texts_of(split, index, config):
            row = {"rank": next(ranks_of_texts) + 1, "video": video.id, "text": text, "meta": meta}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace_text({path: "".join(lines)})

"""Features of a whole split on all ranks, and the metrics over them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from c4c.files import replace_text
from c4c.loss import world_size
from c4c.metrics import ranks, report
from c4c.model import CLIP4Clip
from pipelines.config import DataConfig
from pipelines.loader import texts_of
from pipelines.tokens import tokenize
from pipelines.videos import VideoReader
from shards.dataset import Split

Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # frames, mask, tokens -> texts, videos


@torch.no_grad()
def features(encode: Encode, split: Split, config: DataConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(texts [N, D], videos [M, ...], video of each text int64 [N]), complete and in the split's order on every rank.

    Ranks share the work; each video and each caption is encoded once.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    captions = [(v, text) for v in range(len(split)) for text in texts_of(split, v, config)]
    size, mine = config.eval_batch_size, np.arange(rank, len(captions), world)
    none = torch.zeros(1, config.num_frames, 3, config.image_size, config.image_size, device=device)
    no_mask = torch.zeros(1, config.num_frames, dtype=torch.bool, device=device)
    no_text = tokenize(["none"], config.max_words).to(device)

    reader, videos, texts = VideoReader(split, config, rank=rank, world=world, device=device), {}, {}
    try:
        for indices, frames, mask in reader:
            # a rank that has run out still runs the model, for the sake of ZeRO-3's collectives
            _, found = encode(*((frames, mask) if len(indices) else (none, no_mask)), no_text)
            videos |= {int(i): f for i, f in zip(indices, found.float(), strict=False)}
    finally:
        reader.close()
    for i in range(-(-len(captions) // (world * size))):
        indices = mine[i * size : (i + 1) * size]
        tokens = tokenize([captions[j][1] for j in indices], config.max_words).to(device) if len(indices) else no_text
        found, _ = encode(none, no_mask, tokens)
        texts |= {int(j): f for j, f in zip(indices, found.float(), strict=False)}
    owner = torch.tensor([v for v, _ in captions], device=device)
    return _collect(texts, len(captions), device), _collect(videos, len(split), device), owner


def _collect(mine: dict[int, Tensor], total: int, device: torch.device) -> Tensor:
    """All ranks' rows, by index."""
    if world_size() > 1:
        parts: list = [None] * world_size()
        dist.all_gather_object(parts, {i: row.cpu() for i, row in mine.items()})
        mine = {i: row for part in parts for i, row in part.items()}
    return torch.stack([mine[i] for i in range(total)]).to(device)


@torch.no_grad()
def evaluate(
    model: CLIP4Clip, encode: Encode, split: Split, config: DataConfig, device: torch.device
) -> tuple[dict, Tensor]:
    """(t2v and v2t metrics of `split`, 0-based rank of each text's video [N]); the same on every rank."""
    texts, videos, owner = features(encode, split, config, device)
    by_text, by_video = ranks(texts, videos, owner, model.head.score)
    return report(by_text, by_video), by_text


def write_ranks(path: Path, split: Split, config: DataConfig, by_text: Tensor) -> None:
    """One JSON object a text: the text, its video's key and meta, and the video's rank, from 1."""
    found = iter(by_text.tolist())
    lines = []
    for index in range(len(split)):
        video = split.video(index)
        meta = split.json(video).get("meta", {})
        for text in texts_of(split, index, config):
            row = {"rank": next(found) + 1, "video": video.key, "text": text, "meta": meta}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text({path: "".join(lines)})

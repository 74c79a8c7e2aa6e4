"""Features of a whole split, each video and each caption encoded once by whichever rank.

Towers run on blocks: block b of a split holds the same clips (or captions) whatever the ranks, the loader's batches and the
threads, so it has the same shape and gives the same bits (see c4c.retrieval.work).
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from c4c.retrieval.views import ONE_VIEW, Views
from c4c.retrieval.work import EvalWork
from pipelines.captions import texts_of
from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.tokens import Tokenizer
from shards.dataset import Dataset
from shards.schema import Video

Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # frames, mask, tokens -> texts, videos
# "videos", "clips" or "captions", how many of them all ranks have encoded, of how many; or "texts", how many are ranked
Tell = Callable[[str, int, int], None]

# frames and captions of a block: a thread is busy with few, a GPU with more
_ON_CPU, _ON_GPU = (48, 32), (192, 256)


def block_sizes(device: torch.device, num_frames: int) -> tuple[int, int]:
    """(clips, captions) that pass through the towers at once."""
    frames, captions = _ON_CPU if device.type == "cpu" else _ON_GPU
    return max(1, frames // num_frames), captions


def captions_of(split: Dataset, config: DataConfig) -> tuple[list[str], list[int]]:
    """All texts of a split, and the video of each."""
    captions = [(v, text) for v in range(len(split)) for text in texts_of(split, v, config)]
    return [text for _, text in captions], [v for v, _ in captions]


def encode_videos(
    encode: Encode,
    split: Dataset,
    config: DataConfig,
    work: EvalWork,
    tell: Tell = lambda *_: None,
    *,
    tokenizer: Tokenizer,
    views: Views = ONE_VIEW,
    bad: Callable[[Video, Exception], None] | None = None,
) -> tuple[list[Tensor], float]:
    """Features of videos, [M, ...] for each view of them, in the dataset's order on every rank, and how many seconds this rank waited for
    the loader. config: filled. tokenizer: the model's. bad: is called with each of this rank's videos that cannot be
    decoded and the reason, and its features mean nothing. Without it, raises ShardError for such a video."""
    device, size = work.device, block_sizes(work.device, config.num_frames)[0]
    no_text = tokenizer(["none"], config.max_words).to(device)
    sizes = _blocks(len(split), size, work)
    raw, side = device.type == "cuda", config.image_size  # there the model normalises
    shape, dtype = ((side, side, 3), torch.uint8) if raw else ((3, side, side), torch.float32)
    none = torch.zeros(1, 1, *shape, dtype=dtype, device=device), torch.zeros(1, 1, dtype=torch.bool, device=device)

    def encoded(clips: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if clips is None and not work.lockstep:
            return None
        return encode(*(clips or none), no_text)[1].float()

    made: list[Tensor] = []
    waited, total = 0.0, len(views) * len(split)
    for clip, crop in views.each():
        rows: dict[int, Tensor] = {}
        reader = EvalLoader(
            split, replace(config, crop=crop) if crop else config, rank=work.rank, world=work.world, device=device,
            raw=raw, block=size, clip=(clip, views.clips), bad=bad,
        )  # fmt: skip
        try:
            clips = _Clips(reader)
            turns = work.map(encoded, (clips.block(n) if n else None for _, n in sizes))
            for turn, ((block, n), features) in enumerate(zip(sizes, turns, strict=True), 1):
                if n and features is not None:
                    rows[block] = features
                done = len(made) * len(split) + min(turn * work.world * size, len(split))
                tell("clips" if len(views) > 1 else "videos", done, total)
        finally:
            reader.close()
        made.append(torch.cat(work.gather(rows)))
        waited += clips.waited_s
    return made, waited


def encode_texts(
    captions: list[str],
    encode: Encode,
    config: DataConfig,
    work: EvalWork,
    tell: Tell = lambda *_: None,
    *,
    tokenizer: Tokenizer,
) -> Tensor:
    """Features of captions, [N, ...], the same on every rank."""
    device, side = work.device, config.image_size
    _, size = block_sizes(device, config.num_frames)
    sizes = _blocks(len(captions), size, work)
    none = torch.zeros(1, 1, 3, side, side, device=device), torch.zeros(1, 1, dtype=torch.bool, device=device)

    def tokens(block: int, n: int) -> Tensor | None:
        if not n and not work.lockstep:
            return None
        texts = captions[block * size : block * size + n] if n else ["none"]
        return tokenizer(texts, config.max_words).to(device)

    def encoded(words: Tensor | None) -> Tensor | None:
        return None if words is None else encode(*none, words)[0].float()

    rows: dict[int, Tensor] = {}
    turns = work.map(encoded, (tokens(*piece) for piece in sizes))
    for turn, ((block, n), features) in enumerate(zip(sizes, turns, strict=True), 1):
        if n and features is not None:
            rows[block] = features
        tell("captions", min(turn * work.world * size, len(captions)), len(captions))
    return torch.cat(work.gather(rows))


def _blocks(total: int, size: int, work: EvalWork) -> list[tuple[int, int]]:
    """(number, length) of this rank's blocks; each rank has as many, of which the last may be empty."""
    turns = -(-total // (size * work.world))
    own = range(work.rank, turns * work.world, work.world)
    return [(block, max(0, min(size, total - block * size))) for block in own]


class _Clips:
    """Blocks of clips, frames and mask, whatever the batches that the loader makes. waited_s: seconds it was waited for."""

    def __init__(self, reader: EvalLoader):
        self._batches, self.waited_s = iter(reader), 0.0
        self._frames, self._mask, self._place = torch.empty(0), torch.empty(0), 0

    def block(self, size: int) -> tuple[Tensor, Tensor]:
        """The next so many clips, in memory of their own."""
        parts: list[tuple[Tensor, Tensor]] = []
        while size:
            if self._place == len(self._frames):
                began = time.perf_counter()
                (_, self._frames, self._mask), self._place = next(self._batches), 0
                self.waited_s += time.perf_counter() - began
            taken = slice(self._place, self._place + min(size, len(self._frames) - self._place))
            parts.append((self._frames[taken], self._mask[taken]))
            size, self._place = size - len(parts[-1][0]), taken.stop
        return torch.cat([frames for frames, _ in parts]), torch.cat([mask for _, mask in parts])

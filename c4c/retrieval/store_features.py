"""What `python -m c4c.features` does: a checkpoint's features of whole splits, written for `train.teacher`."""

import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from c4c.models.clip4clip import CLIP4Clip, head_sizes
from c4c.models.pretrained import evaluation_settings
from c4c.retrieval.evaluate import OpenedCheckpoint, open_request
from c4c.retrieval.feature_file import FeatureHeader, SplitFeatures, write_features
from c4c.retrieval.features import Tell, block_sizes, captions_of, encode_texts, encode_videos
from c4c.retrieval.request import Request
from c4c.retrieval.work import EvalWork, aligned
from c4c.training.screen import EvalReport
from c4c.zero.distributed import join_ranks, launched, stop_distributed
from c4c.zero.patches import quiet_libraries
from pipelines.quarantine import verify_command
from pipelines.survey import notes
from shards import ShardError, count
from shards.concat import Concat
from shards.dataset import Dataset
from shards.schema import Video

_LEAST = 1000  # videos that data.max_bad_fraction is a part of
_BLOCKS = 64  # of captions, that are encoded by all ranks before they are written


def store_features(request: Request, path: Path, half: bool = False) -> None:
    """Write the features of request.splits, all of them, to `path`; on every rank that a launcher started. half: as float16.

    Raises ValueError for what cannot be done, ShardError for more videos that cannot be decoded than data.max_bad_fraction allows, and
    OSError.
    """
    quiet_libraries()
    rank, _, place = join_ranks(request.device)
    try:
        opened = open_request(request)
        split: Dataset = Concat(request.splits) if len(request.splits) > 1 else request.splits[0]
        texts, owners = captions_of(split, opened.data)
        counts = np.bincount(owners, minlength=len(split))
        if not counts.all():
            raise ValueError(
                f"{split.path}: the video {split.video(int(counts.argmin())).id!r} has no caption, so no training can use it: pack the split "
                "without it"
            )
        dtype = np.float16 if half else np.float32
        _require_room(path, opened, len(split), len(texts), np.dtype(dtype).itemsize)
        for note in notes(split, None, opened.data, opened.tokenizer) if rank == 0 else ():
            print(f"warning: {note}", file=sys.stderr)
        model, work = opened.model.to(place), EvalWork(place)
        with EvalReport(on=rank == 0) as progress, work, aligned(model), torch.no_grad():
            bad = Unreadable(split, opened.data.max_bad_fraction)
            (videos,), _ = encode_videos(
                model, split, opened.data, work, progress.tell, tokenizer=opened.tokenizer, bad=bad.add
            )
            unreadable = bad.of_all_ranks(work.world)
            parts = _encoded_in_parts(model, texts, opened, work, progress.tell)
            if rank == 0:
                write_features(path, _header(opened, split, counts.tolist(), texts, unreadable), videos, parts, dtype)
            else:
                for _ in parts:
                    pass
        if rank == 0:
            print(
                f"{path}: features of {count(len(split), 'video')} and {count(len(texts), 'caption')} by {opened.what}{opened.kind}, "
                f"{model.head.name}{_without(unreadable)}, {path.stat().st_size / 1e6:.1f} MB. Learn from it: train.teacher={path}"
            )
    finally:
        if launched() > 1:
            stop_distributed()


class Unreadable:
    """Videos of a split that cannot be decoded: each is told in a warning, and too many are an error, whichever ranks found them.

    Raises ShardError for more than `fraction` of the split's videos, or of 1000 if it has fewer, and if there is no other video.
    """

    def __init__(self, split: Dataset, fraction: float):
        self._split, self._fraction, self._rows = split, fraction, list[int]()

    def add(self, video: Video, reason: Exception) -> None:
        """One that this rank has found."""
        warnings.warn(f"{self._split.path}: {video.id} cannot be decoded and has no features: {reason}", stacklevel=2)
        self._rows.append(video.index)
        self._check(self._rows)

    def of_all_ranks(self, world: int) -> list[int]:
        """Their rows, in order; called on every rank."""
        parts = [self._rows] * world
        if launched() > 1:
            dist.all_gather_object(parts, self._rows)
        rows = sorted(set(chain.from_iterable(parts)))
        self._check(rows)
        return rows

    def _check(self, rows: list[int]) -> None:
        videos = len(self._split)
        too_many = len(rows) > self._fraction * max(videos, _LEAST)
        if too_many or len(rows) == videos:
            why = f", more than data.max_bad_fraction={self._fraction} allows" if too_many else ""
            raise ShardError(
                f"{len(rows)} of {count(videos, 'video')} of {self._split.path} cannot be decoded{why}. Run: "
                f"{verify_command(self._split.path)}"
            )


def _encoded_in_parts(
    model: CLIP4Clip, texts: list[str], opened: OpenedCheckpoint, work: EvalWork, tell: Tell
) -> Iterator[Tensor]:
    """As `encode_texts` gives all of them, [n, ...] at a time, to the last bit."""
    size = _BLOCKS * work.world * block_sizes(work.device, opened.data.num_frames)[1]
    for first in range(0, len(texts), size):
        told = lambda kind, done, _, first=first: tell(kind, first + done, len(texts))  # noqa: E731
        yield encode_texts(texts[first : first + size], model, opened.data, work, told, tokenizer=opened.tokenizer)


def _without(unreadable: list[int]) -> str:
    """For people."""
    return f", but for {count(len(unreadable), 'video')} that cannot be decoded" if unreadable else ""


def _header(
    opened: OpenedCheckpoint, split: Dataset, counts: list[int], texts: list[str], unreadable: list[int]
) -> FeatureHeader:
    model, data = opened.model, opened.data
    splits = [SplitFeatures(part.digest, len(part), data.paragraph) for part in split.parts]
    return FeatureHeader(
        ids=[split.video(i).id for i in range(len(split))],
        counts=counts,
        captions=[zlib.crc32(text.encode()) for text in texts],
        scale=model.scale().item(),
        head=model.head,
        sizes={"width": model.head.width, "blocks": model.blocks, "segments": model.segments, **head_sizes(model.spec)},
        about={
            "splits": [asdict(one) for one in splits],
            "data": evaluation_settings(data),
            "checkpoint": f"{opened.what}{opened.kind}",
            "versions": {name: version(name) for name in ("c4c", "torch", "open_clip_torch")},
            **({"unreadable": unreadable} if unreadable else {}),
        },
    )


def _require_room(path: Path, opened: OpenedCheckpoint, videos: int, texts: int, itemsize: int) -> None:
    """Raise ValueError if the disk has no room for the features, or about that."""
    head, data = opened.model.head, opened.data
    rows = videos * (data.num_frames if head.late else 1)
    rows += texts * (opened.tokenizer.length(data.max_words) if head.tokens else 1)
    size, free = itemsize * rows * head.width, shutil.disk_usage(path.absolute().parent).free
    if size > free:
        what = (
            f", of which the head {head.name} keeps every frame{' and word' if head.tokens else ''}"
            if head.late
            else ""
        )
        half = "" if itemsize == 2 else " --float16 halves them."
        raise ValueError(
            f"--out {path}: features of {count(videos, 'video')} and {count(texts, 'caption')}{what}, take {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free there.{half} A checkpoint as train.teacher needs no file"
        )

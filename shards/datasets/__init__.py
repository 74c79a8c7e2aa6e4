"""Readers: each turns the annotation files of one data set into a list of `Item`."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Caption:
    """A sentence about a video; `start` and `end` are seconds into the video where the source gives them."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Item:
    """One video to pack: its name in the data set, its file, what is said of it, and anything else worth keeping."""

    id: str
    path: Path
    captions: tuple[Caption, ...]
    meta: dict = field(default_factory=dict)

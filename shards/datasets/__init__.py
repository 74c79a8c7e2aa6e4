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
    """One video to pack: its name in the data set, its file (a `Path`, or a `UPath` for s3://, https:// and the like),
    what is said of it, anything else worth keeping, and the seconds [start, end) of the file that are meant, if not all
    of it. Times of captions count from the file's beginning."""

    id: str
    path: Path
    captions: tuple[Caption, ...]
    meta: dict = field(default_factory=dict)
    start: float | None = None
    end: float | None = None

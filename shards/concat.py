"""Several packed splits, read as one."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards import ShardError
from shards.dataset import Dataset
from shards.remote import Local
from shards.schema import Video
from shards.split import Split


class Concat:
    """Reads like a Split (see `Dataset`); the videos of each split are numbered on from those of the one before.

    Raises ShardError if one split is given twice: a batch could then hold one video twice.
    """

    def __init__(self, splits: Sequence[Split]):
        self.parts = list(splits)
        for i, split in enumerate(self.parts):
            for other in self.parts[:i]:
                if split.digest == other.digest:
                    raise ShardError(f"{other.path} and {split.path} hold the same videos: name the set once")
        self.shards = [name for split in self.parts for name in split.shards]
        profiles = [split.info["profile"] for split in self.parts]
        alike = len({profile["name"] for profile in profiles}) == 1
        profile = min(profiles, key=lambda p: p.get("short_side", 0)) if alike else {"name": "mixed"}
        self.info = {
            "name": " + ".join(split.info["name"] for split in self.parts),
            "split": self.parts[0].info["split"],
            "profile": profile,
            "videos": sum(split.info["videos"] for split in self.parts),
            "captions": sum(split.info["captions"] for split in self.parts),
        }
        self._starts = np.cumsum([0] + [len(split) for split in self.parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def path(self) -> str:
        """For messages: the folders, with a plus between them."""
        return " + ".join(str(split.path) for split in self.parts)

    @property
    def is_remote(self) -> bool:
        """Whether any of them is read over a network."""
        return any(split.is_remote for split in self.parts)

    @property
    def digest(self) -> str:
        """What tells these splits, in this order, from all others."""
        return hashlib.sha256("".join(split.digest for split in self.parts).encode()).hexdigest()

    def video(self, index: int) -> Video:
        """As `Split.video`."""
        split, first = self._find(index)
        return replace(split.video(index - first), index=index)

    def captions(self, index: int) -> list[dict]:
        """As `Split.captions`."""
        split, first = self._find(index)
        return split.captions(index - first)

    def read(self, video: Video, offset: int = 0, size: int = -1) -> bytes:
        """As `Split.read`."""
        return self._find(video.index)[0].read(video, offset, size)

    def fetch(self, video: Video, low: int, high: int) -> int:
        """As `Split.fetch`."""
        return self._find(video.index)[0].fetch(video, low, high)

    def fetch_again(self, video: Video) -> bool:
        """As `Split.fetch_again`."""
        return self._find(video.index)[0].fetch_again(video)

    def reopen(self, video: Video) -> None:
        """As `Split.reopen`."""
        self._find(video.index)[0].reopen(video)

    def json(self, video: Video) -> dict:
        """As `Split.json`."""
        return self._find(video.index)[0].json(video)

    def close(self) -> None:
        """Close the files of all splits."""
        for split in self.parts:
            split.close()

    def _find(self, index: int) -> tuple[Split, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"video {index} of {len(self)} in {self.path}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], int(self._starts[number])


def open_splits(paths: str | Path | Sequence[str | Path], local: Local | None = None) -> Dataset:
    """The split in one folder or at one URL, or those in several as one."""
    if isinstance(paths, (str, Path)):
        return Split(paths, local)
    return Concat([Split(path, local) for path in paths]) if len(paths) > 1 else Split(paths[0], local)

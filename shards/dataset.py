"""What can be read like one split, whether it is one or several."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from shards.schema import Video

if TYPE_CHECKING:
    from shards.split import Split


class Dataset(Protocol):
    """Videos with captions, numbered from 0: `shards.split.Split` and `shards.concat.Concat`."""

    @property
    def info(self) -> dict:
        """Name, split, profile, and numbers of videos and captions, as in `dataset.json`."""

    @property
    def shards(self) -> Sequence[str]:
        """Names of the shards, in order."""

    @property
    def parts(self) -> Sequence["Split"]:
        """The splits it is made of, in the order of their videos."""

    @property
    def path(self) -> object:
        """Where it is, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether any of it is read over a network."""

    @property
    def digest(self) -> str:
        """What tells it from every other set of videos and captions."""

    def __len__(self) -> int:
        """Number of videos."""

    def video(self, index: int) -> Video:
        """Row `index` of the sample table. Raises IndexError outside [0, len)."""

    def captions(self, index: int) -> list[dict]:
        """Captions of a video: dicts with `text`, and `start`, `end` in seconds or None."""

    def read(self, video: Video, offset: int = 0, size: int = -1) -> bytes:
        """Bytes of the stored file; `size` -1 reads to its end. Raises ShardError if the tar is shorter than that."""

    def fetch(self, video: Video, low: int, high: int) -> int:
        """Bring bytes [low, high) of the stored file to this machine; returns the bytes that this took."""

    def fetch_again(self, video: Video) -> bool:
        """Forget the local copy of a video whose bytes are wrong. False: there is no copy, the split itself is damaged."""

    def reopen(self, video: Video) -> None:
        """Let go of the video's tar, so that the next read opens it anew."""

    def json(self, video: Video) -> dict:
        """The sample's JSON member."""

    def close(self) -> None:
        """Close the files."""

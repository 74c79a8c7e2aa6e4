"""What both loaders are: a lane, and the thread that pulls at the end of its chain."""

import sys
from os import PathLike
from typing import Generic, TypeVar

from pipelines.chain import Prefetch, Stream
from pipelines.lanes import Lane

T = TypeVar("T")


def require_opened(split: object) -> None:
    """Raise TypeError for a path where an opened split is wanted."""
    if isinstance(split, str | PathLike):
        raise TypeError(f"{split} is a path: open it first, with shards.split.Split({str(split)!r})")


class LaneLoader(Generic[T]):
    """Starts and ends the thread. Use it as `with ... as loader:`, or call `close`."""

    def __init__(self, lane: Lane):
        self._lane, self._closed = lane, False
        self._prefetch: Prefetch[T] | None = None

    def _start(self, stream: Stream, ahead: int, name: str) -> Prefetch[T]:
        if self._closed:
            raise RuntimeError("this loader is closed: make another one")
        prefetch: Prefetch[T] = Prefetch(stream, ahead, name, self._lane.use_device)
        self._prefetch = prefetch
        if self._closed:  # by another thread, which did not see this one yet
            prefetch.close()
        return prefetch

    def close(self) -> None:
        """End the threads, and do not wait for reads that hang. Safe to call twice; a loader that is dropped does it itself."""
        self._closed = True
        if self._prefetch is not None:
            self._prefetch.stop()
        self._lane.interrupt()
        if self._prefetch is not None:
            self._prefetch.close()
        self._lane.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        prefetch: Prefetch | None = getattr(self, "_prefetch", None)
        if prefetch is not None and not sys.is_finalizing():
            prefetch.stop()  # the thread holds the chain, and the chain the lane, which closes itself

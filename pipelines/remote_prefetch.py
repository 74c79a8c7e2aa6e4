"""Bytes of remote splits on their way before the step wants them.

The order of samples is known, so what the next steps read can be fetched now, by threads that do nothing else: a server
takes long to answer, but answers many at once.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from pipelines.frame_sampling import distinct
from shards import ShardError
from shards.schema import Video

THREADS = 16


class Ahead:
    """Fetches for up to `steps` steps ahead, and at most `max_bytes` of what is not wanted yet.

    `wanted(place)` gives what has to be done for the step at that place, counted through all epochs: functions that return
    how many bytes they brought here. What fails is left for the step itself, which reports it.
    """

    def __init__(self, wanted: Callable[[int], list[Callable[[], int]]], steps: int, max_bytes: int):
        self._wanted, self._steps, self._max = wanted, steps, max_bytes
        self._state = threading.Condition()
        self._tasks: deque[tuple[int, Callable[[], int]]] = deque()
        self._at, self._next, self._closed = 0, 0, False
        self._held: dict[int, int] = {}  # bytes brought here for each step to come
        self._busy, self._largest = 0, 0  # what is being fetched will take as much as the largest so far, at most
        for i in range(THREADS):
            threading.Thread(target=self._work, name=f"c4c-fetch-{i}", daemon=True).start()

    def reach(self, place: int, last: int | None) -> None:
        """The batch at `place` is begun: fetch for it and those after it, up to `last`."""
        until = place + self._steps if last is None else min(place + self._steps, last)
        new = [(p, task) for p in range(max(self._next, place), until + 1) for task in self._wanted(p) or ()]
        with self._state:
            self._at, self._next = place, max(self._next, until + 1)
            while self._tasks and self._tasks[0][0] < place:  # too late: the step fetches it itself
                self._tasks.popleft()
            self._held = {p: n for p, n in self._held.items() if p > place}
            self._tasks.extend(new)
            self._state.notify_all()

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._tasks.clear()
            self._state.notify_all()

    def _work(self) -> None:
        for place, task in iter(self._take, None):
            size = 0
            try:
                size = task() or 0
            except (OSError, ShardError):
                pass
            finally:
                with self._state:
                    self._busy, self._largest = self._busy - 1, max(self._largest, size)
                    if place > self._at:
                        self._held[place] = self._held.get(place, 0) + size
                    self._state.notify_all()
            del task

    def _take(self) -> tuple[int, Callable[[], int]] | None:
        with self._state:
            self._state.wait_for(lambda: self._closed or (self._tasks and self._has_room()))
            if self._closed:
                return None
            self._busy += 1
            return self._tasks.popleft()

    def _has_room(self) -> bool:
        expected = sum(self._held.values()) + self._busy * self._largest
        return self._tasks[0][0] <= self._at + 1 or expected < self._max


def weakly(method: Callable) -> Callable:
    """The bound method, without keeping its object alive; where that is gone a call gives None."""
    found = weakref.WeakMethod(method)

    def call(*args):
        bound = found()
        return None if bound is None else bound(*args)

    return call


def span(video: Video, positions: np.ndarray | None) -> tuple[int, int]:
    """Bytes [low, high) of the stored file that decoding these frames reads: all for None, or where frames are not sliced."""
    frames = video.frames
    if positions is None or not frames.sliceable:
        return 0, video.size
    wanted = distinct(positions)
    keys = np.flatnonzero(frames.key)
    start = keys[max(0, int(np.searchsorted(keys, wanted[0], side="right")) - 1)] if len(keys) else 0
    shown = slice(int(min(start, wanted[0])), int(wanted[-1]) + 1)
    ends = frames.offset[shown] + frames.size[shown]
    return int(frames.offset[shown].min()), int(ends.max())


def share_of(max_gb: float) -> int:
    """Bytes of a machine's folder that one of its ranks may fill ahead: half of it, and the other half stays for reading."""
    return int(max_gb * 1e9 / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

"""Bytes of remote splits on their way before the step wants them.

The order of samples is known, so what the next steps read can be fetched now, by threads that do nothing else: a server
takes long to answer, but answers many at once.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from pipelines.frame_sampling import distinct
from pipelines.requests import ClipRequest, Sample
from shards import ShardError
from shards.schema import Video

THREADS = 16


class RemotePrefetch:
    """Stage: samples as they come, while the bytes of those behind them are brought to this machine.

    For up to `steps` batches ahead of the sample that is handed on, and at most `max_bytes` of what is not wanted yet.
    `bring(request)` fetches, and returns how many bytes it brought. What fails is left for whoever reads the clip, and reports it.
    """

    def __init__(self, bring: Callable[[ClipRequest], int], steps: int, max_bytes: int):
        self._bring, self._steps, self._max = bring, steps, max_bytes
        self._samples: Iterator[Sample] = iter(())
        self._ahead: deque[Sample] = deque()  # within reach, and not handed on yet
        self._coming: Sample | None = None  # the first beyond reach
        self._ended: BaseException | None = None  # what the stream ended with
        self._started = False
        self._state = threading.Condition()
        self._tasks: deque[Sample] = deque()
        self._at, self._closed = 0, False  # the place of the batch that is handed on
        self._held: dict[int, int] = {}  # bytes brought here for each batch to come
        self._busy, self._largest = 0, 0  # what is being fetched will take as much as the largest so far, at most

    def __call__(self, samples: Iterator[Sample]) -> "RemotePrefetch":
        """The stage itself: the samples in their order."""
        self._samples = samples
        return self

    def __iter__(self) -> "RemotePrefetch":
        return self

    def __next__(self) -> Sample:
        if not self._started:
            self._start()
        first = self._ahead[0] if self._ahead else self._coming
        if first is None:
            assert self._ended is not None
            raise self._ended
        place, new = first.batch.place, []
        while self._coming is not None and self._coming.batch.place <= place + self._steps:
            new.append(self._coming)
            self._coming = self._pull()
        self._ahead += new
        self._reach(place, [sample for sample in new if not sample.empty])
        return self._ahead.popleft()

    def close(self) -> None:
        """Fetch nothing more."""
        with self._state:
            self._closed = True
            self._tasks.clear()
            self._state.notify_all()

    def _start(self) -> None:
        self._started, self._coming = True, self._pull()
        for i in range(THREADS):
            threading.Thread(target=self._work, name=f"c4c-fetch-{i}", daemon=True).start()

    def _pull(self) -> Sample | None:
        """The next sample of the stream; None once it has ended. What it raises is raised behind the samples before."""
        try:
            return next(self._samples)
        except BaseException as error:  # StopIteration too
            self._ended, self._samples = error, iter(())
            return None

    def _reach(self, place: int, new: list[Sample]) -> None:
        """The batch at `place` is handed on; `new` samples have come into reach."""
        if not new and place == self._at:
            return
        with self._state:
            self._at = place
            while self._tasks and self._tasks[0].batch.place < place:  # too late: whoever reads it fetches it
                self._tasks.popleft()
            self._held = {p: n for p, n in self._held.items() if p > place}
            self._tasks.extend(new)
            self._state.notify_all()

    def _work(self) -> None:
        for sample in iter(self._take, None):
            size, place = 0, sample.batch.place
            try:
                size = self._bring(sample.request)
            except (OSError, ShardError):
                pass
            finally:
                with self._state:
                    self._busy, self._largest = self._busy - 1, max(self._largest, size)
                    if place > self._at:
                        self._held[place] = self._held.get(place, 0) + size
                    self._state.notify_all()
            del sample

    def _take(self) -> Sample | None:
        with self._state:
            self._state.wait_for(lambda: self._closed or (self._tasks and self._has_room()))
            if self._closed:
                return None
            self._busy += 1
            return self._tasks.popleft()

    def _has_room(self) -> bool:
        expected = sum(self._held.values()) + self._busy * self._largest
        return self._tasks[0].batch.place <= self._at + 1 or expected < self._max


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

"""Many videos read at once by a few threads, for one reader who takes what comes."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

from shards import ShardError, VideoError
from shards.disk_cache import Full
from shards.open_files import NoMoreFiles, limit_reached
from shards.remote import Unreachable

J = TypeVar("J")
E = TypeVar("E")
_AHEAD = 3  # events a thread may be ahead of who takes them


@dataclass(frozen=True)
class Finished:
    """The last event of a video. error: why it cannot be used; '' if it can. seconds: that reading and decoding took."""

    error: str = ""
    seconds: float = 0.0


class ReadAtOnce(Generic[J, E]):
    """`read(job)` of every job in `threads` threads: iterate over (job, event), each job's events in order and `Finished` last.

    Jobs are begun in order. A job whose reading fails does not stop the others: VideoError, ShardError and OSError become the text of
    its `Finished`; so does MemoryError, which a huge picture may cause. What is no fault of the video is raised. Memory is bounded: threads wait for who takes events.
    """

    def __init__(self, jobs: Iterable[J], read: Callable[[J], Iterator[E]], threads: int):
        self._jobs, self._read, self._count = iter(jobs), read, threads
        self._events: queue.Queue[tuple[J, E | Finished] | BaseException | None] = queue.Queue(_AHEAD * threads)
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __iter__(self) -> Generator[tuple[J, E | Finished], None, None]:
        threads = [threading.Thread(target=self._work, name=f"c4c-video-{i}", daemon=True) for i in range(self._count)]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                event = self._events.get()
                if event is None:
                    left -= 1
                elif isinstance(event, BaseException):
                    raise event
                else:
                    yield event
        finally:
            self._stopped.set()

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    job = next(self._jobs, None)
                if job is None:
                    break
                self._one(job)
            self._put(None)
        except BaseException as error:  # a defect: whoever takes the events raises it
            self._put(error)

    def _one(self, job: J) -> None:
        problem, waited, began = "", 0.0, time.perf_counter()
        try:
            with closing(self._read(job)) as events:  # type: ignore[type-var]
                for event in events:
                    before = time.perf_counter()
                    if not self._put((job, event)):
                        return
                    waited += time.perf_counter() - before
        except (Unreachable, Full, NoMoreFiles):  # no fault of the video: every other would fail as well
            raise
        except (VideoError, ShardError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and limit_reached(error):
                raise
            problem = str(error) or type(error).__name__
        self._put((job, Finished(problem, time.perf_counter() - began - waited)))

    def _put(self, event: tuple[J, E | Finished] | BaseException | None) -> bool:
        """Hand on an event, once there is room. False: nobody takes any more."""
        while not self._stopped.is_set():
            try:
                self._events.put(event, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

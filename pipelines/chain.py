"""The skeleton of the loader: stages over one stream, each pulling from the one before.

A stage is a function from a stream to a stream. Work in flight is where a stage keeps it: clips being fetched, graphs at
work, batches that wait for the step. How far the loader is ahead of the step follows from how much each stage may hold.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipelines.stats import Stats

T = TypeVar("T")


class Stream:
    """What a stage makes, with the seconds that it takes counted as `name` in `stats`: its own, without those of the
    stages before it."""

    def __init__(self, items: Iterator, before: "Stream | None", name: str, stats: Stats):
        self._items, self._before, self._name, self._stats = items, before, name, stats
        self.seconds = 0.0  # of this stage and those before it

    @property
    def at_hand(self) -> bool:
        """Whether the next item would come without waiting; False where a stage cannot tell."""
        return getattr(self._items, "at_hand", False)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        started, earlier = time.perf_counter(), self._before.seconds if self._before else 0.0
        try:
            return next(self._items)
        finally:
            spent = time.perf_counter() - started
            self.seconds += spent
            before = self._before.seconds - earlier if self._before else 0.0
            self._stats.spend(self._name, spent - before)

    def close(self) -> None:
        """Give up what is in flight, from the last stage to the first."""
        if (close := getattr(self._items, "close", None)) is not None:
            close()
        if self._before is not None:
            self._before.close()


Stage = tuple[str, Callable[[Stream], Iterator]]  # a name in Stats, and the stage


def chain(source: tuple[str, Iterator], stages: list[Stage], stats: Stats) -> Stream:
    """The stream of the last stage. Nothing is begun before it is asked for its first item."""
    name, items = source
    stream = Stream(items, None, name, stats)
    for name, stage in stages:
        stream = Stream(iter(stage(stream)), stream, name, stats)
    return stream


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Prefetch(Generic[T]):
    """The items of a stream, which a thread of its own makes up to `ahead` of whoever takes them; it calls `enter` first."""

    def __init__(self, stream: Stream, ahead: int, name: str, enter: Callable[[], None]):
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_make, args=(stream, self._queue, self._stop, enter), name=name, daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items stand ready."""
        return self._queue.qsize()

    def __iter__(self) -> Iterator[T]:
        while True:
            alive = self._thread.is_alive()  # asked first: what it put before it ended is in the queue
            try:
                item = self._queue.get(timeout=1)
            except queue.Empty:
                if not alive:
                    raise RuntimeError(
                        "the loader's thread ended without an error. Was the interpreter shutting down?"
                    ) from None
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def __del__(self):
        self._stop.set()

    def stop(self) -> None:
        """Have the thread end after what it does, without waiting for that."""
        self._stop.set()

    def close(self) -> None:
        """End the thread, and give up what is in flight. Whoever still iterates comes to an end. Safe to call twice."""
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room in the queue
            self._drop()
            self._thread.join(timeout=0.05)
        self._drop()
        self._queue.put(_End(None))

    def _drop(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass


def _make(stream: Stream, ready: queue.Queue, stop: threading.Event, enter: Callable[[], None]) -> None:
    """The thread of a Prefetch. It does not hold the Prefetch, so that one that is dropped ends it."""

    def put(item) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    end = _End(None)
    try:
        enter()
        while not stop.is_set():
            try:
                item = next(stream)
            except StopIteration:
                break
            put(item)
            del item
    except BaseException as error:  # handed to the step, which raises it
        end = _End(error)
    try:
        stream.close()
    finally:
        put(end)

"""Sentences of many requests go through the text tower together, and those that were asked before not at all."""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

from c4c.retrieval.serve.monitor import Monitor

LARGEST_BATCH = 64  # sentences
_COLLECT_S = 0.004  # for which the first sentence of a batch waits for others
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used last, `most` of them. Safe to use from several threads."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which counts as used; None if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value; the one that was not used for longest goes."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Keep none."""
        with self._lock:
            self._values.clear()


class TextBatcher:
    """Gives the features of sentences. `encode` takes up to 64 sentences and returns something for each of them."""

    def __init__(self, encode: Callable[[list[str]], Sequence[Any]], monitor: Monitor, kept: int = 512):
        self._encode, self._monitor = encode, monitor
        self._known: Recent[str, Any] = Recent(kept)
        self._waiting: deque[str] = deque()
        self._futures: dict[str, asyncio.Future] = {}  # of those that wait, and of those in a pass
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="c4c-text")  # a pass has all cores to itself
        self._task: asyncio.Task | None = None

    async def features(self, sentence: str) -> Any:
        """What `encode` makes of the sentence, alone or with others. Raises what `encode` raises."""
        known = self._known.get(sentence)
        self._monitor.add("c4c_text_cache_total", result="miss" if known is None else "hit")
        if known is not None:
            return known
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if (future := self._futures.get(sentence)) is None:
            future = self._futures[sentence] = asyncio.get_running_loop().create_future()
            future.add_done_callback(_look_at)
            self._waiting.append(sentence)
            self._arrived.set()
        return await asyncio.shield(future)  # one client that leaves takes nothing from the others

    async def close(self) -> None:
        """Stop; what waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for future in self._futures.values():
            future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self._waiting) < LARGEST_BATCH:
                await asyncio.sleep(_COLLECT_S)
            batch = [self._waiting.popleft() for _ in range(min(LARGEST_BATCH, len(self._waiting)))]
            if not self._waiting:
                self._arrived.clear()
            self._monitor.observe("c4c_text_batch_size", len(batch))
            try:
                made = await loop.run_in_executor(self._thread, self._encode, batch)
            except Exception as error:
                for sentence in batch:
                    self._futures.pop(sentence).set_exception(error)
                continue
            for sentence, features in zip(batch, made, strict=True):
                self._known.put(sentence, features)
                self._futures.pop(sentence).set_result(features)


def _look_at(future: asyncio.Future) -> None:
    """Whoever waited for it may be gone; asyncio complains of errors that nobody looks at."""
    if not future.cancelled():
        future.exception()

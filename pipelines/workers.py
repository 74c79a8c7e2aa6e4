"""A few threads that work off lists of items, none of which can hold up the rest for ever."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any


class Hung(Exception):
    """An item on which nothing moved for the time allowed."""


class Workers:
    """`count` threads. They are daemons: one that hangs in the kernel does not keep the process alive."""

    def __init__(self, count: int, name: str):
        self._name, self._tasks, self._made = name, queue.SimpleQueue(), 0
        self.count = count
        self._closed = False
        self._add(count)

    def start(self, function: Callable[[Any], Any], items: Sequence) -> "Job":
        """Begin `function(item)` for every item; `Job.results` hands over what came of them."""
        job = Job(self, function, items)
        for i in range(len(items)):
            self._tasks.put((job, i))
        return job

    def map(self, function: Callable[[Any], Any], items: Sequence) -> list:
        """What `function` gives for each item; raises what it raises."""
        results = self.start(function, items).results()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        """End the threads as soon as each is done with what it does. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for _ in range(self._made):
                self._tasks.put(None)

    def _add(self, count: int) -> None:
        for _ in range(count):
            threading.Thread(target=self._work, name=f"{self._name}-{self._made}", daemon=True).start()
            self._made += 1

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            job, i = task
            if self._closed:
                job.finish(i, RuntimeError("the loader was closed"))
            elif not job.run(i):
                return  # it had been given up, and another thread does the work
            del task, job  # idle threads must not keep a batch alive


class Job:
    """A list of items being worked off."""

    def __init__(self, workers: Workers, function: Callable[[Any], Any], items: Sequence):
        self._workers, self._function, self._items = workers, function, items
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._given_up: set[int] = set()

    def run(self, i: int) -> bool:
        """Work on item i. False if nobody waits for it any more."""
        with self._lock:
            self._running.add(i)
        try:
            result = self._function(self._items[i])
        except BaseException as error:
            result = error
        return self.finish(i, result)

    def finish(self, i: int, result: Any) -> bool:
        with self._lock:
            self._running.discard(i)
            if i in self._given_up:
                return False
        self._done.put((i, result))
        return True

    def results(self, timeout: float | None = None) -> list:
        """One result an item, in order; what it raised where it raised, and Hung where no item of the job got done for
        `timeout` seconds while it ran. Its thread is then replaced."""
        out: list = [None] * len(self._items)
        left = len(self._items)
        while left:
            try:
                i, result = self._done.get(timeout=timeout)
            except queue.Empty:
                for i in self._give_up():
                    out[i] = Hung(f"no answer for {timeout:g} s")
                    left -= 1
                continue
            out[i] = result
            left -= 1
        return out

    def _give_up(self) -> set[int]:
        with self._lock:
            hung, self._running = self._running, set()
            self._given_up |= hung
        self._workers._add(len(hung))
        return hung

"""A few threads that work off lists of items, none of which can hold up the rest for ever."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


class Hung(Exception):
    """An item that took longer than the time allowed."""


class Workers:
    """`count` threads. They are daemons: one that hangs in the kernel does not keep the process alive."""

    def __init__(self, count: int, name: str):
        self._name, self._count, self._made, self._closed = name, count, 0, False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy: dict[tuple[Job, int], float] = {}  # what is worked on, and since when
        self._add(count)

    def start(self, function: Callable[[Any], Any], items: Sequence) -> "Job":
        """Begin `function(item)` for every item; `Job.results` hands over what came of them."""
        job = Job(self, function, items)
        for i in range(len(items)):
            self._tasks.put((job, i))
        return job

    def map(self, function: Callable[[Any], Any], items: Sequence) -> list:
        """What `function` gives for each item; raises what it raises."""
        return self.share(function, items).finish()

    def share(self, function: Callable[[Any], Any], items: Sequence) -> "Work":
        """Begin `function(item)` for every item, and leave to the thread that calls `finish` what is not begun by then."""
        work = Work(function, items)
        for _ in range(min(self._count, len(items))):
            self.start(Work.help, [work])
        return work

    def give_up(self, seconds: float) -> None:
        """Report every item that has been worked on for so long, of whatever job, as Hung, and replace its thread."""
        now = time.monotonic()
        with self._lock:
            hung = [task for task, since in self._busy.items() if now - since >= seconds]
            for job, i in hung:
                del self._busy[job, i]
                job.done.put((i, Hung(f"no answer for {seconds:g} s")))
        self._add(len(hung))

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
            with self._lock:
                self._busy[task] = time.monotonic()
            job, i = task
            try:
                result = RuntimeError("the loader was closed") if self._closed else job.function(job.items[i])
            except BaseException as error:
                result = error
            with self._lock:
                if self._busy.pop(task, None) is None:
                    return  # it was given up, and another thread does this one's work
            job.done.put((i, result))
            del task, job, result  # an idle thread must not keep a batch alive


class Work:
    """Items that several threads take from. Who needs them done takes part: on a busy machine it is through with most
    before another thread wakes up."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence):
        self._function, self._results = function, [None] * len(items)
        self._left = deque(enumerate(items))
        self._done: queue.SimpleQueue = queue.SimpleQueue()

    def help(self) -> None:
        while self._left:
            try:
                i, item = self._left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                self._results[i] = self._function(item)
            except BaseException as error:
                self._results[i] = error
            self._done.put(i)

    def finish(self) -> list:
        """One result an item; raises what `function` raised."""
        self.help()
        for _ in self._results:
            self._done.get()
        for result in self._results:
            if isinstance(result, BaseException):
                raise result
        return self._results


class Job:
    """A list of items being worked off."""

    def __init__(self, workers: Workers, function: Callable[[Any], Any], items: Sequence):
        self._workers, self.function, self.items = workers, function, items
        self.done: queue.SimpleQueue = queue.SimpleQueue()

    @property
    def ready(self) -> bool:
        """Whether `results` would not have to wait."""
        return self.done.qsize() == len(self.items)

    def results(self, timeout: float | None = None) -> list:
        """One result an item, in order; what it raised where it raised, and Hung where it took `timeout` seconds."""
        out: list = [None] * len(self.items)
        left = len(self.items)
        while left:
            try:
                i, out_i = self.done.get(timeout=timeout and timeout / 2)
            except queue.Empty:  # the threads may be held by items of other jobs, too
                self._workers.give_up(timeout)
            else:
                out[i] = out_i
                left -= 1
        return out

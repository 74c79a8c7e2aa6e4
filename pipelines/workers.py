"""A few threads that work through items, none of which can hold up the rest for ever."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Hung(Exception):
    """An item that took longer than the time allowed."""


_CLOSED = "the loader was closed"
Done = Callable[[int, Any], None]  # is told an item's number, and what came of it: a result, or what was raised


class _Task:
    __slots__ = ("done", "function", "item", "number")

    def __init__(self, function: Callable[[Any], Any], item: Any, number: int, done: Done):
        self.function, self.item, self.number, self.done = function, item, number, done


class Workers:
    """`count` threads. They are daemons: one that hangs in the kernel does not keep the process alive."""

    def __init__(self, count: int, name: str):
        self._name, self._count, self._made, self._closed = name, count, 0, False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy: dict[_Task, float] = {}  # what is worked on, and since when
        self._add(count)

    def submit(self, function: Callable[[Any], Any], item: Any, number: int, done: Done) -> None:
        """Have `function(item)` called by a thread, which calls `done` with what came of it. Raises RuntimeError once closed."""
        with self._lock:  # behind what ends the threads, nobody would take it
            if self._closed:
                raise RuntimeError(_CLOSED)
            self._tasks.put(_Task(function, item, number, done))

    def share(self, function: Callable[[Any], Any], items: Sequence) -> "SharedWork":
        """Begin `function(item)` for every item, and leave to the thread that calls `finish` what is not begun by then."""
        work = SharedWork(function, items)
        for number in range(min(self._count, len(items))):
            self.submit(SharedWork.help, work, number, _unheard)
        return work

    def map(self, function: Callable[[Any], Any], items: Sequence) -> list:
        """What `function` gives for each item; raises what it raises."""
        return self.share(function, items).finish()

    def give_up(self, seconds: float) -> None:
        """Report every item that has been worked on for so long as Hung, and replace its thread."""
        now = time.monotonic()
        with self._lock:
            hung = [task for task, since in self._busy.items() if now - since >= seconds]
            for task in hung:
                del self._busy[task]
                task.done(task.number, Hung(f"no answer for {seconds:g} s"))
        self._add(len(hung))

    def close(self) -> None:
        """End the threads as soon as each is done with what it does. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in range(self._made):
                    self._tasks.put(None)

    def abandon(self) -> None:
        """As `close`, and what is being worked on is reported as given up: nobody waits for a thread that hangs."""
        self.close()
        with self._lock:
            busy = list(self._busy)
            self._busy.clear()
        self._add(len(busy))  # in place of those, for what is still to come, which they report as given up, too
        for task in busy:
            self._tasks.put(None)
            task.done(task.number, RuntimeError(_CLOSED))

    def _add(self, count: int) -> None:
        for _ in range(count):
            threading.Thread(target=self._work, name=f"{self._name}-{self._made}", daemon=True).start()
            self._made += 1

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            with self._lock:
                self._busy[task] = time.monotonic()
            try:
                result = RuntimeError(_CLOSED) if self._closed else task.function(task.item)
            except BaseException as error:
                result = error
            with self._lock:
                if self._busy.pop(task, None) is None:
                    return  # it was given up, and another thread does this one's work
            task.done(task.number, result)
            del task, result  # an idle thread must not keep a batch alive


def _unheard(number: int, result: Any) -> None:
    """Of work that keeps its results itself."""


class InOrder:
    """`then(item, function(item))` for every item of a stream, in its order: the function is called by threads.

    At most `in_flight` items are begun and not handed on yet. `then` is given what the function returned or raised, and
    Hung where an item was worked on for `timeout` seconds. What the stream raises is raised behind the items before.
    """

    def __init__(
        self, workers: Workers, function: Callable[[Any], Any], items: Iterator, then: Callable[[Any, Any], Any],
        in_flight: int, timeout: float,
    ):  # fmt: skip
        self._workers, self._function, self._source, self._then = workers, function, items, then
        self._in_flight, self._timeout = in_flight, timeout
        self._items: deque = deque()  # begun, and not handed on
        self._first = 0  # number of the first of them
        self._results: dict[int, Any] = {}
        self._awaited = -1  # number of the item without which nothing can be handed on
        self._signal: queue.SimpleQueue = queue.SimpleQueue()  # gets something when that item is done
        self._ended: BaseException | None = None  # what the stream ended with

    @property
    def at_hand(self) -> bool:
        """Whether the next item would come without waiting, or nothing comes any more."""
        return self._first in self._results or (not self._items and self._ended is not None)

    def __iter__(self) -> "InOrder":
        return self

    def __next__(self) -> Any:
        self._begin()
        if not self._items:
            assert self._ended is not None
            raise self._ended
        # set before looking at the results; _done stores its result before looking at this: so no signal is lost
        self._awaited = self._first
        while self._first not in self._results:
            try:
                self._signal.get(timeout=self._timeout / 2)
            except queue.Empty:  # the threads may be held by items of others, too
                self._workers.give_up(self._timeout)
        self._awaited = -1
        result = self._results.pop(self._first)
        self._first += 1
        return self._then(self._items.popleft(), result)

    def close(self) -> None:
        """Begin nothing more."""
        self._ended = StopIteration()

    def _begin(self) -> None:
        # in bursts: a thread that is woken for each single item would find less to do than waking it costs
        if self._ended is not None or len(self._items) > self._in_flight // 2:
            return
        while len(self._items) < self._in_flight:
            try:
                item = next(self._source)
            except BaseException as error:  # StopIteration too
                self._ended = error
                return
            self._items.append(item)
            self._workers.submit(self._function, item, self._first + len(self._items) - 1, self._done)

    def _done(self, number: int, result: Any) -> None:
        # whoever takes the items is woken for the one it waits for, and not for all that are done meanwhile
        self._results[number] = result
        if number == self._awaited:
            self._signal.put(None)


class SharedWork:
    """Items that several threads take from. Who needs them done takes part: on a busy machine it is through with most
    before another thread wakes up."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence):
        self._function, self._results = function, list[Any]([None] * len(items))
        self._left = deque(enumerate(items))
        self._done: queue.SimpleQueue = queue.SimpleQueue()

    def help(self) -> None:
        """Take items until none is left."""
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

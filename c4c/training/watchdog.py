"""Ends a run in which a rank no longer responds."""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from c4c.errors import OTHERS_FIRST_S
from c4c.training.peers import Peers, own_connection, within


class Watchdog:
    """Ends a run in which a rank no longer responds, and names that rank.

    A thread of each rank publishes, in the store through which the ranks found each other, what its main thread is doing. A
    rank that makes no progress for `timeout_s` seconds compares all of them: the one furthest behind is the one that the
    others wait for. Time for which this process itself was stopped does not count; `peers` is told of it.
    """

    def __init__(
        self, rank: int, world: int, timeout_s: float, end: Callable[[int], None] = os._exit, peers: Peers | None = None
    ):
        self._peers = peers or Peers(rank, world, timeout_s)
        self._rank, self._world, self._timeout, self._end = rank, world, timeout_s, end
        self._turn, self._doing, self._since, self._beat = 0, "starting", time.monotonic(), 0
        self._main = threading.main_thread()
        self._stopped, self._pausing = threading.Event(), threading.Lock()
        self._back, self._computed, self._paused_turn = float("inf"), 0.0, 0
        self._interval = min(5.0, timeout_s / 8)
        self._thread = threading.Thread(target=self._watch, name="c4c-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world > 1:
            self._store = own_connection(max(2.0, 2 * self._interval))
            self._expect(self._interval)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread.is_alive():
            self._note_pause()  # the thread may not have come to it
            self._stopped.set()
            self._thread.join()

    def now(self, doing: str) -> None:
        """Called by the main thread of every rank in the same order."""
        if self._peers.paused_s and self._turn > self._paused_turn + 6:
            self._peers.paused_s = 0.0  # the others waited
        self._turn, self._doing, self._since = self._turn + 1, doing, time.monotonic()

    def _watch(self) -> None:
        lost, gone = "rank 0, which all ranks connect to, does not respond: ", None
        try:
            while not self._stopped.wait(self._interval):
                self._expect(2 * self._interval + 4)  # for the store, twice
                if gone and (gone := self._peers.explain()):
                    self._peers.say(gone)  # the main thread did not notice, as with NCCL
                    self._end(1)
                else:
                    gone = self._peers.explain()
                late = time.monotonic() - self._since > self._timeout
                try:
                    within(2 * self._interval, self._publish)
                    if late:
                        self._expect(8 * self._interval + 1)
                        self._report(within(8 * self._interval + 1, self._slowest))
                except TimeoutError:
                    if late:
                        self._report(f"{lost}its process is stopped, or its machine is down")
                self._expect(self._interval)
        except Exception:  # the store went with the rank that held it
            if not self._stopped.wait(2 * self._interval):  # at the end of a run that is how it should be
                self._report(f"{lost}it ended, or its machine is down")

    def _expect(self, seconds: float) -> None:
        """The watching thread will be back in so long at most."""
        self._note_pause()
        with self._pausing:
            self._back, self._computed = time.monotonic() + seconds, time.process_time()

    def _note_pause(self) -> None:
        """See whether this process was stopped (SIGSTOP, Ctrl-Z, a debugger): time went by in which it did not compute."""
        with self._pausing:
            late, computed = time.monotonic() - self._back, time.process_time() - self._computed
            if late > 2 * self._interval and computed < 0.1 * late:
                self._back = self._since = time.monotonic()
                self._paused_turn = self._turn
                self._peers.paused_s += late

    def _publish(self) -> None:
        self._beat += 1
        state = {
            "turn": self._turn,
            "doing": self._doing,
            "for_s": round(time.monotonic() - self._since),
            "beat": self._beat,
        }
        state |= {"host": socket.gethostname(), "pid": os.getpid()}
        self._store.set(f"c4c/{self._rank}", json.dumps(state))

    def _all(self) -> list[dict | None]:
        keys = [f"c4c/{rank}" for rank in range(self._world)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def _slowest(self) -> str:
        before = self._all()
        time.sleep(3 * self._interval)
        self._publish()
        after = self._all()
        known = {rank: state for rank, state in enumerate(after) if state is not None}
        silent = [
            r for r in range(self._world) if (a := before[r]) is None or r not in known or a["beat"] == known[r]["beat"]
        ]
        if silent:
            return "; ".join(
                f"rank {r} ({_place(after[r])}) does not respond: its process is stopped, or its machine is down"
                for r in silent
            )
        behind = min(state["turn"] for state in known.values())
        late = [r for r, state in known.items() if state["turn"] == behind]
        if len(late) == self._world:
            return f"all ranks are {known[0]['doing']} since {known[0]['for_s']} s"
        return "; ".join(
            f"rank {r} ({_place(known[r])}) is {known[r]['doing']} since {known[r]['for_s']} s" for r in late
        )

    def _report(self, reason: str) -> None:
        turn = self._turn
        if self._rank:
            time.sleep(OTHERS_FIRST_S)
            if self._turn != turn:
                return  # it goes on
        stack = ""
        if f"rank {self._rank} (" in reason or "all ranks" in reason:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main.ident or 0])[-4:])
        text = (
            f"error: no step for {self._timeout:.0f} s (engine.timeout_s): {reason}. The other ranks are waiting for it"
        )
        print(f"{text}\n{stack}", file=sys.stderr, flush=True)
        self._peers.leave()
        self._end(1)


def _place(state: dict | None) -> str:
    return f"pid {state['pid']} on {state['host']}" if state else "never connected"

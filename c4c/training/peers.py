"""The processes of all ranks: which one vanished, when an exchange with the others fails."""

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from c4c.errors import OTHERS_FIRST_S, lost_peer
from c4c.launched import command_again, leave

_STORE_S = 2.0  # what its answer is waited for


class Peers:
    """`with Peers(rank, world, timeout_s)`: made of the error that a lost rank causes a line that names it.

    timeout_s: engine.timeout_s, after which the others end if this process does not run.
    """

    def __init__(self, rank: int, world: int, timeout_s: float):
        self._rank, self._world, self._timeout = rank, world, timeout_s
        self._places: list[tuple[str, int]] = []  # host and pid of each rank
        self._once = threading.Lock()
        self.paused_s = 0.0  # how long this process itself was stopped, as c4c.training.watchdog.Watchdog measures it

    def __enter__(self) -> "Peers":
        if self._world > 1:
            places: list = [None] * self._world
            dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
            self._places = places
            self._store = own_connection(_STORE_S)
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if not self._places:
            return
        if isinstance(error, RuntimeError) and lost_peer(error) and (text := self.explain(failed=True)):
            self.say(text)
            leave(1)
        self.leave()

    def leave(self) -> None:
        """Tell the others that this process ends, and has said why if there is something wrong."""
        with suppress(Exception):  # the store may be gone
            within(_STORE_S, lambda: self._store.set(_ended(self._rank), "1"))

    def explain(self, failed: bool = False) -> str | None:
        """Why the ranks can no longer exchange anything, if this process can tell; failed: an exchange has just failed."""
        until = time.monotonic() + (1.0 if failed else 0.0)  # a connection ends before its process
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(0.05)
        if not gone and not failed:
            return None
        if self.paused_s > self._timeout / 2:
            why = (
                f"rank {self._rank}, this process, was itself stopped for {self.paused_s:.0f} s (engine.timeout_s is "
                f"{self._timeout:.0f}), and the other ranks have ended since"
            )
        elif gone:
            names = " and ".join(f"rank {rank} (pid {self._places[rank][1]})" for rank in gone)
            # rank 0 cannot leave word that it ended with an error: the store ends with it
            unless = "unless it gave a reason above, " if 0 in gone else ""
            why = f"{names} vanished: {unless}it was killed, usually because memory ran out (see dmesg)"
        else:
            return None
        return f"{why}. Continue with\n    {command_again('run.resume=auto')}"

    def say(self, text: str) -> None:
        """Print it as an error, once; the first rank that is left at once, the others only if the launcher lets them live."""
        if not self._once.acquire(blocking=False):
            return
        if self._rank != min(set(range(self._world)) - set(self._gone())):
            time.sleep(OTHERS_FIRST_S)
        print(f"error: {text}", file=sys.stderr, flush=True)

    def _gone(self) -> list[int]:
        """Ranks of this machine whose processes no longer run, but for those that ended with an error of their own."""
        host = socket.gethostname()
        ended = [rank for rank, (where, pid) in enumerate(self._places) if where == host and not _runs(pid)]
        if not ended or (0 in ended and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ):
            return ended  # the store went with rank 0
        try:
            return within(_STORE_S, lambda: [rank for rank in ended if not self._store.check([_ended(rank)])])
        except Exception:
            return ended


def _ended(rank: int) -> str:
    return f"c4c/ended/{rank}"


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def own_connection(timeout_s: float) -> dist.Store:
    """A connection of its own to the store that the ranks met at: it does not wait for the main thread's."""
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def within(seconds: float, call: Callable):
    """What `call` returns or raises. TimeoutError if it takes longer: the store of a stopped process blocks for ever."""
    came: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            came.put((call(), None))
        except Exception as error:
            came.put((None, error))

    threading.Thread(target=run, name="c4c-watchdog-store", daemon=True).start()
    try:
        result, error = came.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result

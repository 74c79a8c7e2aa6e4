"""What would otherwise lose a run, or hang it: signals, ranks that differ or fall silent, steps that are not finite."""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from c4c.errors import OTHERS_FIRST_S
from c4c.training.peers import Peers, own_connection, within
from c4c.training.terminal import Foreground
from pipelines.quarantine import append_line

BAD_STEPS = "bad_steps.jsonl"


class Stop:
    """`with Stop() as stop`: SIGTERM, SIGINT and SIGHUP only set `stop.signal`, so that the step can end and be saved.

    Launchers send both, and again, for one Ctrl-C; none of it ends the process. At a terminal the launcher gets a second
    Ctrl-C, and then ends the ranks. Elsewhere than in a main thread: nothing. first: whether this is rank 0.
    """

    def __init__(self, first: bool = False):
        self.signal: str | None = None
        self._before: dict = {}
        self._terminal = Foreground(first)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            heeded = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
                heeded.append(signal.SIGHUP)
            self._before = {s: signal.signal(s, self._note) for s in heeded}
            signal.set_wakeup_fd(-1)  # c4c.launched.Starting's
            self._terminal.__enter__()
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            self._terminal.__exit__()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal:
            self._terminal.pass_on(number)
        self.signal = self.signal or signal.Signals(number).name


def agree(mine: dict[str, object], world: int) -> None:
    """Raise ValueError, on every rank alike, if ranks differ in one of these values; it names ranks and values."""
    if world == 1:
        return
    all_ranks: list = [None] * world
    dist.all_gather_object(all_ranks, mine)
    found = []
    for key in sorted(set().union(*all_ranks)):
        for rank, values in enumerate(all_ranks[1:], 1):
            if values.get(key) != all_ranks[0].get(key):
                found.append(f"{key} is {all_ranks[0].get(key)} on rank 0 and {values.get(key)} on rank {rank}")
                break
    if found:
        raise ValueError(
            f"the ranks do not agree: {'; '.join(found)}. All must run the same code on the same data with the same settings"
        )


def on_first_rank(call: Callable, rank: int, world: int):
    """What `call` returns on rank 0, or raise the ValueError or OSError that it raises there, on every rank alike."""
    told: list = [None, None]
    if rank == 0:
        try:
            told[0] = call()
        except (ValueError, OSError) as error:
            told[1] = error
    if world > 1:
        dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return told[0]


class Patience:
    """Ends a run whose validations get no better: `lost` once `most` in a row (0: never) did not beat the best before.

    scores: text-to-video R@1 of the validations so far. Only rank 0's scores count.
    """

    def __init__(self, most: int, scores: list[float]):
        self.most, self._scores = most, list(scores)

    def note(self, score: float, world: int, device: torch.device) -> None:
        """After a validation, on every rank."""
        agreed = torch.tensor([score], dtype=torch.float64, device=device)
        if world > 1:
            dist.broadcast(agreed, 0)
        self._scores.append(agreed.item())

    @property
    def lost(self) -> bool:
        if not self.most or not self._scores:
            return False
        return len(self._scores) - 1 - self._scores.index(max(self._scores)) >= self.most


class BadSteps:
    """Counts steps that were left out because the loss or a gradient was not finite, and lists them in the run folder."""

    def __init__(self, folder: Path, most: int):
        self.total = 0
        self._folder, self._most, self._in_a_row = folder, most, 0

    def note(self, step: int, bad: bool, loss: float, keys: list[str], world: int, rank: int) -> str:
        """After step `step`, on every rank; keys: of this rank's videos. Returns what to tell, if anything.

        Raises ValueError, on every rank, once too many in a row were bad.
        """
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if not bad:
            return ""
        self.total += 1
        parts, listing = [keys], self._folder / BAD_STEPS
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, keys)
        if rank == 0:
            row = {"step": step, "loss": str(loss), "keys": [key for part in parts for key in part]}
            with suppress(OSError):  # a full disk: what is said below names the step all the same
                append_line(listing, row)
        said = f"step {step} was left out: its loss is {loss}, or a gradient is not finite"
        if self._in_a_row >= self._most:
            raise ValueError(
                f"{said}; that is the {self._in_a_row}th in a row (train.max_bad_steps). The videos of these steps are in "
                f"{listing}; --replay {step} runs one again. Usual reasons: train.lr too high, "
                "engine.precision=fp16 where bf16 would do"
            )
        return f"warning: {said}. Its videos are in {listing}"


class Watchdog:
    """Ends a run in which a rank no longer answers, and names it.

    Each rank's thread tells all others, by way of the store that the ranks met at, what its main thread is doing. A rank
    whose own work stands still for `timeout_s` seconds compares them: the one furthest behind is what all wait for.
    The time for which this process itself was stopped does not count. peers: see there; told of such times.
    """

    def __init__(
        self, rank: int, world: int, timeout_s: float, end: Callable[[int], None] = os._exit, peers: Peers | None = None
    ):
        self._peers = peers or Peers(rank, world, timeout_s)
        self._rank, self._world, self._timeout, self._end = rank, world, timeout_s, end
        self._turn, self._doing, self._since, self._beat = 0, "starting", time.monotonic(), 0
        self._main = threading.main_thread().ident
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
        lost, gone = "rank 0, at which the ranks meet, does not answer: ", None
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
                        self._report(f"{lost}its process is stopped, or its machine gone")
                self._expect(self._interval)
        except Exception:  # the store went with the rank that held it
            if not self._stopped.wait(2 * self._interval):  # at the end of a run that is how it should be
                self._report(f"{lost}it ended, or its machine is gone")

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
        silent = [r for r, (a, b) in enumerate(zip(before, after, strict=True)) if b is None or a["beat"] == b["beat"]]
        behind = min((s["turn"] for r, s in enumerate(after) if s and r not in silent), default=0)
        late = [r for r, s in enumerate(after) if s and s["turn"] == behind]
        words = [
            f"rank {r} ({_place(after[r])}) does not answer: its process is stopped, or its machine gone"
            for r in silent
        ]
        if not silent and len(late) < self._world:
            words = [f"rank {r} ({_place(after[r])}) is {after[r]['doing']} since {after[r]['for_s']} s" for r in late]
        return "; ".join(words) or f"all ranks are {after[0]['doing']} since {after[0]['for_s']} s"

    def _report(self, found: str) -> None:
        turn = self._turn
        if self._rank:
            time.sleep(OTHERS_FIRST_S)
            if self._turn != turn:
                return  # it goes on
        stack = ""
        if f"rank {self._rank} (" in found or "all ranks" in found:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main])[-4:])
        text = f"error: no step for {self._timeout:.0f} s (engine.timeout_s): {found}. The others wait for it in vain"
        print(f"{text}\n{stack}", file=sys.stderr, flush=True)
        self._peers.leave()
        self._end(1)


def _place(state: dict | None) -> str:
    return f"pid {state['pid']} on {state['host']}" if state else "never heard of"


def out_of_memory(error: BaseException, doing: str, remedies: str) -> str | None:
    """If that is what `error` is: what it was needed for, how much there is, and which keys to change."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    if torch.cuda.is_available():
        free, whole = (n / 2**30 for n in torch.cuda.mem_get_info())
        there = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} of {whole:.1f} GiB were in use, {free:.1f} free"
    else:
        there = f"the machine has {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return f"out of memory: {doing}; {there}. Set {remedies} ({text.strip().partition(chr(10))[0][:200]})"

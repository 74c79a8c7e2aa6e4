"""Signals while steps are taken: the step ends, is saved, and the run stops."""

import signal
import threading

from c4c.training.terminal import Foreground


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

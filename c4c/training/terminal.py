"""Ctrl-C at a terminal, where a launcher started the ranks."""

import os
import signal
from contextlib import suppress
from pathlib import Path

_TTY = 2  # standard error, where the bars are


class Foreground:
    """`with Foreground(on)`: Ctrl-C reaches this process alone, and not the launcher that started it.

    deepspeed dies of a Ctrl-C at once, with a traceback: the shell's prompt would come back while rank 0 still saves. So rank
    0 (`on`) takes the terminal for a process group of its own, and gives it back at the end and for Ctrl-Z. Only where the
    launcher leads the terminal's process group: a script or make must get its Ctrl-C. torchrun gives ranks sessions of
    their own, which have no terminal to take.
    """

    def __init__(self, on: bool):
        self._on, self._launchers = on, 0  # its process group, 0 while the terminal is not taken

    def __enter__(self) -> "Foreground":
        if self._on and self._take():
            self._before = signal.signal(signal.SIGTSTP, self._suspend)
        else:
            self._on = False
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            self._give_back()
            signal.signal(signal.SIGTSTP, self._before)

    def pass_on(self, number: int) -> None:
        """Send a signal to the launcher as well, if it did not get it."""
        if self._launchers:
            with suppress(OSError):
                os.killpg(self._launchers, number)

    def _take(self) -> bool:
        group = os.getpgrp()
        with suppress(OSError):
            if group == _launcher() and os.isatty(_TTY) and os.tcgetpgrp(_TTY) == group:
                os.setpgid(0, 0)
                self._launchers = group
                _show_to(os.getpgrp())
        return bool(self._launchers)

    def _give_back(self) -> None:
        group, self._launchers = self._launchers, 0
        if group:
            with suppress(OSError):  # the launcher is gone
                if os.tcgetpgrp(_TTY) == os.getpgrp():
                    _show_to(group)
                os.setpgid(0, group)

    def _suspend(self, number: int, _frame) -> None:
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.killpg(0, number)  # the launcher and all ranks; this one goes on below when they do
        signal.signal(number, self._suspend)
        self._take()


def _launcher() -> int:
    """The process id of the command that a person started: deepspeed starts ranks by way of a second process."""
    parent = Path(f"/proc/{os.getppid()}")
    if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
        return os.getppid()
    return int((parent / "stat").read_text().rpartition(")")[2].split()[1])


def _show_to(group: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # or it would stop a background process
    try:
        os.tcsetpgrp(_TTY, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

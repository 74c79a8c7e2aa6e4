"""Ctrl-C and Ctrl-Z at a real terminal, with a launcher that dies of a Ctrl-C as deepspeed's does."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest

from tests.launch.runs import ROOT

pytestmark = pytest.mark.slow

LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(rank)]) for rank in (0, 1)]
print("codes", [rank.wait() for rank in ranks], flush=True)
"""
RANK = """
import sys, time
from c4c.training.signals import Stop
first, told = sys.argv[1] == "0", False
with Stop(first) as stop:
    for tick in range(6000):
        time.sleep(0.01)
        if first and tick == 5:
            print("ready", flush=True)
        if first and stop.signal and not told:
            told = True
            print("heard", flush=True)
        if first and stop.signal and tick > {least}:
            break
        if first:
            open({ticks!r}, "a").write(".")
        elif tick > 300:
            break
print(f"stopped by {{stop.signal}}" * first, flush=True)
"""

SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
def in_front(group):
    os.tcsetpgrp(0, group)
def lead():
    os.setpgid(0, 0)
    in_front(os.getpid())
job = subprocess.Popen(sys.argv[1:], preexec_fn=lead)
print("job stopped:", os.WIFSTOPPED(os.waitpid(job.pid, os.WUNTRACED)[1]), flush=True)
in_front(os.getpgrp())
sys.stdin.readline()
in_front(job.pid)
os.killpg(job.pid, signal.SIGCONT)
print("job ended with", job.wait(), flush=True)
"""


def _at_a_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs these tests may have been started in the background


class Terminal:
    """A command in a session of its own, at a terminal that tests type into."""

    def __init__(self, *command: str):
        self.master, slave = pty.openpty()
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
            preexec_fn=_at_a_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def until(self, text: str, seconds: float = 120) -> None:
        """Read what is shown, up to `text` or, if that is empty, to the end."""
        end = time.monotonic() + seconds
        while not text or text not in self.shown:
            if time.monotonic() > end:
                raise TimeoutError(self.shown)
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode()
                except OSError:  # all have closed it
                    return

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*before: str, least: int = 0) -> Terminal:
        code = RANK.format(ticks=str(tmp_path / "ticks"), least=least)
        started.append(Terminal(*before, sys.executable, "-c", LAUNCHER, code))
        started[-1].until("ready")
        return started[-1]

    yield start
    for terminal in started:
        below = psutil.Process(terminal.process.pid).children(recursive=True) if terminal.process.poll() is None else []
        for process in [*below, terminal.process]:
            process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_ctrl_c_reaches_the_first_rank_and_not_the_launcher(start):
    terminal = start()
    terminal.type("\x03")
    terminal.until("")
    assert terminal.process.wait(120) == 0
    assert "Traceback" not in terminal.shown
    lines = [line for line in terminal.shown.replace("^C", "").splitlines() if line]
    assert lines == ["ready", "heard", "stopped by SIGINT", "codes [0, 0]"]


def test_a_second_ctrl_c_reaches_the_launcher_as_well(start):
    terminal = start(least=2000)  # the first rank takes its time
    terminal.type("\x03")
    terminal.until("heard")
    assert terminal.process.poll() is None
    terminal.type("\x03")
    assert terminal.process.wait(120) == -signal.SIGINT
    terminal.until("KeyboardInterrupt")


def test_a_script_around_the_launcher_gets_its_ctrl_c(start):
    terminal = start("/bin/sh", "-c", '"$@"; echo the next command', "sh")
    terminal.type("\x03")
    terminal.process.wait(120)
    terminal.until("stopped by SIGINT")
    assert "the next command" not in terminal.shown


def test_ctrl_z_stops_all_and_fg_goes_on(start, tmp_path):
    terminal = start(sys.executable, "-c", SHELL)
    terminal.type("\x1a")
    terminal.until("job stopped: True")
    ticks = (tmp_path / "ticks").stat().st_size
    time.sleep(0.2)
    assert (tmp_path / "ticks").stat().st_size == ticks
    terminal.type("fg\n")
    while (tmp_path / "ticks").stat().st_size < ticks + 5:
        time.sleep(0.02)
    terminal.type("\x03")
    terminal.until("")
    lines = [line for line in terminal.shown.replace("^C", "").splitlines() if line]
    assert lines[-3:] == ["stopped by SIGINT", "codes [0, 0]", "job ended with 0"]
    assert "Traceback" not in terminal.shown

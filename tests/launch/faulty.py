"""One command in a fork, and what goes wrong in it: a kill, a limit on the size of files, an error at the Nth call. See faults.py."""

import builtins
import contextlib
import errno
import io
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tests.launch.runs import ROOT

PATIENCE_S = 120


@dataclass
class Fault:
    """What goes wrong in one command; all of it that is set."""

    kill_after_s: float | None = None
    with_signal: int = signal.SIGKILL
    largest_file: int | None = None  # bytes
    fail_at: int | None = None  # the how manyth call of one of `calls` raises OSError(error)
    calls: tuple[str, ...] = ()
    error: int = errno.EIO
    damage: str = ""  # said only: it is done before the command

    def __str__(self) -> str:
        said = [self.damage] if self.damage else []
        if self.kill_after_s is not None:
            said.append(f"{signal.Signals(self.with_signal).name} after {self.kill_after_s:.2f} s")
        if self.largest_file is not None:
            said.append(f"no file above {self.largest_file} bytes")
        if self.fail_at is not None:
            said.append(f"{errno.errorcode[self.error]} at call {self.fail_at} of {'/'.join(self.calls)}")
        return ", ".join(said) or "none"


class FaultError(AssertionError):
    """Something is not as it would be without the fault."""


@dataclass
class Command:
    """A script or module of this project and its arguments, run in a fork."""

    name: str
    words: list[str]
    seconds: float = 0.0

    def run(self, fault: Fault) -> tuple[int, str]:
        """(exit code, minus the signal that ended it; what it said). Raises FaultError for a traceback or a hang."""
        began = time.monotonic()
        ours, theirs = os.pipe()  # no file: its size would be limited too
        pid = os.fork()
        if pid == 0:
            self._child(fault, theirs)
        os.close(theirs)
        heard: list[bytes] = []
        hearing = threading.Thread(target=lambda: heard.extend(iter(lambda: os.read(ours, 1 << 16), b"")))
        hearing.start()
        code = self._wait(pid, fault, began)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a killed command may have left
        hearing.join()
        os.close(ours)
        self.seconds = time.monotonic() - began
        said = b"".join(heard).decode(errors="replace")
        if code is None or "Traceback" in said:
            raise FaultError(f"{self.name} {'hangs' if code is None else 'ended in a traceback'}:\n{said[-3000:]}")
        return code, said

    def _child(self, fault: Fault, out: int) -> None:
        os.setsid()
        code = 1
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(ROOT)
            _inject(fault)
            sys.argv = [self.name, *self.words]
            if self.name.endswith(".py"):
                runpy.run_path(str(ROOT / self.name), run_name="__main__")
            else:
                runpy.run_module(self.name, run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def _wait(self, pid: int, fault: Fault, began: float) -> int | None:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - began
            if fault.kill_after_s is not None and passed > fault.kill_after_s:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, fault.with_signal)
                fault = Fault()
            if passed > PATIENCE_S:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
            time.sleep(0.003)


def _inject(fault: Fault) -> None:
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, resource.RLIM_INFINITY))
    if fault.fail_at is None:
        return
    count = 0

    def failing(real: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fault.fail_at:
                path = args[0] if args and isinstance(args[0], (str, os.PathLike)) else None  # as the system names it
                raise OSError(fault.error, os.strerror(fault.error), *([os.fspath(path)] if path else []))
            return real(*args, **kwargs)

        return call

    for name in fault.calls:
        if name == "open":
            builtins.open = io.open = failing(io.open)
        else:
            setattr(os, name, failing(getattr(os, name)))

"""Running a command with a time limit: how it ended, and what it last wrote to stderr. Imports nothing heavy."""

import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO

LINES, WIDTH = 30, 300  # of stderr that are kept


def run(command: Sequence[object], limit_s: float, env: Mapping[str, str]) -> dict:
    """{"ended": "exit code 0", "ok": whether, "wall_s": ..., "cpu_s": ..., "stderr": its last lines, if it failed}.

    The command leads a process group of its own. All of the group is killed when the command ends, when the limit is over,
    and when this process is interrupted.
    """
    began, used = time.perf_counter(), _cpu_s()
    # files, not pipes: a process that outlives the command keeps a pipe open, and whoever reads it waits
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=dict(env), start_new_session=True
        )  # fmt: skip
        try:
            process.wait(limit_s)
            ended = end_of(process.returncode)
        except subprocess.TimeoutExpired:
            ended = f"killed after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be killed: go on without it
                process.wait(30)
        found = {"ended": ended, "ok": ended == end_of(0), "wall_s": round(time.perf_counter() - began, 2)}
        found["cpu_s"] = round(_cpu_s() - used, 2)
        return found if found["ok"] else found | {"stderr": _last_lines(err) or _last_lines(out)}


def _cpu_s() -> float:
    """Processor time of all processes that this one has started and waited for, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def end_of(code: int) -> str:
    """A return code in words: "exit code 1", "signal 11, SIGSEGV"."""
    if code >= 0:
        return f"exit code {code}"
    names = {s.value: s.name for s in signal.Signals}
    return f"signal {-code}, {names.get(-code, 'a real-time one')}"


def _last_lines(file: BinaryIO) -> list[str]:
    file.seek(max(0, file.seek(0, os.SEEK_END) - LINES * WIDTH))
    lines = [line.rstrip()[:WIDTH] for line in file.read().decode(errors="replace").splitlines()]
    return [line for line in lines if line][-LINES:]

"""Running a cell's commands, on whatever machine: what an executor is given, and what it calls there.

In the cell's folder a job keeps study.log (all that its commands print), attempts.jsonl (a line when an attempt begins and one when it
ends), running.json (which process runs it), and .study.lock, which it holds and its commands inherit. So no cell is
run twice at a time, whoever started it: a job waits for one that is still at work, ends what a killed one left, and does nothing
if the result is there.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from c4c.files import discard, read_json_object
from c4c.launched import is_free
from c4c.study import processes
from c4c.study.lock import FolderLock
from pipelines.cores import SHARE
from pipelines.quarantine import json_lines

LOCK, LOG = ".study.lock", "study.log"
# what a launcher told the process that runs the study is not true of its cells
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_S = 0.1
_LEFT_S = 30.0  # that a command's other processes get when it has ended


@dataclass(frozen=True)
class CellJob:
    """A cell's commands. result: the file that is there once it is done; newer_than: of another cell, '' for none, which must be
    older. cores: of the machine; 0: those that this process may use. gpus: as CUDA_VISIBLE_DEVICES; None: all."""

    folder: str
    commands: tuple[tuple[str, ...], ...]
    cwd: str
    result: str
    newer_than: str = ""
    cores: int = 0
    gpus: str | None = None

    def is_done(self) -> bool:
        """Whether the cell has its result."""
        return has_result(Path(self.folder, self.result), Path(self.newer_than) if self.newer_than else None)


@dataclass
class StopRequest:
    """Whether running commands are to stop, and by which signal; `at_once`: without saving."""

    by: signal.Signals | None = None
    at_once: bool = False


def has_result(result: Path, newer_than: Path | None) -> bool:
    """Whether a file is there, and not older than another."""
    try:
        made = result.stat().st_mtime
        if newer_than is None or made >= newer_than.stat().st_mtime:
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    return newer_than.suffix == ".json" and _ended_after(result.parent, newer_than)


def _ended_after(folder: Path, source: Path) -> bool:
    """Whether a cell ended after another, by what their files say: a copy of a study's folder may have lost the files' own times."""
    try:
        began = read_json_object(source)["time_unix_s"]
        return max(row["ended"] for row in json_lines(attempts_path(folder)) if row.get("code") == 0) >= began
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_running(folder: Path) -> bool:
    """Whether an attempt at the cell goes on, on whatever machine that shares the folder."""
    return FolderLock(folder / LOCK).is_taken()


def run_job(job: CellJob, stop: StopRequest | None = None) -> int:
    """Run the commands one after another; returns 0, or the exit code of the one that failed. Raises OSError.

    stop: set by another thread to end it; also 0 then.
    """
    folder, stop = Path(job.folder), stop or StopRequest()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder / LOCK)
    while not lock.take():
        if stop.by:
            return 0
        if processes.runner_is_gone(folder):
            processes.end(folder)
        time.sleep(_POLL_S)
    try:
        if job.is_done():
            return 0
        processes.end(folder)  # what a killed attempt left, if its first process has ended
        processes.sign(folder)
        return _attempt(job, folder, lock, stop)
    finally:
        discard(folder / processes.RUNNER)
        lock.release()


def _attempt(job: CellJob, folder: Path, lock: FolderLock, stop: StopRequest) -> int:
    began = round(time.time(), 3)
    about = {"began": began, "host": socket.gethostname(), "gpus": job.gpus}
    _note(folder, about | {"ended": None, "code": None})
    code: int | None = 1
    try:
        code = 0
        for command in job.commands:
            if stop.by is None and code == 0:
                code = _call(command, job, lock, stop)
    except OSError as error:
        code = 1
        with suppress(OSError), open(folder / LOG, "a") as log:
            log.write(f"error: {command[0]} cannot be started ({error.strerror}): is the environment active?\n")
    finally:
        stopped = stop.by is not None and not job.is_done()
        more = {"stopped": stop.by.name} if stop.by is not None and stopped else {}
        _note(folder, about | {"ended": round(time.time(), 3), "code": None if stopped else code} | more)
    return 0 if stopped else code


def attempts_path(folder: Path) -> Path:
    """Where a cell's attempts are listed."""
    return folder / "attempts.jsonl"


def _note(folder: Path, about: dict) -> None:
    """A line of attempts.jsonl, in one write."""
    line = json.dumps(about).encode() + b"\n"
    file = os.open(attempts_path(folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def _call(command: tuple[str, ...], job: CellJob, lock: FolderLock, stop: StopRequest) -> int:
    folder = Path(job.folder)
    words = with_port(started_here(command))
    with open(folder / LOG, "ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode(errors="replace"))
        log.flush()
        process = subprocess.Popen(
            words, cwd=job.cwd, env=environment(job, os.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, pass_fds=[lock.file],
        )  # fmt: skip
        code = _wait(process, folder, stop)
    processes.end(folder, within_s=0 if stop.at_once else _LEFT_S)
    return 128 - code if code < 0 else code


def _wait(process: subprocess.Popen, folder: Path, stop: StopRequest) -> int:
    """The exit code; a stop is passed on, once, and after `processes.STOP_S` enforced."""
    until: float | None = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)
        if stop.by is not None and until is None:
            until = time.monotonic() + processes.STOP_S
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM)
        if stop.at_once or (until is not None and time.monotonic() > until):
            processes.end(folder, within_s=0)


def environment(job: CellJob, own: Mapping[str, str]) -> dict[str, str]:
    """Of a cell's commands: its share of the machine, and the mark by which its processes are found."""
    env = {name: value for name, value in own.items() if name not in _OF_RANKS}
    share = job.cores or len(os.sched_getaffinity(0))
    env |= {processes.MARK: job.folder, SHARE: str(share)}
    if job.commands and job.commands[0][0] == "python":  # one process: what torch takes before anybody tells it
        env["OMP_NUM_THREADS"] = str(share)
    # by Slurm's own rule, all of an allocation meet at one port
    if job.commands and Path(job.commands[0][0]).name == "srun":
        env["MASTER_PORT"] = str(_free_port())
    if job.gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = job.gpus
    return env


def started_here(command: tuple[str, ...]) -> list[str]:
    """With the programs of this environment, whether it is active or not."""
    beside = Path(sys.executable).parent / command[0]
    if command[0] == "python":
        return [sys.executable, *command[1:]]
    return [str(beside) if "/" not in command[0] and beside.exists() else command[0], *command[1:]]


def with_port(command: list[str], find: Callable[[], int] | None = None) -> list[str]:
    """Deepspeed's ranks meet at one port for all runs of a machine, unless another is named. torchrun finds a free one by itself,
    and so does a training of one rank."""
    if Path(command[0]).name != "deepspeed" or any(word.startswith("--master_port") for word in command):
        return command
    return [command[0], "--master_port", str((find or _free_port)()), *command[1:]]


def _free_port() -> int:
    """Below those that the system hands out, or another process might have it before the ranks get to it."""
    draw = random.SystemRandom()
    ports = (draw.randrange(20000, 29500) for _ in range(1000))
    return next((port for port in ports if is_free(port)), 29500)


def require_launcher(launcher: tuple[str, ...], gpus_per_cell: int = 0) -> None:
    """Raise ValueError if the program that starts training is not there, or would not keep to a cell's GPUs."""
    program = started_here(launcher)[0]
    if shutil.which(program) is None:
        raise ValueError(
            f"launcher {shlex.join(launcher)}: there is no program {launcher[0]} here: is the environment active? python, deepspeed and "
            "torchrun are usual"
        )
    chosen = [word for word in launcher if re.match("--(num_gpus|num_accelerators|include|exclude)", word)]
    if gpus_per_cell and Path(launcher[0]).name == "deepspeed" and chosen:
        raise ValueError(
            f"launcher {shlex.join(launcher)}: with {chosen[0]}, deepspeed takes the machine's first GPUs for every cell: leave it out, and "
            "it takes the gpus_per_cell that the study gives each"
        )


def note_failure(folder: Path, error: str) -> None:
    """Record, as an attempt would, why what lies in a cell's folder is not its result. Raises OSError."""
    now = round(time.time(), 3)
    with open(folder / LOG, "a") as log:
        log.write(f"error: {error}\n")
    _note(folder, {"began": now, "ended": now, "code": 1, "host": socket.gethostname(), "gpus": None})

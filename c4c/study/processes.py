"""Processes of a cell. All inherit a mark in their environment, by which they are found although launchers put ranks into
sessions of their own, and although whoever started them was killed."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from c4c.files import read_json_object, replace_text

MARK = "C4C_STUDY_CELL"  # the cell's folder
RUNNER = "running.json"  # in it: the process that runs the cell's commands
STOP_S = 300.0  # in which a training is to end its step and save
_KILL_S = 10.0


def marked(folder: Path | None = None, inside: Path | None = None) -> Iterator[tuple[psutil.Process, Path]]:
    """(process, its cell's folder) on this machine, of one cell, or of all whose folders are inside another."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or not (mark := process.environ().get(MARK)):
                continue
            own = Path(mark)
            if own == folder or (inside is not None and own.is_relative_to(inside)):
                yield process, own


def sign(folder: Path) -> None:
    """Note in the cell's folder that this process runs it."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}
    replace_text({folder / RUNNER: f"{json.dumps(about)}\n"})


def runner_is_gone(folder: Path) -> bool:
    """Whether the process that ran the cell was one of this machine, and has ended."""
    try:
        about = read_json_object(folder / RUNNER)
        if about["host"] != socket.gethostname():
            return False
        process = psutil.Process(int(about["pid"]))
        return abs(process.create_time() - float(about["began"])) > 1 or process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True
    except (ValueError, KeyError, TypeError, OSError, psutil.Error):
        return False


def ask_to_stop(processes: list[psutil.Process]) -> None:
    """SIGTERM to their process groups: a training saves and stops, and launchers do not always pass a signal on."""
    groups = set()
    for process in processes:
        with suppress(OSError):
            groups.add(os.getpgid(process.pid))
    for group in groups - {os.getpgrp()}:
        with suppress(OSError):
            os.killpg(group, signal.SIGTERM)


def end(folder: Path | None = None, inside: Path | None = None, within_s: float = STOP_S) -> list[Path]:
    """End the processes of a cell, or of all cells inside a folder whose runner is gone. Returns the folders of those that ran.

    They are asked to stop, and killed after `within_s` seconds, with what they started meanwhile.
    """

    def left() -> list[tuple[psutil.Process, Path]]:
        found = list(marked(folder, inside))
        gone = {own: folder is not None or runner_is_gone(own) for _, own in found}
        return [(process, own) for process, own in found if gone[own]]

    first = left()
    ask_to_stop([process for process, _ in first])
    until = time.monotonic() + within_s
    while (there := left()) and time.monotonic() < until:
        time.sleep(0.3)
    until = time.monotonic() + _KILL_S
    while there and time.monotonic() < until:
        for process, _ in there:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.3)
        there = left()
    return sorted({own for _, own in first})

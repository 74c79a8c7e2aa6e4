"""A packing process that dies is told apart from one that reports an error."""

from __future__ import annotations

import errno
import os
import signal
from multiprocessing import Pipe
from pathlib import Path

import pytest

from shards.annotations import Item
from shards.packing.scheduler import Supervisor
from shards.packing.worker import Event, Job
from tests.shards.sets import COPY


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPIPE, errno.EIO])
def test_an_error_of_a_network_file_system_is_raised(
    items: list[Item], tmp_path: Path, monkeypatch, number: int
) -> None:
    ours, theirs = Pipe()
    error = OSError(number, os.strerror(number), "/net/000000.tar")
    for event in (Event("opening", 0), Event("error", error=error)):
        theirs.send(event)
    theirs.close()  # or the wait for the process, which is not there, would never end
    monkeypatch.setattr(Supervisor, "_send", lambda *_: ours)
    with pytest.raises(OSError) as caught:
        Supervisor().pack(Job("000000", tuple(items[:1]), tmp_path, COPY), lambda progress: None)
    assert (caught.value.errno, caught.value.filename) == (number, "/net/000000.tar")
    ours.close()


def test_ctrl_c_does_not_reach_a_packing_process_from_its_first_moment_on(items: list[Item], tmp_path: Path) -> None:
    supervisor = Supervisor()
    try:
        supervisor._send(Job("000000", tuple(items[:1]), tmp_path, COPY))
        assert supervisor._process is not None
        status = Path(f"/proc/{supervisor._process.pid}/status").read_text()
        blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
        assert blocked & 1 << (signal.SIGINT - 1)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        supervisor.close()

"""A packing process that dies is told apart from one that reports an error."""

from __future__ import annotations

import errno
import os
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

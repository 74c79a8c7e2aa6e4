"""A limit on memory: packing either ends with the same bytes, or says in one sentence that memory is the reason."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import av
import pytest

from shards import memory
from shards.annotations import Item
from shards.packing import scheduler
from shards.packing.scheduler import Supervisor
from shards.packing.worker import Job
from shards.video.source import scan
from tests.shards.sets import COPY, files, packed

pytestmark = pytest.mark.slow

PACK = """
import resource, sys
from c4c import shard
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[1]) * 2**20,) * 2)
sys.exit(shard.main(sys.argv[2:]))
"""


def pack(room: int, videos: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    """Pack in a process that may take `room` MiB more than the program itself."""
    command = ["folder", "--videos", videos, "--captions", videos / "captions.csv", "--out", out, "--profile", "copy"]
    command += ["--workers", "1", *more]
    return subprocess.run([sys.executable, "-c", PACK, str(room), *map(str, command)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def videos(items: list[Item]) -> Path:
    folder = items[0].path.parent
    rows = [f"{item.path.name},caption {i}" for i, item in enumerate(items)]
    (folder / "captions.csv").write_text("\n".join(["video,caption", *rows]))
    return folder


def test_under_a_limit_the_bytes_are_the_same_or_the_reason_is_said(videos, tmp_path):
    ended = {room: pack(room, videos, tmp_path / f"{room}/set") for room in (20, 120, 2000)}
    assert ended[20].returncode == 1 and not (tmp_path / "20").exists()
    assert "of memory (ulimit -v) and this command takes at least" in ended[20].stderr
    for done in ended.values():
        assert done.returncode == 0 or "error: " in done.stderr.splitlines()[-1], done.stderr
        assert done.returncode == 0 or "memory" in done.stderr.splitlines()[-1], done.stderr
        # PyAV cannot raise everywhere: where memory ends in the wrong moment, it prints what it drops
        assert done.stderr.count("Traceback") == done.stderr.count("exception being dropped:\nTraceback"), done.stderr
    assert ended[2000].returncode == 0, ended[2000].stderr
    again = pack(2000, videos, tmp_path / "120/set", "--retry-rejects")  # with more, it goes on
    assert again.returncode == 0, again.stderr
    assert files(tmp_path / "120/set") == files(tmp_path / "2000/set")


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (av.error.BlockingIOError(errno.EAGAIN, "Failed initializing scaling graph"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("/x/_regex.so: failed to map segment from shared object"), True),
        (ImportError("No module named 'regex'"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_what_says_that_memory_is_short(error, short):
    assert memory.is_short(error) == short


@pytest.mark.parametrize(
    "kind", [av.error.MemoryError(errno.ENOMEM, "no memory"), av.error.BlockingIOError(errno.EAGAIN, "no thread")]
)
def test_no_other_way_is_taken_where_memory_is_short(items, monkeypatch, kind):
    """It would succeed by chance, and its table would say that no frame can be read alone."""
    data = next(item for item in items if item.path.suffix == ".webm").path.read_bytes()
    assert (scan(data).frames.offset >= 0).all()

    def short(frame):
        raise kind

    monkeypatch.setattr("shards.video.source.upright", short)
    monkeypatch.setattr("shards.memory.limit", lambda: (600_000_000, "-v"))
    with pytest.raises(MemoryError):
        scan(data)


def test_a_video_that_takes_too_much_memory_is_named(items, tmp_path, monkeypatch):
    def short(*_):
        raise MemoryError

    monkeypatch.setattr("shards.packing.worker.store", short)
    monkeypatch.setattr("shards.memory.limit", lambda: (600_000_000, "-v"))
    from shards.packing.worker import pack_shard

    said = []
    pack_shard(Job("000000", tuple(items[:2]), tmp_path, COPY), lambda event: said.append(event.progress))
    reasons = [one.rejected for one in said if one]
    assert reasons[0] == "plain: there is not enough memory to decode it; the limit is 600 MB a process (ulimit -v)"


def test_a_process_that_is_killed_once_starts_again(items, tmp_path, monkeypatch):
    whole = packed(items, tmp_path / "whole", workers=1)
    send, killed = Supervisor._send, []

    def send_and_kill(self, job):
        pipe = send(self, job)
        if not killed:
            killed.append(self._process.kill())
        return pipe

    monkeypatch.setattr(scheduler.Supervisor, "_send", send_and_kill)
    again = packed(items, tmp_path / "again", workers=1)
    assert killed and again == whole and files(tmp_path / "again") == files(tmp_path / "whole")

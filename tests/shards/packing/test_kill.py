"""Kill -9 and full disks: after a rerun the split is the same, byte for byte, as that of an unbroken run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.shards.sets import files
from tests.videos import encode

pytestmark = pytest.mark.slow

KILLS = 20
SHARDS = 5

PACKER = """
import os, resource, sys
from pathlib import Path
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.video.profiles import Profile
folder, out, workers, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
items = [Item(p.stem, p, (Caption(p.stem),)) for p in sorted(folder.glob("*.mp4"))]
pack(items, out, dataset="set", split="train", profile=Profile(short_side=96), shard_videos=2, workers=workers)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos that take a moment to pack, two a shard; one is none."""
    out = tmp_path_factory.mktemp("slow")
    data = encode(150, 24, (320, 240))
    for i in range(2 * SHARDS):
        (out / f"v{i}.mp4").write_bytes(data if i != 4 else b"not a video")
    return out


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of a run that nothing stopped, and the seconds it worked on shards."""
    out = tmp_path_factory.mktemp("unbroken") / "train"
    with start(folder, out) as process:
        busy = wait_for_work(process, out, set())
        assert process.wait() == 0, process.stderr.read()
    whole = files(out)
    assert len(whole) == 3 * SHARDS + 3  # dataset.json, captions.npy and rejects.jsonl, too
    return whole, time.monotonic() - busy


def start(folder: Path, out: Path, workers: int = 1, limit: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PACKER, str(folder), str(out), str(workers), str(limit)]
    root = Path(__file__).parents[3]
    return subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for_work(process: subprocess.Popen, out: Path, left: set[Path]) -> float:
    """Wait until there are temporary files besides those `left` by an earlier run; returns the time."""
    while set(out.glob(".*.tar.*.tmp")) <= left and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic()


def wait_for_shard(process: subprocess.Popen, out: Path) -> None:
    """Wait until one more shard is committed."""
    before = set(out.glob("*.parquet"))
    while set(out.glob("*.parquet")) <= before and process.poll() is None:
        time.sleep(0.005)


def alive(session: int) -> list[str]:
    """What still runs of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, belongs = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(belongs) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def kill(process: subprocess.Popen, group: bool) -> bool:
    """Kill -9 the packer, or all of its processes. Whether it had not ended before."""
    if group:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session is its own
    else:
        process.kill()
    stopped = process.wait() == -signal.SIGKILL
    patience = time.monotonic() + 60
    while left := alive(process.pid):
        if time.monotonic() > patience:
            raise TimeoutError(f"outlived its packer: {left}")
        time.sleep(0.01)
    return stopped


@pytest.mark.skipif(sys.platform != "linux", reason="workers end with a killed packer on Linux only")
def test_kill_9_at_any_moment(folder: Path, unbroken, tmp_path: Path) -> None:
    (whole, seconds), rng, out = unbroken, random.Random(7), tmp_path / "broken" / "train"
    stopped = mixed = 0
    for nth in range(KILLS):
        torn = set(out.glob(".*.tmp"))
        with start(folder, out, workers=1 + nth % 2) as process:
            wait_for_work(process, out, torn)
            # where the machine is much busier than it was for the unbroken run, no shard would be finished
            if nth % 4 == 1:
                wait_for_shard(process, out)
            else:
                time.sleep(seconds * rng.uniform(0, 0.5))
            stopped += kill(process, group=nth % 3 == 2)
        there = files(out)
        assert all(whole[n] == data for n, data in there.items() if n in whole)  # what has a real name is finished
        mixed += 0 < sum(n.endswith(".parquet") for n in there) < SHARDS
        if "dataset.json" in there:
            shutil.rmtree(out)
    assert stopped >= KILLS // 2 and mixed >= KILLS // 5  # or the test would not test
    with start(folder, out) as process:
        assert process.wait() == 0, process.stderr.read()
    assert files(out) == whole


def test_a_full_disk_loses_nothing(folder: Path, unbroken, tmp_path: Path) -> None:
    """A limit on the size of files: the first shard with two videos does not fit, the one with a single video does."""
    whole, out = unbroken[0], tmp_path / "train"
    limit = (len(whole["000002.tar"]) + len(whole["000001.tar"])) // 2
    assert len(whole["000002.tar"]) < limit < len(whole["000001.tar"]) and limit > 4096
    with start(folder, out, limit=limit) as process:
        said = process.stderr.read()
    assert process.returncode == 1 and "ShardError" in said and "make room" in said and "File too large" in said
    there = files(out)
    assert not [n for n in there if n.endswith((".tar", "dataset.json", "rejects.jsonl", ".tmp"))]
    with start(folder, out) as process:
        assert process.wait() == 0, process.stderr.read()
    assert files(out) == whole

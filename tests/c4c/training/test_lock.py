"""One training at a time in a run folder: refused by name, freed by any end of the process."""

import os
import signal
import subprocess
import sys

import pytest

from c4c.training import lock as lock_module
from c4c.training.lock import FILE, RunLock
from tests.launch.runs import ROOT

# holds the lock and has a child process, as a loader's workers are
HOLDER = """
import os, sys, time
from pathlib import Path
from c4c.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_the_second_is_refused_with_host_and_process_of_the_first(tmp_path, holder):
    second = RunLock(tmp_path)
    for make in (True, False):
        with pytest.raises(ValueError, match="is in use") as caught:
            second.take(make)
        assert f"{tmp_path} is in use: process {holder.pid} on {os.uname().nodename} (since " in str(caught.value)
        assert "choose another run.dir" in str(caught.value)


def test_a_kill_frees_it_though_a_child_lives(tmp_path, holder):
    lock = RunLock(tmp_path)
    holder.kill()
    holder.wait()
    lock.take(wait_s=5)
    lock.release()
    assert not (tmp_path / FILE).exists()


def test_a_restarted_run_waits_for_the_one_before(tmp_path, holder, monkeypatch):
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(lock_module.time, "sleep", nap)
    RunLock(tmp_path).take(wait_s=3600)
    assert len(naps) == 3


def test_it_is_asked_for_without_making_anything(tmp_path):
    RunLock(tmp_path / "gone").take(make=False)
    RunLock(tmp_path).take(make=False)
    assert list(tmp_path.iterdir()) == []


def test_it_follows_a_run_that_is_moved_aside(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    lock.take()
    lock.take()  # its own is no hindrance
    run.rename(tmp_path / "run.old1")
    run.mkdir()
    lock.take()
    code = (
        "import sys; from pathlib import Path; from c4c.training.lock import RunLock; RunLock(Path(sys.argv[1])).take()"
    )
    for folder, status in ((run, 1), (tmp_path / "run.old1", 0)):
        assert (
            subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, stderr=subprocess.DEVNULL).returncode
            == status
        )
    lock.release()


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("c4c.training.lock.fcntl.lockf", without)
    RunLock(tmp_path).take()

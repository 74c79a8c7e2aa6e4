"""What a job leaves in its cell's folder, and cells on Slurm and Dask. submitit's cluster on this machine stands for Slurm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from c4c.study import processes
from c4c.study.jobs import (
    CellJob,
    StopRequest,
    attempts_path,
    environment,
    is_running,
    require_launcher,
    run_job,
    started_here,
    with_port,
)  # fmt: skip
from c4c.study.lock import FolderLock

ROOT = Path(__file__).parents[3]


def job_in(folder: Path, *commands: str) -> CellJob:
    return CellJob(str(folder), tuple(("sh", "-c", command) for command in commands), str(ROOT), "done.json")


def attempts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in attempts_path(folder).read_text().splitlines()]


def lives(pid: int) -> bool:
    """Whether a process works; one that has ended may wait for whoever started it to notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_job_runs_its_commands_and_notes_how_they_ended(tmp_path):
    folder = tmp_path / "cell"
    job = job_in(folder, f"echo one; test $C4C_STUDY_CELL = {folder}", f"echo two >&2; touch {folder}/done.json")
    assert run_job(job) == 0
    log = (folder / "study.log").read_text()
    assert log.index("one") < log.index("$ sh", 5) < log.rindex("two")
    first, last = attempts(folder)
    assert first["ended"] is None and first["code"] is None and first["began"] == last["began"] <= last["ended"]
    assert last["code"] == 0 and last["host"]
    assert not (folder / processes.RUNNER).exists() and not is_running(folder)
    assert run_job(job) == 0 and len(attempts(folder)) == 2  # it is done


def test_a_command_that_fails_is_the_last_one(tmp_path):
    assert run_job(job_in(tmp_path / "a", "exit 7", f"touch {tmp_path}/later")) == 7
    assert attempts(tmp_path / "a")[-1]["code"] == 7 and not (tmp_path / "later").exists()
    assert run_job(job_in(tmp_path / "b", "kill -9 $$")) == 137
    missing = replace(job_in(tmp_path / "c"), commands=(("no-such-program",),))
    assert run_job(missing) == 1
    assert "error: no-such-program cannot be started" in (tmp_path / "c" / "study.log").read_text()


def test_what_a_command_leaves_behind_is_ended(tmp_path):
    began = time.monotonic()
    assert run_job(job_in(tmp_path, f"setsid sleep 600 & echo $! > {tmp_path}/pid; touch {tmp_path}/done.json")) == 0
    assert time.monotonic() - began < 20
    assert not lives(int((tmp_path / "pid").read_text()))


def test_a_command_that_does_not_stop_is_killed_at_the_second_signal(tmp_path):
    stop = StopRequest()
    job = job_in(
        tmp_path, f"trap 'echo heard >> {tmp_path}/heard' TERM; touch {tmp_path}/up; while true; do sleep 0.1; done"
    )
    thread = threading.Thread(target=lambda: run_job(job, stop))
    thread.start()
    _until((tmp_path / "up").exists)
    assert is_running(tmp_path)
    stop.by = signal.SIGINT
    _until((tmp_path / "heard").exists)
    assert thread.is_alive()
    stop.at_once = True
    thread.join(20)
    assert not thread.is_alive() and attempts(tmp_path)[-1]["stopped"] == "SIGINT"


def _until(true, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_what_a_killed_process_left_is_ended_before_the_cell_runs_again(tmp_path):
    """The process that ran the job is gone; its command is not, and still has the lock."""
    folder = tmp_path / "cell"
    code = f"""
from tests.c4c.study.test_executors import job_in, run_job, Path
run_job(job_in(Path({str(folder)!r}), "echo $$ > {folder}/pid; sleep 600"))
"""
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    _until(lambda: (folder / "pid").exists() and (folder / "pid").read_text().strip())
    assert not processes.runner_is_gone(folder)
    runner.kill()
    runner.wait()
    left = int((folder / "pid").read_text())
    assert lives(left)
    assert processes.runner_is_gone(folder) and is_running(folder)
    assert run_job(job_in(folder, f"touch {folder}/done.json")) == 0
    assert not lives(left)
    codes = [line["code"] for line in attempts(folder)]
    assert codes == [None, None, 0]


def test_two_jobs_of_one_cell_run_one_after_the_other(tmp_path):
    job = job_in(tmp_path, f"echo x >> {tmp_path}/ran; sleep 0.5; touch {tmp_path}/done.json")
    threads = [threading.Thread(target=run_job, args=(job,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (tmp_path / "ran").read_text() == "x\n" and len(attempts(tmp_path)) == 2


def test_a_lock_excludes_threads_and_stays_with_who_inherits_it(tmp_path):
    first, second = FolderLock(tmp_path / "lock"), FolderLock(tmp_path / "lock")
    assert first.take() and not second.take() and second.is_taken()
    assert f"process {os.getpid()} on" in second.holder()
    child = subprocess.Popen(["sleep", "600"], pass_fds=[first.file])
    first.release()
    assert second.is_taken() and not second.take()
    child.kill()
    child.wait()
    assert not second.is_taken() and second.take()
    second.release()


def test_the_environment_of_a_cell():
    job = CellJob("/cell", (("deepspeed", "launch/train.py"),), "/", "done.json", cores=3, gpus="2,3")
    env = environment(job, {"RANK": "1", "LOCAL_WORLD_SIZE": "2", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "0"})
    assert env == {"HOME": "/h", "C4C_STUDY_CELL": "/cell", "C4C_CORES": "3", "CUDA_VISIBLE_DEVICES": "2,3"}
    srun = replace(job, commands=(("srun", "python", "launch/train.py"),))
    assert 20000 <= int(environment(srun, {})["MASTER_PORT"]) < 29500
    python = replace(job, commands=(("python", "launch/eval.py"),), gpus=None)
    assert environment(python, {})["OMP_NUM_THREADS"] == "3" and "CUDA_VISIBLE_DEVICES" not in environment(python, {})


def test_deepspeed_gets_a_port_of_its_own_and_others_keep_theirs():
    assert with_port(["/x/deepspeed", "a.py"], lambda: 5) == ["/x/deepspeed", "--master_port", "5", "a.py"]
    for command in (["deepspeed", "--master_port=7", "a.py"], ["torchrun", "a.py"], ["python", "a.py"]):
        assert with_port(command, lambda: 5) == command
    assert 20000 <= int(with_port(["deepspeed"])[2]) < 29500


def test_launchers_that_are_refused():
    assert started_here(("python", "x")) == [sys.executable, "x"]
    require_launcher(("python",))
    with pytest.raises(ValueError, match="there is no program deepsped here"):
        require_launcher(("deepsped",))
    require_launcher(("deepspeed", "--num_gpus", "2"))
    with pytest.raises(ValueError, match="with --num_gpus, deepspeed takes the machine's first GPUs"):
        require_launcher(("deepspeed", "--num_gpus", "2"), gpus_per_cell=2)

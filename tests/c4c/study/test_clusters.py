"""Cells on Slurm and Dask. submitit's cluster on this machine, and programs that stand for Slurm's, are what there is of it here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from c4c.study.cells import cells_of
from c4c.study.executors import DaskExecutor, LocalExecutor, SlurmExecutor, executor_of
from c4c.study.run import run
from tests.c4c.study.studies import events, nothing, study_in, written

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


def finished(study, executor) -> dict[str, str]:
    try:
        return run(study, executor, nothing, write=nothing).failed
    finally:
        executor.close()


def test_cells_as_jobs_of_submitit(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "num_frames=4")
    study = study_in(tmp_path, seeds=[1])
    executor = SlurmExecutor(study.out.resolve() / "slurm", {}, cluster="local")
    failed = finished(study, executor)
    assert list(failed.values()) == ["the loss is not finite"]
    assert len(events(study.out, "done")) == 4
    cell = cells_of(study)["frames", "1", 1]
    assert json.loads((cell.folder / "slurm.json").read_text())["cluster"] == "local"


def test_jobs_of_slurm_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="slurm: nodes: 2: a cell runs on one machine"):
        SlurmExecutor(tmp_path, {"nodes": 2})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--on slurm: .*srun"):
        SlurmExecutor(tmp_path, {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"--on slurm needs the package submitit: pip install -e '\.\[study\]'"):
        SlurmExecutor(tmp_path, {})
    for wrong in ("slrum", "dask:"):
        with pytest.raises(ValueError, match="must be local, slurm or dask:ADDRESS"):
            executor_of(wrong, study_in(tmp_path), 0)
    assert isinstance(executor_of("local", study_in(tmp_path), 0)(), LocalExecutor)


def test_cells_as_tasks_of_dask(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "num_frames=4")
    from distributed import LocalCluster

    study = study_in(tmp_path)
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        failed = finished(study, DaskExecutor(cluster.scheduler_address, str(ROOT)))
    assert set(failed.values()) == {"the loss is not finite"} and len(failed) == 2
    assert len(events(study.out, "done")) == 8
    rows = [json.loads(line) for line in (study.out / "starts.jsonl").read_text().splitlines()]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {row["cores"] for row in rows if row["what"] == "began"} == {str(share)}


def test_dask_clusters_that_cannot_be_used(tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr("c4c.study.executors._SECONDS_FOR_WORKERS", 1)
    with pytest.raises(ValueError, match="no scheduler with workers answers there"):
        DaskExecutor("tcp://127.0.0.1:9", str(ROOT))
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        pytest.raises(ValueError, match=r"worker .* does not see the folder /no/such"),
    ):
        DaskExecutor(cluster.scheduler_address, "/no/such")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match="dask:ADDRESS needs the package distributed"):
        DaskExecutor("tcp://127.0.0.1:9", str(ROOT))


SBATCH = """#!/bin/sh
# queues a job that starts in a second, in a session of its own
id=$$; echo $id >> $FAKE_SLURM/submitted; echo PENDING > $FAKE_SLURM/$id
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here SLURM_PROCID=0 SLURM_LOCALID=0
setsid sh -c "sleep 1; echo RUNNING > $FAKE_SLURM/$id; sh $1; echo COMPLETED > $FAKE_SLURM/$id" > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
for id in $(cat $FAKE_SLURM/submitted); do echo "$id|$(cat $FAKE_SLURM/$id)|here"; done
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Programs that stand for Slurm's; returns their folder."""
    folder = tmp_path / "slurm-programs"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": "#!/bin/sh"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("FAKE_SECONDS", "2")
    return folder


def test_a_study_that_is_killed_finds_its_slurm_jobs_again(tmp_path, slurm):
    file = written(tmp_path, seeds=[1])
    command = [sys.executable, "-m", "c4c.study", "--cfg", str(file), "--on", "slurm"]
    study = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    out = tmp_path / "out"
    # four cells need no other one
    while not (out / "starts.jsonl").exists() or len(list(out.glob("cells/*/slurm.json"))) < 4:
        assert time.monotonic() < until and study.poll() is None
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.wait()
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "5 of 5 cells done" in ended.stderr
    assert sorted(events(out, "began")) == sorted(events(out, "done"))
    assert len(events(out, "done")) == 5
    assert len((slurm / "submitted").read_text().split()) == 5  # no job was submitted for a cell that had one


@pytest.mark.nightly
def test_a_job_that_slurm_refuses_or_ends_is_a_failure_of_its_cell(tmp_path, slurm):
    refusing = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1"
    (slurm / "sbatch").write_text(refusing)
    study = study_in(tmp_path, seeds=[1], tables=[{"name": "one", "rows": [{"label": "base"}]}])
    (error,) = finished(study, SlurmExecutor(study.out.resolve() / "slurm", {"partition": "gpuu"})).values()
    assert "Slurm did not take the job: " in error and "gpuu" in error
    (slurm / "sbatch").write_text(SBATCH.replace("sh $1;", "").replace("COMPLETED", "TIMEOUT"))
    (error,) = finished(study, SlurmExecutor(study.out.resolve() / "slurm", {})).values()
    assert "of Slurm ended as TIMEOUT" in error

"""Where cells run: on this machine, as jobs of Slurm (submitit), or on the workers of a Dask cluster. All run `run_job`.

Slurm and Dask are what others' packages are for; they are imported only when they are asked for: pip install 'c4c[study]'.
"""

import importlib
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from c4c.files import read_json_object, replace_text
from c4c.study.config import Study
from c4c.study.jobs import CellJob, StopRequest, is_running, run_job

_ONE_A_NODE = ("nodes", "ntasks_per_node", "tasks_per_node")
_SUBMITTED = "slurm.json"  # in a cell's folder: the job that was submitted for it last
_SECONDS_FOR_WORKERS = 30


class Handle(Protocol):
    """A cell that was handed to an executor."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> int:
        """The exit code. Raises what went wrong outside the cell's commands."""


class Executor(Protocol):
    """Runs jobs. places: how many at once; 0: as many as there are. stops: whether a stop of the study reaches its jobs."""

    places: int
    stops: bool

    def submit(self, job: CellJob) -> Handle:
        """Start a job, now or when there is room for it."""

    def stop(self, request: StopRequest) -> None:
        """Pass a stop on, and again if it has become more urgent."""

    def close(self) -> None:
        """Leave the executor. Jobs that it cannot stop go on."""


class LocalExecutor:
    """`jobs` cells at once on this machine, each with its share of the cores, and of the GPUs if `gpus_per_cell` is set.

    The share stays the same when fewer are left: a CPU's numbers depend on the number of its threads.
    """

    stops = True

    def __init__(self, jobs: int, gpus_per_cell: int = 0):
        self.places = jobs
        self._cores = max(1, len(os.sched_getaffinity(0)) // jobs)
        self._gpus: list[str | None] = [None] * jobs
        if gpus_per_cell:
            self._gpus = _shares(visible_gpus(), jobs, gpus_per_cell)
        self._stop = StopRequest()
        self._pool = ThreadPoolExecutor(jobs, "c4c-cell")

    def submit(self, job: CellJob) -> Handle:
        """Start a job; no more than `places` at a time."""
        return self._pool.submit(self._run, job, self._gpus.pop())

    def _run(self, job: CellJob, gpus: str | None) -> int:
        try:
            return run_job(replace(job, cores=self._cores, gpus=gpus), self._stop)
        finally:
            self._gpus.append(gpus)  # before the job counts as done, when the next one asks for them

    def stop(self, request: StopRequest) -> None:
        """All commands get SIGTERM, or are killed."""
        self._stop.by, self._stop.at_once = request.by, request.at_once

    def close(self) -> None:
        """Wait for the threads, whose commands have ended."""
        self._pool.shutdown()


def visible_gpus() -> list[str]:
    """This machine's GPUs that a command may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word.strip() for word in named.split(",") if word.strip()]
    with suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
        return [str(i) for i, _ in enumerate(line for line in asked.stdout.splitlines() if line.startswith("GPU "))]
    return []


def _shares(gpus: list[str], jobs: int, each: int) -> list[str | None]:
    if len(gpus) < jobs * each:
        raise ValueError(
            f"jobs: {jobs} with gpus_per_cell: {each} takes {jobs * each} GPUs, and this machine has {len(gpus)}: lower one of them"
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(jobs)]


class SlurmExecutor:
    """A job of Slurm for each cell, by submitit. `parameters` are submitit's: partition, time (minutes), gpus_per_node, cpus_per_task, ….

    Jobs outlive the study: started again, it waits for those that are still in the queue or running. cluster: slurm, or local, which
    is for tests. Raises ValueError.
    """

    stops = False

    def __init__(self, folder: Path, parameters: dict, cluster: str = "slurm", jobs: int = 0):
        submitit = _package("submitit", "--on slurm")
        for key in _ONE_A_NODE:
            if parameters.get(key, 1) != 1:
                raise ValueError(
                    f"slurm: {key}: {parameters[key]}: a cell runs on one machine, started once; leave {key} out"
                )
        self.places = jobs
        self._folder, self._cluster = folder, cluster
        kind = submitit.SlurmExecutor if cluster == "slurm" else submitit.LocalExecutor
        try:
            self._executor = kind(folder=folder / "%j")
            self._executor.update_parameters(**({"job_name": "c4c-study"} if cluster == "slurm" else {}) | parameters)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"--on slurm: {' '.join(str(error).split())}") from error
        self._job = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob

    def submit(self, job: CellJob) -> Handle:
        """Submit a job, unless one that was submitted for the cell is not finished. Raises OSError."""
        note = Path(job.folder) / _SUBMITTED
        if (before := self._submitted(note)) is not None:
            return before
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            submitted = self._executor.submit(run_job, job)
        except (RuntimeError, subprocess.SubprocessError) as error:  # submitit's own kinds are RuntimeErrors
            raise OSError(f"Slurm did not take the job: {_short(error)}") from error
        replace_text({note: json.dumps({"id": submitted.job_id, "cluster": self._cluster}) + "\n"})
        return _SubmitittedCell(submitted)

    def _submitted(self, note: Path) -> Handle | None:
        with suppress(OSError, ValueError, KeyError, AttributeError, NotImplementedError):
            about = read_json_object(note)
            if about["cluster"] == self._cluster:
                job = self._job(folder=self._folder / "%j", job_id=str(about["id"]))
                if not job.done(force_check=True):
                    return _SubmitittedCell(job)
        return None

    def stop(self, request: StopRequest) -> None:
        """Nothing: see the class."""

    def close(self) -> None:
        """Nothing: see the class."""


class _SubmitittedCell:
    """A job of submitit as a `Handle`."""

    def __init__(self, job: Any):
        self._job = job

    def done(self) -> bool:
        return self._job.done()

    def result(self) -> int:
        try:
            return self._job.result()
        except Exception as error:  # submitit's own kinds, and whatever the job raised
            raise OSError(f"job {self._job.job_id} of Slurm ended as {self._job.state}: {_last_line(error)}") from error


class DaskExecutor:
    """Tasks of a Dask cluster, a cell each. Its workers have to see the same folders, and this project.

    A cell that runs on a worker goes on when the study is stopped; one that waits for a worker is dropped. Raises ValueError.
    """

    stops = False

    def __init__(self, address: str, cwd: str, jobs: int = 0):
        distributed = _package("distributed", "--on dask:ADDRESS")
        try:
            self._client = distributed.Client(address, timeout=_SECONDS_FOR_WORKERS, set_as_default=False)
            self._client.wait_for_workers(1, timeout=_SECONDS_FOR_WORKERS)
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(f"--on dask:{address}: no scheduler with workers answers there ({error})") from error
        self.places = jobs
        try:
            problems = self._client.run(_problem_on_worker, cwd)
        except Exception as error:  # whatever unpickling the function there raised
            self._client.close()
            raise ValueError(
                f"--on dask:{address}: the workers cannot run c4c ({error}): start them in this environment"
            ) from error
        for worker, problem in problems.items():
            if problem:
                self._client.close()
                raise ValueError(f"--on dask:{address}: worker {worker} {problem}")

    def submit(self, job: CellJob) -> Handle:
        """Hand a job to the scheduler."""
        return _DaskCell(self._client.submit(run_on_worker, job, pure=False, retries=0, key=None))

    def stop(self, request: StopRequest) -> None:
        """Nothing: see the class."""

    def close(self) -> None:
        """Leave the cluster."""
        self._client.close()


class _DaskCell:
    """A future of Dask as a `Handle`: its status is asked for, so that no thread waits."""

    def __init__(self, future: Any):
        self._future = future

    def done(self) -> bool:
        return self._future.status in ("finished", "error", "cancelled", "lost")

    def result(self) -> int:
        if self._future.status != "finished":
            raise OSError(f"the Dask cluster lost the task ({self._future.status}: {_short(self._future.exception())})")
        return self._future.result()


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def run_on_worker(job: CellJob) -> int:
    """`run_job` with the worker's share of its machine's cores: it may run as many tasks at once as it has threads."""
    distributed = importlib.import_module("distributed")
    threads = distributed.get_worker().state.nthreads
    return run_job(replace(job, cores=max(1, len(os.sched_getaffinity(0)) // threads)))


def _problem_on_worker(cwd: str) -> str:
    return "" if Path(cwd).is_dir() else f"does not see the folder {cwd}"


class RunningElsewhere:
    """A cell that somebody else's job is at, as a `Handle`: of an earlier start of the study, on a cluster."""

    def __init__(self, job: CellJob):
        self._job = job

    def done(self) -> bool:
        """Whether that job has ended."""
        return not is_running(Path(self._job.folder))

    def result(self) -> int:
        """0: whether there is a result, the study sees."""
        return 0


def _package(name: str, wanted_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{wanted_by} needs the package {error.name}: pip install -e '.[study]' -c constraints.txt"
        ) from error


def executor_of(on: str, study: Study, jobs: int) -> Callable[[], Executor]:
    """What makes the executor that `--on` names: local, slurm or dask:ADDRESS. jobs: at once on a cluster; 0: as many as there are.

    Raises ValueError."""
    if on == "local":
        return lambda: LocalExecutor(study.jobs, study.gpus_per_cell)
    if on == "slurm":
        return lambda: SlurmExecutor(study.out.resolve() / "slurm", study.slurm, jobs=jobs)
    if on.startswith("dask:") and on != "dask:":
        return lambda: DaskExecutor(on.removeprefix("dask:"), os.getcwd(), jobs)
    raise ValueError(f"--on {on}: must be local, slurm or dask:ADDRESS (of its scheduler, tcp://host:8786)")

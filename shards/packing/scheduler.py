"""Hands shards to packing processes, here or on a Dask cluster, and watches each process.

No thread can stop a decoder that hangs, and nothing survives one that crashes. So a process packs and a thread waits for
it: a process that takes too long over a video is killed, and a video on which the process dies twice is to blame. The
shard is then packed again without it, and the verdict is kept beside the shards until they are complete.
"""

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from shards import ShardError, memory, storage
from shards.interrupts import left_to_parent
from shards.packing.worker import Event, Job, Progress

_BYTES_PER_LIMIT = 100e6  # the time limit is for a video of so many bytes; a larger one has more in proportion


class Supervisor:
    """One packing process, and another one whenever it dies."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def pack(self, job: Job, on_progress: Callable[[Progress], None]) -> None:
        """Pack a shard; every item is reported once. Raises what is not the fault of a video."""
        reported, deaths = 0, Counter[int]()
        while not self._closed:
            item, deadline, limit = -1, None, 0.0
            failure: Exception | None = None
            try:
                pipe = self._send(job)
                while pipe.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    event: Event = pipe.recv()
                    if event.error:
                        failure = event.error
                        break
                    if event.what == "packed":
                        return
                    item, deadline = -1 if event.what == "done" else event.item, None
                    if event.what == "decoding":
                        limit = job.timeout * max(1.0, event.size / _BYTES_PER_LIMIT)
                        deadline = time.monotonic() + limit
                    if event.what == "done" and event.item == reported:
                        reported += 1
                        assert event.progress is not None, "an item that is done has a progress"
                        on_progress(event.progress)
                else:
                    reason = f"it took longer than {limit:.4g} s"
                    self._kill()
            except (EOFError, ConnectionError):
                if self._closed:
                    return
                reason = f"it crashes the program ({self._death()}{memory.limit_text()})"
                deaths[item] += 1
                if deaths[item] < 2:
                    continue
                if item < 0 or item in job.lost:
                    raise ShardError(
                        f"the process that packs shard {job.name} ended twice ({reason}): is there enough memory?"
                    ) from None
            if failure:  # not inside the try: an error of a network file system may be a ConnectionError, too
                raise failure
            job = _without(job, item, reason)

    def close(self) -> None:
        """Kill the packing process."""
        self._closed = True
        self._kill()

    def _send(self, job: Job) -> Connection:
        if self._process is None or self._pipe is None or self._process.poll() is not None:
            self._pipe, theirs = Pipe()
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            # not -m: what it sends back would belong to a module __main__
            code = f"from shards.packing import worker; worker.main({theirs.fileno()}, {os.getpid()})"
            with left_to_parent():
                self._process = subprocess.Popen(  # BLAS, which packing does not use, would take memory for each core
                    [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                    env={"OPENBLAS_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path},
                )  # fmt: skip
            theirs.close()
        self._pipe.send(job)
        return self._pipe

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _death(self) -> str:
        code = self._process.wait() if self._process else 0
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _without(job: Job, item: int, reason: str) -> Job:
    """The shard without a video. The verdict is written down, so that a packer that goes on later comes to the same."""
    job = replace(job, lost={**job.lost, item: reason})
    storage.write(storage.output(job.out), lost_name(job.name), json.dumps(job.lost), job.tag)
    return job


def lost_name(shard: str) -> str:
    """The file with a shard's verdicts, {place in the shard: why}, until the split is complete."""
    return f".{shard}.lost.json"


def read_lost(target: storage.Folder | storage.Bucket, listing: dict[str, int], shard: str) -> dict[int, str]:
    """The verdicts of an earlier run on a shard that it did not commit: which videos hang or kill, by place in the shard."""
    file = lost_name(shard)
    return {int(i): reason for i, reason in json.loads(target.read(file)).items()} if file in listing else {}


def run_locally(jobs: Iterable[Job], workers: int, on_progress: Callable[[Progress], None]) -> None:
    """Pack with `workers` processes. Raises the first error, after having stopped them all."""
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    events: queue.SimpleQueue[Progress | BaseException | None] = queue.SimpleQueue()  # None: a supervisor is done
    for job in jobs:
        todo.put(job)
    supervisors = [Supervisor() for _ in range(min(workers, todo.qsize()))]

    def work(supervisor: Supervisor) -> None:
        try:
            while True:
                supervisor.pack(todo.get_nowait(), events.put)
        except queue.Empty:
            events.put(None)
        except BaseException as error:
            events.put(error)
        finally:
            supervisor.close()

    # the kernel ends a packing process with the thread that started it: see PR_SET_PDEATHSIG
    threads = [threading.Thread(target=work, args=(s,), daemon=True) for s in supervisors]
    try:
        for thread in threads:
            _start(thread)
        left = len(threads)
        while left:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                on_progress(event)
    finally:
        for supervisor in supervisors:
            supervisor.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join(5)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        raise ShardError(
            f"no other thread could be started: is there enough memory{memory.limit_text()}? Use fewer --workers"
        ) from error


# ---- Dask ----

_local = threading.local()  # of a Dask worker: the packing process of each of its threads


def run_on_dask(jobs: Iterable[Job], address: str, on_progress: Callable[[Progress], None]) -> None:
    """Pack on the Dask cluster at `address`. A worker that is lost costs the shards it was at; Dask hands them on."""
    try:
        from dask.distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise ShardError("--scheduler needs Dask: pip install 'c4c[dask]', here and on every worker") from error
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ShardError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
    jobs, run = iter(jobs), uuid.uuid4().hex[:8]

    def submit(count: int) -> list:
        some = itertools.islice(jobs, count)
        return [client.submit(_pack_on_dask, job, key=f"c4c-{run}-{job.name}", pure=False) for job in some]

    with client:
        # not all at once: a shard of a large set is a list of hundreds of videos, and there are ten thousands of them
        threads = max(1, sum(client.nthreads().values()))
        working = as_completed(submit(4 * threads), loop=client.loop)
        for future in working:
            try:
                events = future.result()
            except KilledWorker as error:
                raise ShardError(
                    f"shard {future.key.rsplit('-', 1)[-1]} was given to several Dask workers and each was lost (out of "
                    "memory?). Committed shards are kept: run the same command again to go on."
                ) from error
            for event in events:
                on_progress(event)
            future.release()
            for more in submit(1):
                working.add(more)


def _pack_on_dask(job: Job) -> list[Progress]:
    if not storage.is_remote(job.out) and not (Path(job.out) / "packing.json").exists():
        raise ShardError(
            f"a Dask worker does not see {job.out}: --out must be on a file system that all of them share, or s3://, gs://"
        )
    if not hasattr(_local, "supervisor"):
        _local.supervisor = Supervisor()
    events: list[Progress] = []
    _local.supervisor.pack(job, events.append)
    return events

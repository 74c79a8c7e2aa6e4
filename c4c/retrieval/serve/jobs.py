"""Processes that decode: a hostile file can end or hang one of them, and never the server.

Each is a `worker.py` that has imported what its jobs need, and forks for every job. It gets jobs as lines of JSON, one at a
time, and answers each with a line.
"""

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from c4c.retrieval.serve.guard import Refusal
from c4c.retrieval.serve.monitor import Monitor

_ROOT = Path(__file__).parents[3]
_LONGEST_ANSWER = 1 << 16  # bytes
_QUEUE = 64  # jobs that may wait
_GRACE_S = 5  # for which a worker may be late with saying that a job was


class JobFailed(ValueError):
    """A job could not be done; says why, in words for the user."""


class Jobs:
    """Runs jobs of one kind (see worker.py), `most` at a time, in processes whose folder is `folder`."""

    def __init__(self, kind: str, monitor: Monitor, most: int, folder: Path):
        self._kind, self._monitor, self._most, self._folder = kind, monitor, most, folder
        self._slots = asyncio.Semaphore(most)
        self._idle: list[asyncio.subprocess.Process] = []
        self._all: set[asyncio.subprocess.Process] = set()
        self._waiting = 0

    async def start(self) -> None:
        """Start the processes, so that the first job need not wait for that."""
        while len(self._all) < self._most:
            self._idle.append(await self._start())

    async def run(self, job: dict, limit_s: float) -> dict:
        """The answer to a job. Raises JobFailed where it cannot be done or takes longer than `limit_s`, and Refusal where too
        many are waiting."""
        if self._waiting >= _QUEUE:
            raise Refusal(503, "Too many videos are being decoded. Try again in a moment.", {"Retry-After": "5"})
        self._waiting += 1
        try:
            async with self._slots:
                answer = await self._run({**job, "limit_s": limit_s})
        finally:
            self._waiting -= 1
        self._monitor.add("c4c_jobs_total", kind=job["kind"], outcome="failed" if "error" in answer else "done")
        if answer.get("no_room"):
            raise Refusal(507, "The server has no room for its temporary files.")
        if "error" in answer:
            raise JobFailed(str(answer["error"]))
        return answer

    async def close(self) -> None:
        """End the processes."""
        for process in list(self._all):
            self._kill(process)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await process.wait()

    async def _run(self, job: dict) -> dict:
        for _ in range(2):  # a process that ended while it was idle is no fault of the job's
            if (answer := await self._answer(await self._take(), job)) is not None:
                return answer
        return {"error": "the process that decodes ended"}

    async def _answer(self, process: asyncio.subprocess.Process, job: dict) -> dict | None:
        """What a process answers; None if it ends instead."""
        try:
            async with asyncio.timeout(job["limit_s"] + _GRACE_S):
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(job).encode() + b"\n")
                await process.stdin.drain()
                answer = json.loads(await process.stdout.readline())
        except (TimeoutError, ValueError, ConnectionError):
            self._kill(process)
            return None
        except BaseException:  # nobody waits for the answer any more, which would be taken for that of the next job
            self._kill(process)
            raise
        self._idle.append(process)
        return answer

    async def _take(self) -> asyncio.subprocess.Process:
        while self._idle:
            if (process := self._idle.pop()).returncode is None:
                return process
            self._all.discard(process)
        return await self._start()

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        self._all.discard(process)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has forked

    async def _start(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "c4c.retrieval.serve.worker", self._kind, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=_LONGEST_ANSWER, cwd=self._folder,
            start_new_session=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._all.add(process)
        return process

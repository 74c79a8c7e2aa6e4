"""A process of jobs.py: forks for every job, and limits the memory and the time of that. It is started for one of

clip       which also probes: whether a browser plays a file as it is, and parts of videos in a form that every browser plays
example    the frames of an uploaded clip or picture
"""

import errno
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

from shards import VideoError

_MEMORY = 6 << 30  # bytes of address space beyond what the process has already
_LARGEST_FILE = 1 << 30  # bytes that may be written


def main() -> None:
    """Answer jobs from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    does = _imported(sys.argv[1])
    while line := sys.stdin.readline():
        answers.write(json.dumps(_forked(does, json.loads(line))) + "\n")
        answers.flush()


def _imported(kind: str) -> dict[str, Callable[[dict], dict]]:
    if kind == "example":
        from c4c.retrieval.serve import example

        return {"example": example.frames}
    from c4c.retrieval.serve import transcode

    return {"probe": transcode.probe, "clip": transcode.clip}


def _forked(does: dict[str, Callable[[dict], dict]], job: dict) -> dict:
    """The answer of a process of its own; an error if that dies or takes longer than the job's `limit_s`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _set_limits(job["limit_s"])
            os.write(writer, json.dumps(_answer(does[job["kind"]], job)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + job["limit_s"]
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (data := os.read(reader, 1 << 16)):
                return json.loads(answer) if answer else {"error": "decoding it failed: the file is damaged"}
            answer += data
        return {"error": f"decoding it took longer than {job['limit_s']:.0f} s"}
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(does: Callable[[dict], dict], job: dict) -> dict:
    try:
        return does(job)
    except MemoryError:
        return {"error": "it needs too much memory to decode"}
    except VideoError as error:
        return {"error": " ".join(str(error).split())[:300]}
    except (ValueError, OSError) as error:  # their words may name files of the server
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return {"error": "there is no room", "no_room": True}
        return {"error": "it cannot be read"}


def _set_limits(seconds: float) -> None:
    with open("/proc/self/statm") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, present + _MEMORY),
        (resource.RLIMIT_CPU, int(seconds) * (os.cpu_count() or 1) + 1),
        (resource.RLIMIT_FSIZE, _LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()

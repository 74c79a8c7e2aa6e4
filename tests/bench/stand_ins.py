"""Parts for bench/gpu.py that end, fail, crash and hang."""

import os
import signal
import subprocess
import sys
import time
import warnings

from bench.gpu_parts.parts import Given, Missing


def ends(given: Given, *, rate: float) -> None:
    given.note(clips_per_s=rate)
    warnings.warn("JPEGs on cuda:0: roi: signal 11; whole pictures are decoded (data.jpeg_crop=whole)", stacklevel=1)


def lacks(given: Given) -> None:
    raise Missing("frisbee is not installed: pip install frisbee")


def fails(given: Given) -> None:
    raise ValueError("no dog to catch it")


def crashes(given: Given) -> None:
    given.note(clips_per_s=7.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(given: Given) -> None:
    """With a child that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    given.note(child=child.pid)
    time.sleep(120)


def crashes_at_exit(given: Given) -> None:
    given.note(clips_per_s=3.0)
    os._exit(9)

"""Ctrl-C reaches every process of a terminal. Those that work for another one leave it to that one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_to_parent() -> Iterator[None]:
    """Processes that this thread starts inside do not get SIGINT, from their first moment on: one that came during their imports
    would end them with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

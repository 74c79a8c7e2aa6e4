"""The limit on a process's memory, and what an error says when it is not enough."""

import ctypes
import errno
import resource
import threading
from contextlib import suppress

import pyarrow as pa

_LIMITS = {"RLIMIT_AS": "-v", "RLIMIT_DATA": "-d"}  # ulimit's letters for them
_ROOM = 80 << 20  # bytes that reading and committing the tables of a split take beside the program itself
_M_ARENA_MAX = -8  # of glibc's mallopt
_NO_THREAD = "can't start new thread", "Failed to launch worker thread"  # Python's words, and Arrow's
# the loader's words, where a package is imported only once it is needed; glibc's dl-load.c and dl-map-segments.h
_NO_LIBRARY = (
    "failed to map segment",
    "annot allocate memory",
    "cannot create shared object descriptor",
    "cannot map zero-fill",
)
_STACK = 1 << 20  # bytes of a thread's stack; 8 MB otherwise


def limit() -> tuple[int, str] | None:
    """The lowest limit on this process's memory, in bytes, and the ulimit option that sets it; None without a limit."""
    limits = [(resource.getrlimit(getattr(resource, name))[0], option) for name, option in _LIMITS.items()]
    return min((one for one in limits if one[0] != resource.RLIM_INFINITY), default=None)


def limit_text() -> str:
    """`; the limit is 600 MB a process (ulimit -v)`, empty without a limit."""
    lowest = limit()
    return f"; the limit is {lowest[0] / 1e6:.0f} MB a process (ulimit {lowest[1]})" if lowest else ""


def is_short(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, or none for another thread or library."""
    # EAGAIN is what libav says where it gets no thread
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN)):
        return True
    if isinstance(error, ImportError) and any(words in str(error) for words in _NO_LIBRARY):
        return True
    return any(words in str(error) for words in _NO_THREAD)


def refuse_short(error: BaseException) -> None:
    """Raise MemoryError if that is what an error comes from: another way to do the same would succeed by chance, with another
    result. Where memory has no limit, it is a damaged file that asks for too much."""
    for one in (error, error.__cause__):
        if one is not None and is_short(one) and (limit() is not None or isinstance(one, BlockingIOError)):
            raise MemoryError(str(error)) from error


def prepare() -> str | None:
    """Where there is a limit, use less of it for each thread. Returns an error text if too little is left to begin: C
    libraries abort the process without a message when they get no memory."""
    lowest = limit()
    if lowest is None:
        return None
    threading.stack_size(_STACK)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with suppress(OSError, AttributeError):  # where it is not glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # each thread would reserve an arena of 64 MB
    with open("/proc/self/statm") as file:
        pages, _, _, _, _, data, *_ = map(int, file.read().split())
    used = (pages if lowest[1] == "-v" else data) * resource.getpagesize()
    if used + _ROOM <= lowest[0]:
        return None
    return (
        f"this process may use {lowest[0] / 1e6:.0f} MB of memory (ulimit {lowest[1]}) and this command takes at least "
        f"{(used + _ROOM) / 1e6:.0f} MB. Raise the limit: ulimit {lowest[1]} {2 * (used + _ROOM) // 1024}"
    )

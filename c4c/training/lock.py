"""One training at a time in a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from shards.storage import is_at

FILE = ".lock"
_LONGEST = 4096  # bytes of a lock file that are read
TAKEN = (errno.EACCES, errno.EAGAIN)  # what the system says of a lock that another has


class RunLock:
    """Held by the process that writes to a run folder. The system frees it when that process ends, however it ends.

    A record lock (fcntl): child processes do not inherit it, so they cannot keep it after a kill.
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._held: int | None = None  # a file descriptor

    def take(self, make: bool = True, wait_s: float = 0.0) -> None:
        """Take the lock, if it is not held by this process already. Raises ValueError that names the process that has it.

        make: also where there is no lock file yet. wait_s: how long to wait for a process that is about to end.
        """
        until = time.monotonic() + wait_s
        while not self._current():
            try:
                descriptor = os.open(self._path, os.O_RDWR | (os.O_CREAT if make else 0), 0o644)
            except FileNotFoundError:
                if make:
                    raise
                return
            if self._lock(descriptor):
                self._drop()
                self._held = descriptor
                sign(descriptor)
            elif time.monotonic() < until:
                os.close(descriptor)
                time.sleep(0.2)
            else:
                holder = signed_by(os.pread(descriptor, _LONGEST, 0))
                os.close(descriptor)
                raise ValueError(
                    f"{self._path.parent} is in use: {holder} is training in it. Wait until it ends, stop it, or choose "
                    "another run.dir"
                )

    def release(self) -> None:
        """Let another process take it."""
        if self._held is not None:
            if self._current():
                with contextlib.suppress(OSError):
                    self._path.unlink()
            self._drop()

    def _current(self) -> bool:
        """Whether what is held is the lock file at the path: the folder may have been moved."""
        return self._held is not None and is_at(self._held, self._path)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks: there this is a note to people only
            return error.errno not in TAKEN
        return True

    def _drop(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def sign(descriptor: int) -> None:
    """Write into an open lock file which process holds it, for `signed_by`."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk is no reason not to hold it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode() + b"\n", 0)


def signed_by(data: bytes) -> str:
    """The process that wrote these first bytes of a lock file, in words; `another process` if they do not say it."""
    try:
        about = json.loads(data)
        return f"process {about['pid']} on {about['host']} (since {about['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""One process at a time: one study in its folder, one attempt at a cell."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

_TAKEN = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """Held until it is released, or all processes that have its file open have ended, however they end.

    Unlike c4c.training.lock.RunLock, which is of a process, it is of an open file (flock): two threads exclude each other, and a
    command that inherits the file keeps the lock although the process that started it was killed.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None

    def take(self) -> bool:
        """Whether it is held now. Some network file systems have no locks: there it always is. Raises OSError."""
        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                os.close(file)
                return False
        self._file = file
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk is no reason not to hold it
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(about).encode() + b"\n", 0)
        return True

    @property
    def file(self) -> int:
        """The descriptor that a command has to inherit to keep the lock. Only while it is held."""
        assert self._file is not None
        return self._file

    def release(self) -> None:
        """Let another take it; a command that inherited it and still runs keeps it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def holder(self) -> str:
        """Who has taken it last, in words."""
        try:
            about = json.loads(self._path.read_bytes()[:4096])
            return f"process {about['pid']} on {about['host']} (since {about['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def is_taken(self) -> bool:
        """Whether somebody holds it now, be it this process."""
        if self._file is not None:
            return True
        try:
            file = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _TAKEN
        finally:
            os.close(file)
        return False

"""One process at a time: one study in its folder, one attempt at a cell."""

import fcntl
import os
from pathlib import Path

from c4c.training.lock import TAKEN, sign, signed_by


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
            if error.errno in TAKEN:
                os.close(file)
                return False
        self._file = file
        sign(file)
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
            return signed_by(self._path.read_bytes())
        except OSError:
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
            return error.errno in TAKEN
        finally:
            os.close(file)
        return False

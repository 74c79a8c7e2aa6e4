"""Files that stay open for reading: as many as the process may have open, the least recently used closed first."""

import errno
import os
import resource
import threading
import weakref
from collections import OrderedDict

from shards import ShardError

_MOST = 256  # files of a pool


class NoMoreFiles(ShardError):
    """The process, or the machine, may open no more files. No video is to blame."""


def _room() -> int:
    """How many files a pool keeps open: the pools of a process take a quarter of what it may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(4, min(_MOST, soft // 4 // max(1, len(_POOLS))))


def limit_reached(error: OSError) -> str | None:
    """What to say where the process may open no more files; None if that is not what is wrong."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    if error.errno == errno.ENFILE:
        return "the machine has no room for another open file (fs.file-max). Close some programs, and run it again"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process may have {soft} files open, and has (ulimit -n). No file is damaged. Raise the limit, up to {hard}: "
        f"ulimit -n {min(hard, max(4096, 4 * soft)) if hard > 0 else 4096}"
    )


class OpenFile:
    """A file open for reading at any place. Closed when the last who holds it lets go, so never under a reading thread."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of the file; fewer only where it ends before, though the system may hand out less at once."""
        data = os.pread(self._descriptor, size, offset)
        while 0 < len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self, close=os.close):  # bound here: where the interpreter ends, `os` may be gone before the file
        if hasattr(self, "_descriptor"):
            close(self._descriptor)


class FilePool:
    """Files that are opened when they are first read. Safe to use from several threads."""

    def __init__(self):
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        _POOLS.add(self)

    def get(self, path: str) -> OpenFile:
        """The file. Raises OSError, and NoMoreFiles where the process may open no more."""
        with self._lock:
            if path not in self._files:
                most = _room()
                while len(self._files) >= most:
                    self._files.popitem(last=False)
                self._files[path] = self._opened(path)
            self._files.move_to_end(path)
            return self._files[path]

    def forget(self, path: str) -> None:
        """Let go of a file, so that it is opened anew when it is next read."""
        with self._lock:
            self._files.pop(path, None)

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._files.clear()

    def _opened(self, path: str) -> OpenFile:
        """The file; where the process may open no more, half of the pool is closed for it."""
        while True:
            try:
                return OpenFile(path)
            except OSError as error:
                if (reason := limit_reached(error)) is None:
                    raise
                if not self._files:
                    raise NoMoreFiles(f"{path} cannot be opened: {reason}") from error
                for _ in range(max(1, len(self._files) // 2)):
                    self._files.popitem(last=False)


_POOLS: weakref.WeakSet[FilePool] = weakref.WeakSet()  # all of the process

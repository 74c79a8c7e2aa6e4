"""A cache of remote files in a folder of bounded size, shared by the processes of a machine.

A piece is a file. It is written under another name and renamed, so that a killed process leaves no partial piece. Space is
reserved before a byte is written, and the least recently used pieces are evicted; a piece that is being written or read is
locked (flock, which the kernel drops with the process, however that ends) and stays. So the folder never holds more than
its bound, and two processes that want the same piece fetch it once.
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards import ShardError
from shards.storage import is_at
from shards.tar import DISK_FULL

_PART = ".part"
_BLOCK = 4096  # bytes that a file system hands out at least
_LOW_WATER = 0.9  # of the bound: a full folder is emptied so far, and is not listed for every piece
_TOUCH = 5.0  # seconds since the last use after which another one is noted
_FULL_WAIT = 60.0  # seconds until a folder full of what is in use is an error


class Full(ShardError):
    """The folder, or its disk, has no room for what has to be in it at once."""


class DiskCache:
    """At most `max_bytes` of pieces in `folder`. Names may hold one folder: set/piece. Safe to use from several threads."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, fetch: Callable[[], bytes], start: int = 0, size: int = -1, total: int = -1) -> bytes:
        """Bytes of a piece, all from `start` on where `size` is -1; `fetch` gets all of it where it is not cached.

        `total`: its length in bytes; a cached piece of another length is fetched again."""
        while True:
            cached = self._read(name, start, size, total)
            if cached is not None:
                return cached
            data = self.bring(name, fetch)
            if data is not None:
                return data[start:] if size < 0 else data[start : start + size]

    def bring(self, name: str, fetch: Callable[[], bytes]) -> bytes | None:
        """Cache the piece. Returns its bytes if they had to be fetched, None if it was cached, by another process for example.

        Raises Full if it is larger than the folder may be, if everything in the folder stays in use, or on a full disk."""
        target = self.folder / name
        part = target.with_name(target.name + _PART)
        target.parent.mkdir(exist_ok=True)
        while not target.exists():
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # whoever else fetches it comes first
                ours = is_at(descriptor, part)
                if target.exists() or not ours:
                    if ours:
                        part.unlink()
                    continue
                data = fetch()
                self._reserve(descriptor, len(data), name)
                _write(descriptor, data)
                os.rename(part, target)
                return data
            except BaseException:
                part.unlink(missing_ok=True)  # its room counts as taken until the folder is next listed
                raise
            finally:
                os.close(descriptor)
        self._touch(target)
        return None

    def _touch(self, path: Path) -> None:
        """Note that it is in use."""
        try:
            if time.time() - path.stat().st_mtime > _TOUCH:
                os.utime(path)
        except FileNotFoundError:
            pass

    def drop(self, name: str) -> None:
        """Have the piece fetched again when it is next wanted."""
        (self.folder / name).unlink(missing_ok=True)

    def _read(self, name: str, start: int, size: int, total: int) -> bytes | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if total >= 0 and status.st_size != total:  # the machine went down before all of it was on disk
                self.drop(name)
                return None
            if time.time() - status.st_mtime > _TOUCH:
                os.utime(descriptor)
            return os.pread(descriptor, status.st_size - start if size < 0 else size, start)
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int, size: int, name: str) -> None:
        """Make the open file `size` bytes long once there is room for them."""
        need = _taken(size)
        if need > self.max_bytes:
            raise Full(
                f"{name} takes {need} bytes, more than {self.folder} may hold ({self.max_bytes}): raise data.local_gb"
            )
        deadline = time.monotonic() + _FULL_WAIT
        while True:
            with self._locked() as counter:
                raw = os.pread(counter, 8, 0)  # at least what is used: what killed processes had reserved counts, too
                used = struct.unpack("<q", raw)[0] if len(raw) == 8 else self.max_bytes
                if used + need > self.max_bytes:
                    used = self._make_room(max(0, min(int(self.max_bytes * _LOW_WATER), self.max_bytes - need)))
                if used + need <= self.max_bytes:
                    os.pwrite(counter, struct.pack("<q", used + need), 0)
                    os.ftruncate(descriptor, size)
                    return
                os.pwrite(counter, struct.pack("<q", used), 0)
            if time.monotonic() > deadline:
                raise Full(
                    f"{self.folder} is full of files that running processes use ({used} of {self.max_bytes} bytes): give it more "
                    "space (data.local_gb)"
                )
            time.sleep(0.02)

    def _make_room(self, most: int) -> int:
        """Evict the least recently used pieces until at most `most` bytes are used. Returns the bytes that are used then."""
        every = []
        for entry in self._entries():
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            every.append((entry.name.endswith(_PART), status.st_mtime, _taken(status.st_size), entry.path))
        used = sum(size for *_, size, _ in every)
        # what a killed process left half-written is of no use; the others by age
        for _, _, size, path in sorted(every, key=lambda e: (not e[0], e[1])):
            if used <= most and not path.endswith(_PART):
                break
            if _removed(path):
                used -= size
        return used

    def _entries(self) -> Iterator[os.DirEntry]:
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    with os.scandir(folder.path) as entries:
                        yield from entries

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _taken(size: int) -> int:
    """Bytes of disk that a file of `size` takes."""
    return -(-size // _BLOCK) * _BLOCK


def _removed(path: str) -> bool:
    """Delete a file unless somebody has it locked."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(descriptor)
    return True


def _write(descriptor: int, data: bytes) -> None:
    view, done = memoryview(data), 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], done)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise Full(
                f"the disk is full ({error}): set data.local_gb below the free space, or use another folder (data.local_dir)"
            ) from error
        raise

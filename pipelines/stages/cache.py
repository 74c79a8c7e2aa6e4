"""Decoded frames, kept from one epoch to the next and shared by the processes of a machine.

A cache is two files: NAME.data, where clips stand one after the other as uint8 [frames, H, W, 3], and NAME.index, with
a header and one entry a video. The name is a hash of everything the pixels depend on, so what was cached for another
data set, rule or size is never found.

A killed process cannot leave a frame that reads wrong: a clip is written to room nobody else has, and then its entry,
which carries a checksum of itself; what was written before a kill is in the kernel's hands and stays whole. Only when
the machine itself goes down may an entry reach the disk without its clip. So an entry carries the machine's boot id,
and one of an earlier boot is believed after the clip's crc32c has been compared.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from crc32c import crc32c

from pipelines.config import CacheConfig

FORMAT = 1
_MAGIC = b"c4c frames\0"
_HEADER = struct.Struct("<11sBQ8s")  # magic, format, first free byte of the data, boot
_HEADER_BYTES = 64
# offset + 1, so that an untouched entry reads as 0; frames, height, width; crc of the clip; boot; crc of the entry
_ENTRY = struct.Struct("<QHHHxxI8sI")
_ENTRY_BYTES = 32
_PAGE = mmap.ALLOCATIONGRANULARITY


class FrameCache:
    """The cached clips of one split under one recipe. Safe to use from several threads and processes.

    `what` is everything the pixels depend on; `clip_bytes` what a clip takes, about. At most `config.max_gb` is used of
    the folder: caches in it that nobody has open are deleted, the longest unused first, to make room for this one.
    """

    def __init__(self, config: CacheConfig, what: dict, videos: int, clip_bytes: int):
        text = json.dumps({"format": FORMAT, "videos": videos, **what}, sort_keys=True)
        self.folder = Path(config.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name = name = "frames-" + hashlib.sha256(text.encode()).hexdigest()[:20]
        self._boot = _boot_id()
        self._lock = threading.Lock()
        self._failed = self._full = False
        limit = int(config.max_gb * 1e9)
        with _locked(self.folder / "lock"):
            others = _make_room(self.folder, name, limit - min(limit, videos * clip_bytes))
            (self.folder / f"{name}.json").write_text(text + "\n")
            self._index = os.open(self.folder / f"{name}.index", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._index, fcntl.LOCK_SH)  # in use; let go when the process ends, however it ends
            self._data = os.open(self.folder / f"{name}.data", os.O_RDWR | os.O_CREAT, 0o644)
            self._prepare(videos)
            self._room = max(0, limit - others)
            size = max(self._room, os.fstat(self._data).st_size, _PAGE)
            os.ftruncate(self._data, size)  # a hole: takes no room until it is written
        os.utime(self.folder / f"{name}.json")
        self._entries = mmap.mmap(self._index, _HEADER_BYTES + videos * _ENTRY_BYTES)
        self._bytes = mmap.mmap(self._data, size, prot=mmap.PROT_READ)
        self._alloc = self.folder / f"{name}.lock"

    def get(self, video: int) -> np.ndarray | None:
        """uint8 [frames, H, W, 3] of a video, in the page cache; None if it is not there."""
        at = _HEADER_BYTES + video * _ENTRY_BYTES
        raw = self._entries[at : at + _ENTRY_BYTES]
        start, frames, height, width, crc, boot, check = _ENTRY.unpack(raw)
        if start == 0 or check != crc32c(raw[:-4]):
            return None
        size = frames * height * width * 3
        if start - 1 + size > len(self._bytes):
            return None
        clip = np.frombuffer(self._bytes, np.uint8, size, start - 1).reshape(frames, height, width, 3)
        if boot != self._boot:
            if crc32c(clip.data) != crc:
                return None
            self._write_entry(video, start - 1, clip.shape, crc)
        return clip

    def put(self, video: int, clip: np.ndarray) -> bool:
        """Keep a clip, if there is room. A full disk ends the filling with a warning, not the run."""
        if self._failed or clip.nbytes == 0 or max(clip.shape) >= 2**16:
            return False
        try:
            start = self._allocate(clip.nbytes)
            if start is None:
                self._full = True
                return False
            clip = np.ascontiguousarray(clip)
            view, done = memoryview(clip.data).cast("B"), 0
            while done < len(view):
                done += os.pwrite(self._data, view[done:], start + done)
            self._write_entry(video, start, clip.shape, crc32c(clip.data))
        except OSError as error:
            self._failed = True
            warnings.warn(f"no more frames are cached in {self.folder}: {error}", stacklevel=2)
            return False
        return True

    @property
    def used_bytes(self) -> int:
        """Bytes of clips written so far, by all processes."""
        return self._header()[2]

    @property
    def has_room(self) -> bool:
        """Whether it takes more clips."""
        return not self._failed and not self._full and self.used_bytes < self._room

    def close(self) -> None:
        """Let go of the files. Arrays that `get` gave stay good until they are dropped."""
        with self._lock:
            if self._index >= 0:
                fcntl.flock(self._index, fcntl.LOCK_UN)  # the mapping holds the file open
            for name in ("_index", "_data"):
                if getattr(self, name) >= 0:
                    os.close(getattr(self, name))
                    setattr(self, name, -1)
            self._failed = True

    def _header(self) -> tuple:
        return _HEADER.unpack(self._entries[: _HEADER.size])

    def _prepare(self, videos: int) -> None:
        raw = os.pread(self._index, _HEADER.size, 0)
        size = _HEADER_BYTES + videos * _ENTRY_BYTES
        intact = len(raw) == _HEADER.size and _HEADER.unpack(raw)[:2] == (_MAGIC, FORMAT)
        if not intact or os.fstat(self._index).st_size != size:
            os.ftruncate(self._index, 0)
            os.ftruncate(self._index, size)
            self._write_free(0)
        elif _HEADER.unpack(raw)[3] != self._boot:  # after a crash of the machine the header may be older than entries
            self._write_free(max(_HEADER.unpack(raw)[2], self._end_of_entries(videos)))

    def _end_of_entries(self, videos: int) -> int:
        kind = np.dtype(
            {"names": ["start", "shape"], "formats": ["<u8", ("<u2", 3)], "offsets": [0, 8], "itemsize": 32}
        )
        entries = np.memmap(self.folder / f"{self._name}.index", kind, "r", _HEADER_BYTES, videos)
        ends = entries["start"].astype(np.int64) - 1 + entries["shape"].astype(np.int64).prod(axis=1) * 3
        return int(ends.max(initial=0))

    def _write_free(self, start: int) -> None:
        os.pwrite(self._index, _HEADER.pack(_MAGIC, FORMAT, start, self._boot), 0)

    def _allocate(self, size: int) -> int | None:
        """The first byte of `size` free ones, from now on this clip's; None if they do not fit."""
        with self._lock, _locked(self._alloc):
            start = self._header()[2]
            if start + size > self._room:
                return None
            self._write_free(start + size)
        return start

    def _write_entry(self, video: int, start: int, shape: tuple, crc: int) -> None:
        body = _ENTRY.pack(start + 1, *shape[:3], crc, self._boot, 0)[:-4]
        os.pwrite(self._index, body + struct.pack("<I", crc32c(body)), _HEADER_BYTES + video * _ENTRY_BYTES)


def _make_room(folder: Path, name: str, limit: int) -> int:
    """Delete caches that are not open, oldest first, until those beside `name` hold at most `limit` bytes.

    Returns what they hold then."""
    others = [p for p in folder.glob("frames-*.json") if p.stem != name]
    held = {p: _blocks(p.with_suffix(".data")) for p in others}
    for path in sorted(others, key=lambda p: p.stat().st_mtime):
        if sum(held.values()) <= limit:
            break
        if _unused(path.with_suffix(".index")):
            for suffix in (".index", ".data", ".lock", ".json"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            held[path] = 0
    return sum(held.values())


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def _unused(path: Path) -> bool:
    if not path.exists():
        return True
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _boot_id() -> bytes:
    """8 bytes that differ after every start of the machine."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        text = os.urandom(8)  # nothing is believed without its checksum
    return hashlib.sha256(text).digest()[:8]

"""A packed split on an object store or web server, read through a bounded folder of this machine.

Small tars are fetched as a whole. Of large ones only the bytes of the wanted videos are fetched, in pieces of at most PIECE
bytes: in random order a step needs little of a large shard, and in the order of the shard nothing is fetched twice.
"""

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from crc32c import crc32c

from shards import ShardError, first_line
from shards.disk_cache import DiskCache
from shards.schema import Video
from shards.storage import filesystem, is_final, is_refused, status_of, unreachable
from shards.summary import read_summary
from shards.user_cache import user_cache

T = TypeVar("T")
_SHORTEST = 1.0  # seconds that a request gets at least, also when its server has been silent for long
_IDLE = 10.0  # seconds after which what failed before says nothing of a new request
WHOLE = 8 << 20  # bytes of the largest tar that is fetched whole
PIECE = 4 << 20  # bytes of the largest piece of another
_PAUSES = 0.1, 2.0  # seconds before the second try, and at most before any
_LATER = (
    "When the server works again, run.resume=auto continues from the last checkpoint; data.server_timeout_s sets how long "
    "to wait."
)
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, MemoryError)


class Unreachable(ShardError):
    """A server that has failed for so long that the run should end."""


class Refused(Unreachable):
    """A server that does not let this user read: every other file would be refused as well."""


@dataclass(frozen=True)
class Local:
    """Where pieces of remote splits are kept: at most `max_gb` (1e9 bytes each) in `folder` (None: the user's cache
    folder). `patience_s`: seconds that a server may fail or be silent before it counts as gone."""

    folder: Path | None = None
    max_gb: float = 20.0
    patience_s: float = 300.0

    def pieces(self) -> DiskCache:
        """The cache of pieces on disk."""
        return DiskCache(self.folder or user_cache() / "shards", int(self.max_gb * 1e9))


class RemoteFiles:
    """The files of the split at `path`, a UPath. Safe to use from several threads.

    Raises ShardError where there is no split, or it may not be read; Unreachable.
    """

    def __init__(self, path, local: Local):
        self.path, self._patience = path, local.patience_s
        self._fs, self._root = filesystem(path), path.path.rstrip("/")
        self._server = Server.of(path)
        self._server.clear()
        self.pieces = local.pieces()
        self.info = read_summary(self._get("dataset.json"), path)
        # another split, or this one packed anew, never finds these pieces: tables' checksums tell where in the tars videos stand
        layout = f"{crc32c(json.dumps(self.info['shards'], sort_keys=True).encode()):08x}"
        self._set = "-".join([*(_plain(self.info[what]) for what in ("name", "split", "digest")), layout])
        self._tars = {shard["name"]: shard["bytes"] for shard in self.info["shards"]}

    def small_file(self, name: str) -> bytes:
        """A small file: a sample table, say."""
        return self.pieces.read(f"{self._set}/{name}", lambda: self._get(name))

    def forget(self, name: str) -> None:
        """Have a small file fetched again."""
        self.pieces.drop(f"{self._set}/{name}")

    def read(self, video: Video, offset: int, size: int) -> bytes:
        """Bytes of the stored file of a video; fewer than asked for where it ends before."""
        size = min(size, video.size - offset)
        out = []
        for name, tar, start, length in self._pieces_of(video, offset, offset + size):
            first = max(0, video.offset + offset - start)
            last = min(length, video.offset + offset + size - start)
            get = partial(self._get, tar, start, length)
            out.append(self.pieces.read(name, get, first, last - first, length))
        return out[0] if len(out) == 1 else b"".join(out)

    def fetch(self, video: Video, low: int, high: int) -> int:
        """Have bytes [low, high) of the stored file here. Returns the bytes of their pieces."""
        total = 0
        if low == high:
            return 0
        for name, tar, start, length in self._pieces_of(video, low, high):
            self.pieces.bring(name, partial(self._get, tar, start, length))
            total += length
        return total

    def drop(self, video: Video) -> None:
        """Have the video fetched again when it is next wanted."""
        for name, *_ in self._pieces_of(video, 0, video.size):
            self.pieces.drop(name)

    def _pieces_of(self, video: Video, low: int, high: int) -> list[tuple[str, str, int, int]]:
        """(name of the piece, name of the tar, first byte, bytes) of what holds bytes [low, high) of a stored file."""
        tar, size = f"{video.shard}.tar", self._tars[video.shard]
        if size <= WHOLE:
            return [(f"{self._set}/{tar}", tar, 0, size)]
        pieces = []
        for at in range(low // PIECE * PIECE, max(high, low + 1), PIECE):
            start, length = video.offset + at, min(PIECE, video.size - at)
            pieces.append((f"{self._set}/{video.shard}.{start}.{length}", tar, start, length))
        return pieces

    def _get(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else start + size

        def ask(timeout_s: float) -> bytes:
            bound = {"timeout": timeout_s} if getattr(self._fs, "async_impl", False) else {}  # fsspec's `sync` takes it
            data = self._fs.cat_file(f"{self._root}/{name}", start=start, end=end, **bound)
            if size is not None and len(data) > size:  # a server that does not know ranges sends all
                data = data[start:end]
            if size is not None and len(data) < size:
                raise OSError(f"only {len(data)} of {size} bytes came")
            return data

        return patiently(ask, f"{self.path}/{name}", self._patience, self._server)


class Server:
    """When a server last answered, as all threads of this process see it: one that waits does so for all."""

    _known: ClassVar[dict[str, "Server"]] = {}
    _lock = threading.Lock()

    def __init__(self):
        self._since: float | None = None  # the first request after the last answer
        self._pending, self._ended = 0, 0.0
        self.error = "no answer"  # the last one

    @classmethod
    def of(cls, path) -> "Server":
        """The one that all splits of that host or bucket share."""
        with cls._lock:
            return cls._known.setdefault("/".join(str(path).split("/")[:3]), cls())

    @contextmanager
    def pending_request(self) -> Iterator[None]:
        """While a request is under way."""
        with self._lock:
            if self._since is None or self._idle():
                self._since = time.monotonic()
            self._pending += 1
        try:
            yield
        finally:
            with self._lock:
                self._pending, self._ended = self._pending - 1, time.monotonic()

    def _idle(self) -> bool:
        return not self._pending and time.monotonic() - self._ended > _IDLE

    def clear(self) -> None:
        """It answered, or somebody starts anew."""
        with self._lock:
            self._since = None

    def is_lost(self, patience_s: float) -> bool:
        """Whether it has just been waited for in vain for so long: another request need not wait as well."""
        with self._lock:
            return self._since is not None and not self._idle() and time.monotonic() - self._since > patience_s

    def silent_s(self) -> float:
        """Seconds since the first request after the last answer."""
        with self._lock:
            return time.monotonic() - self._since if self._since is not None else 0.0


def _plain(text: str) -> str:
    """Part of a folder's name."""
    return re.sub(r"[^\w-]", "_", text)[:40]


def patiently(action: Callable[[float], T], what: str, patience_s: float, server: Server) -> T:
    """Do it, again and again if it fails; `action` is given the seconds it may take. Raises ShardError if it never can
    succeed, Unreachable once this, or everything asked of the server, has failed for `patience_s`."""
    started, pause = time.monotonic(), _PAUSES[0]

    def waited() -> float:
        return max(time.monotonic() - started, server.silent_s())

    while True:
        if server.is_lost(patience_s):
            raise Unreachable(
                f"{what} cannot be read: its server has failed for {waited():.0f} s ({server.error}). {_LATER}"
            )
        try:
            with server.pending_request():
                answer = action(max(_SHORTEST, patience_s - waited()))
            server.clear()
            return answer
        except _BUGS:
            raise
        except Exception as error:  # each library has its own
            status, server.error = status_of(error), first_line(error)
            if status is not None and status < 500:
                server.clear()
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise ShardError(f"{what} is missing") from error
            refused = is_refused(error)
            if refused or is_final(status):
                kind = Refused if refused or status in (401, 403) else ShardError
                raise kind(
                    f"{what} may not be read: {first_line(error)}. Check the address and the credentials"
                ) from error
            if waited() + pause > patience_s:
                failure = "cannot be reached" if status is None and unreachable(error) else "cannot be read"
                raise Unreachable(
                    f"{what} {failure}, for {waited():.0f} s now ({first_line(error)}). {_LATER}"
                ) from error
        time.sleep(pause * random.uniform(0.5, 1.0))  # not all threads at once
        pause = min(2 * pause, _PAUSES[1])

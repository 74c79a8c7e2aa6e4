"""Where videos come from and where shards go: files, or whatever fsspec can open (s3://, gs://, hf://, https://).

Remote sources are copied to a nameless temporary file, so that memory use stays small and a killed process leaves nothing
behind. Remote outputs are made in such files and uploaded as a whole: an object store shows an object only once it is
complete.
"""

import errno
import fcntl
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shards import ShardError, VideoError, first_line
from shards.tar import DISK_FULL, UNSUPPORTED, commit, naming, sync_and_close

_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
MISSING = "the file is missing"  # why a video is rejected that has no file
_TRIES = 4
_PAUSE = 0.5  # seconds before the second try; doubles for each further one
_SILENCE = 60  # seconds without a byte after which an http server counts as gone

# what libraries raise when no server answers, besides Python's own ConnectionError and TimeoutError
_UNREACHABLE = {"ClientConnectionError", "HTTPClientError", "TransportError", "gaierror"}


def place(text: str):
    """A `Path`, or a `UPath` where `text` is a URL. Raises ShardError if what its protocol needs is not installed."""
    if "://" not in text:
        return Path(text)
    from upath import UPath

    try:
        path = UPath(text)
    except ValueError as error:
        raise ShardError(
            f"{text}: {error}. Use a path, or a URL of s3://, gs://, hf://, http:// or https://"
        ) from error
    filesystem(path)
    return path


def is_remote(path) -> bool:
    """Whether it is a `UPath` of anything but the local file system."""
    return getattr(path, "protocol", "") not in ("", "file", "local")


# ---- sources ----


@contextmanager
def opened(path, on_ready: Callable[[int], None] = lambda size: None) -> Iterator[BinaryIO]:
    """The source at `path` (`Path` or `UPath`) as a seekable file; `on_ready` is told its size in bytes before a byte
    of it is read here.

    Raises VideoError where the fault is the file's own (it is missing, or its server refuses it): the video is
    rejected. Raises ShardError where every other file would fail as well (nobody answers, no permission to enter).
    """
    if is_remote(path):
        with tempfile.TemporaryFile(prefix="c4c-") as copy:
            _retried(lambda: _download(path, copy), path)
            on_ready(copy.seek(0, os.SEEK_END))
            copy.seek(0)
            yield copy
        return
    path = Path(getattr(path, "path", path))
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            on_ready(status.st_size)
        elif not stat.S_ISDIR(status.st_mode):  # a pipe would be waited for
            raise VideoError("it is not a regular file")
        file = open(path, "rb")  # noqa: SIM115 closed below
    except FileNotFoundError as error:
        raise VideoError(MISSING) from error
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"the file cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with file:
        yield file


def _download(path, file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
    filesystem(path).get_file(path.path, f"/proc/self/fd/{file.fileno()}")


def filesystem(path):
    """The fsspec file system of a `UPath`. Raises ShardError if the package for its protocol is not installed."""
    options: dict = {}
    try:
        if path.protocol in ("http", "https"):
            import aiohttp
            import fsspec

            # fsspec's own limit is five minutes for the whole file, however large
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)}}
            return fsspec.filesystem(path.protocol, **(options | dict(path.storage_options)))
        return path.fs
    except ImportError as error:
        package = _PACKAGES.get(path.protocol, f"of fsspec for {path.protocol}")
        raise ShardError(f"{path.protocol}:// needs the package {package}: pip install {package}") from error


def _retried(action: Callable[[], object], path) -> None:
    """Run `action`, several times if it fails. An answer, even a bad one, concerns one file: its video is rejected. Without
    any answer the run ends, instead of rejecting every video that is left."""
    for wait in [_PAUSE * 2**n for n in range(_TRIES - 1)] + [None]:
        try:
            action()
            return
        except (ShardError, VideoError):
            raise
        except Exception as error:  # each library has its own
            status = status_of(error)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            if isinstance(error, FileNotFoundError):
                raise VideoError(MISSING) from error
            refused = is_refused(error)
            if refused and path.protocol not in ("http", "https"):
                raise ShardError(f"access to {path} is denied: {first_line(error)}. Check the credentials") from error
            if wait is not None and not (refused or is_final(status)):
                time.sleep(wait)
                continue
            if status is None and not refused and unreachable(error):
                raise ShardError(
                    f"{path} cannot be reached ({first_line(error)}; {_TRIES} tries). Committed shards are kept: run the same "
                    "command again when the network is back. If that server is gone for good, take its videos out of "
                    "the annotations."
                ) from error
            reason = f"the server answers {status}" if status else f"the file cannot be read ({first_line(error)})"
            raise VideoError(reason) from error


def status_of(error: Exception) -> int | None:
    """The HTTP status that a library's error carries; None if there is none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(answer, "status_code", None)


def is_refused(error: Exception) -> bool:
    """Whether a library says that these credentials, or none, do not suffice."""
    return isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"  # botocore's


def is_final(status: int | None) -> bool:
    """Whether asking again cannot help: the client's mistake, but for 408 (request timeout) and 429 (too many requests)."""
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def unreachable(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, means that no server answered."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or names & _UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- open files ----


def is_at(descriptor: int, path: str | Path) -> bool:
    """Whether an open file is the one that has this name now: it may have been moved or deleted, and another put in its place."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# ---- outputs ----


def output(path) -> "Folder | Bucket":
    """The split to be written at `path`. Raises ShardError where nothing can be written."""
    if not is_remote(path):
        return Folder(Path(getattr(path, "path", path)))
    if path.protocol in ("http", "https"):
        raise ShardError(f"--out {path}: a web server cannot be written to; choose a folder, s3://, gs:// or hf://")
    return Bucket(path)


class Folder:
    """A folder of the file system, which may be shared by many machines."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Make the folder if it does not exist."""
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self, part: tuple[int, int] | None) -> Iterator[None]:
        """One packer a folder, or one for each part: the kernel drops the lock with the process, however that ends."""
        with _lock(self.path, ".lock", fcntl.LOCK_SH if part else fcntl.LOCK_EX):
            if part is None:
                yield
                return
            with _lock(self.path, f".lock.{part[0]}of{part[1]}", fcntl.LOCK_EX):
                yield

    def listing(self) -> dict[str, int]:
        """{name: bytes} of its files."""
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def sweep(self, tag: str) -> None:
        """Remove what killed packers of that tag (all of them, if it is empty) left half-written."""
        for leftover in self.path.glob(f".*.{tag}*.tmp"):
            leftover.unlink(missing_ok=True)
        if not tag:
            for lock in self.path.glob(".lock.*"):
                lock.unlink(missing_ok=True)

    def draft(self, name: str, tag: str) -> BinaryIO:
        """A file to be given to `commit`, or closed. Its name is nobody else's."""
        return open(self.path / f".{name}.{tag}{uuid.uuid4().hex[:12]}.tmp", "w+b")

    def commit(self, file: BinaryIO, name: str) -> None:
        """Put a draft into place, once its bytes are on disk."""
        with naming(self.path / name):
            file.flush()
        sync_and_close(file)
        commit(Path(file.name), self.path / name)

    def discard(self, file: BinaryIO) -> None:
        """Delete a draft."""
        Path(file.name).unlink(missing_ok=True)
        file.close()  # fails on a full disk: it writes what is left

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """A file, to be read and closed."""
        return open(self.path / name, "rb")

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        (self.path / name).unlink(missing_ok=True)


@contextmanager
def _lock(folder: Path, name: str, kind: int) -> Iterator[None]:
    with open(folder / name, "a+") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"{folder} is being packed by another process: wait for it, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield


class Bucket:
    """A prefix of an object store. Nothing locks it: two packers of one split do the work twice, which does no harm,
    since objects appear as a whole and their bytes are the same."""

    def __init__(self, path):
        self.path, self._fs, self._root = path, filesystem(path), path.path.rstrip("/")

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Object stores have no folders."""

    @contextmanager
    def locked(self, part: tuple[int, int] | None) -> Iterator[None]:
        """Nothing to do: object stores have no locks."""
        yield

    def listing(self) -> dict[str, int]:
        """{name: bytes} of its objects. Raises ShardError if it cannot be listed."""
        sizes: dict[str, int] = {}

        def ask() -> None:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=True)
            sizes.update({e["name"].rsplit("/", 1)[-1]: e["size"] for e in entries if e["type"] == "file"})

        try:
            _retried(ask, self.path)
        except VideoError as error:  # nothing is there yet
            if not self._is_absence(error):
                raise ShardError(f"{self.path}: {error}") from error
        return sizes

    def sweep(self, tag: str) -> None:
        """Nothing to do: drafts have no names."""

    def draft(self, name: str, tag: str) -> BinaryIO:
        """A file to be given to `commit`, or closed."""
        return tempfile.TemporaryFile(prefix="c4c-")

    def commit(self, file: BinaryIO, name: str) -> None:
        """Upload a draft. Raises ShardError if that is refused."""
        file.flush()
        self._do(lambda: self._fs.put_file(f"/proc/self/fd/{file.fileno()}", f"{self._root}/{name}"))
        file.close()

    def discard(self, file: BinaryIO) -> None:
        """Delete a draft."""
        file.close()

    def read(self, name: str) -> bytes:
        """The bytes of an object."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """A copy of an object, to be read and closed. Raises FileNotFoundError if there is none."""
        file = tempfile.TemporaryFile(prefix="c4c-")  # noqa: SIM115 the caller closes it
        try:
            self._do(lambda: _download(self.path / name, file))
        except ShardError as error:
            file.close()
            if self._is_absence(error.__cause__):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{name}") from error
            raise
        file.seek(0)
        return file

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        self._fs.invalidate_cache()
        if self._fs.exists(f"{self._root}/{name}"):
            self._do(lambda: self._fs.rm_file(f"{self._root}/{name}"))

    @staticmethod
    def _is_absence(error: BaseException | None) -> bool:
        """Whether the VideoError that `_retried` raised means that there is no such object."""
        return error is not None and isinstance(error.__cause__, FileNotFoundError)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            _retried(action, self.path)
        except VideoError as error:
            raise ShardError(f"{self.path}: {error}") from error


def write(target: Folder | Bucket, name: str, data: bytes | str, tag: str = "") -> None:
    """Write a whole file so that a reader sees either the old one or the new one."""
    file = target.draft(name, tag)
    try:
        with naming(f"{target}/{name}"):
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
        target.commit(file, name)
    except OSError:
        with suppress(OSError, ValueError):
            target.discard(file)
        raise

"""One WebDataset tar and DALI's index of it, written so that equal input gives equal bytes."""

import errno
import io
import os
import re
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import quote, unquote

_INDEX_VERSION = "v1.2"  # of nvidia.dali.fn.readers.webdataset

# what network and user-space file systems answer to a sync or a lock that they do not have
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.ENOLCK}

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no fault of the video that is being written

MAX_KEY = 1024  # bytes
_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def safe_key(name: str) -> str:
    """`name` as a WebDataset key: letters, digits, `-` and `_` stay, all else becomes %XX (dots would end the key), and
    so does the first letter of a name that Windows keeps for itself (CON, NUL, ...).

    Raises ValueError for a name that is empty, longer than 1024 bytes when escaped, or not Unicode.
    """
    if not name:
        raise ValueError("a video needs a name")
    try:
        key = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise ValueError(f"its name is not valid Unicode ({error.reason})") from error
    if len(key) > MAX_KEY:
        raise ValueError(f"its name is too long: {len(key)} bytes when escaped, {MAX_KEY} at most")
    return f"%{ord(key[0]):02X}{key[1:]}" if key.lower() in _WINDOWS else key


def key_to_name(key: str) -> str:
    """Undo `safe_key`."""
    return unquote(key)


def safe_extension(path: str | Path) -> str:
    """The file's extension in lower case where it is a plain one, else `mp4`."""
    extension = Path(path).suffix[1:].lower()
    return extension if re.fullmatch(r"[a-z0-9]{1,8}", extension) and extension != "json" else "mp4"


class Readable(Protocol):
    """A seekable file of bytes, as far as a `TarWriter` needs it."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of any file."""

    def read(self, size: int, /) -> bytes:
        """As of any file."""


class TarWriter:
    """Writes samples into a tar, at a path or into a file, and remembers where each member's bytes are."""

    def __init__(self, target: Path | BinaryIO):
        self._owned = isinstance(target, Path)
        self._file: BinaryIO = open(target, "wb") if isinstance(target, Path) else target  # noqa: SIM115 closed in close()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._index: list[str] = []

    def add(self, key: str, members: Mapping[str, bytes | Readable]) -> dict[str, int]:
        """Append one sample, {extension: bytes or a seekable file}, whole or not at all. Returns {extension: offset of
        its first byte}."""
        start = self._tar.offset
        try:
            return self._add(key, members)
        except Exception:
            self._file.seek(start)
            self._file.truncate()
            self._tar.offset = start
            raise

    def _add(self, key: str, members: Mapping[str, bytes | Readable]) -> dict[str, int]:
        offsets, line = {}, []
        for extension, data in members.items():
            file: Readable = io.BytesIO(data) if isinstance(data, bytes) else data
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = file.seek(0, io.SEEK_END), 0o644
            file.seek(0)
            self._tar.addfile(info, cast(BinaryIO, file))
            blocks = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            offsets[extension] = self._tar.offset - blocks
            line.append(f"{extension} {offsets[extension]} {info.size} {info.name}")
        self._index.append(" ".join(line))
        return offsets

    def close(self) -> None:
        """End the archive; one opened here is then on disk, a file that was given stays open."""
        self._tar.close()
        if self._owned:
            sync_and_close(self._file)

    def index(self) -> str:
        """The text of DALI's index file."""
        return index_text(self._index)


def index_text(lines: list[str]) -> str:
    """The text of an index file: DALI's head line, and a line a sample."""
    return "\n".join([f"{_INDEX_VERSION} {len(lines)}", *lines]) + "\n"


def read_index(path: Path) -> dict[str, tuple[int, int]]:
    """{member name: (offset, size)} from an index file. Raises ValueError if it is not one."""
    head, *lines = path.read_text().splitlines() or [""]
    if head.split() != [_INDEX_VERSION, str(len(lines))]:
        raise ValueError(f"the first line is {head!r}, not '{_INDEX_VERSION} {len(lines)}'")
    out = {}
    for line in lines:
        words = line.split(" ")
        for _, offset, size, name in zip(*[iter(words)] * 4, strict=True):
            out[name] = int(offset), int(size)
    return out


def read_members(path: Path) -> dict[str, tuple[int, int]]:
    """{member name: (offset, size)} of the members whose headers are whole. Raises tarfile.TarError if it is cut short."""
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:  # without, it ends in silence at a damaged header
        return {m.name: (m.offset_data, m.size) for m in tar}


@contextmanager
def naming(path, kinds: set[int] | None = None) -> Iterator[None]:
    """An OSError in here that names no file is given this one: a write that fails does not say where.

    kinds: error numbers that are meant; None: all.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and (kinds is None or error.errno in kinds):
            raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
        raise


def sync_and_close(file, path=None) -> None:
    """`path`: what the file becomes, which errors name; None: it keeps its name."""
    with naming(path or file.name):
        file.flush()
        _sync(file.fileno())
        file.close()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def draft_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses: machines that share a disk share pids."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file so that a reader sees either the old one or the new one."""
    temporary = draft_name(path)
    file = open(temporary, "wb")  # noqa: SIM115 closed in sync_and_close()
    try:
        with naming(path):
            file.write(data.encode() if isinstance(data, str) else data)
            sync_and_close(file, path)
        commit(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()
        raise


def commit(temporary: Path, path: Path) -> None:
    """Rename, and make the rename itself survive a power cut."""
    with naming(path):
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            _sync(folder)
        finally:
            os.close(folder)

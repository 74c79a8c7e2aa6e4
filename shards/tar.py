"""One WebDataset tar and DALI's index of it, written so that equal input gives equal bytes."""

import errno
import io
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

_INDEX_VERSION = "v1.2"  # of nvidia.dali.fn.readers.webdataset

# what network and user-space file systems answer to a sync or a lock that they do not have
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.ENOLCK}


def safe_key(name: str) -> str:
    """`name` as a WebDataset key: letters, digits, `-` and `_` stay, all else becomes %XX (dots would end the key).

    Raises ValueError for an empty name.
    """
    if not name:
        raise ValueError("a video needs a name")
    return quote(name, safe="").replace(".", "%2E").replace("~", "%7E")


def key_to_name(key: str) -> str:
    """Undo `safe_key`."""
    return unquote(key)


def safe_extension(path: str | Path) -> str:
    """The file's extension in lower case where it is a plain one, else `mp4`."""
    extension = Path(path).suffix[1:].lower()
    return extension if re.fullmatch(r"[a-z0-9]{1,8}", extension) and extension != "json" else "mp4"


class TarWriter:
    """Writes samples into a tar at `path` and remembers where each member's bytes are."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 closed in close()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._index: list[str] = []

    def add(self, key: str, members: dict[str, bytes | BinaryIO]) -> dict[str, int]:
        """Append one sample, {extension: bytes or a seekable file}. Returns {extension: offset of its first byte}."""
        offsets, line = {}, []
        for extension, data in members.items():
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = file.seek(0, io.SEEK_END), 0o644
            file.seek(0)
            self._tar.addfile(info, file)
            blocks = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            offsets[extension] = self._tar.offset - blocks
            line.append(f"{extension} {offsets[extension]} {info.size} {info.name}")
        self._index.append(" ".join(line))
        return offsets

    def close(self) -> None:
        """End the archive and wait until it is on disk."""
        self._tar.close()
        sync_and_close(self._file)

    def index(self) -> str:
        """The text of DALI's index file."""
        return index_text(self._index)


def index_text(lines: list[str]) -> str:
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


def sync_and_close(file) -> None:
    file.flush()
    _sync(file.fileno())
    file.close()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file so that a reader sees either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file = open(temporary, "wb")  # noqa: SIM115 closed in sync_and_close()
    file.write(data.encode() if isinstance(data, str) else data)
    sync_and_close(file)
    commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Rename, and make the rename itself survive a power cut."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        _sync(folder)
    finally:
        os.close(folder)

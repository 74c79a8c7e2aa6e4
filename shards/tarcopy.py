"""Members of one tar written into another without their bytes passing through this process, and whole files likewise."""

import errno
import fcntl
import os
import shutil
import tarfile
from pathlib import Path

from shards.tar import index_text, sync_and_close

_FICLONE = 0x40049409  # Linux: share the blocks of another file until either is written to
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EMLINK, errno.ENOTTY}


class TarCopier:
    """Writes a tar with the bytes that `shards.tar.TarWriter` writes, its members taken from places in other files."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed in close()
        self._offset = 0
        self._index: list[str] = []

    def add(self, key: str, members: dict[str, bytes | tuple[int, int, int]]) -> dict[str, int]:
        """Append one sample: {extension: bytes, or (file descriptor, offset, size)}. Returns {extension: offset}."""
        offsets, line = {}, []
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data) if isinstance(data, bytes) else data[2], 0o644
            self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            offsets[extension] = self._offset
            if isinstance(data, bytes):
                self._write(data)
            else:
                copy_range(data[0], data[1], self._file.fileno(), data[2])
                self._offset += data[2]
            self._write(bytes(-info.size % tarfile.BLOCKSIZE))
            line.append(f"{extension} {offsets[extension]} {info.size} {info.name}")
        self._index.append(" ".join(line))
        return offsets

    def close(self) -> None:
        """End the archive and wait until it is on disk."""
        end = self._offset + 2 * tarfile.BLOCKSIZE
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        sync_and_close(self._file)

    def index(self) -> str:
        """The text of DALI's index file."""
        return index_text(self._index)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take less than all
            written = self._file.write(view)
            self._offset += written
            view = view[written:]


def copy_range(source: int, offset: int, target: int, size: int) -> None:
    """Append `size` bytes at `offset` of one file to another (both descriptors). Raises OSError if they are not there."""
    while size:
        try:
            done = os.copy_file_range(source, target, size, offset)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            done = os.sendfile(target, source, offset, size)
        if not done:
            raise OSError(errno.EIO, f"the file ends {size} bytes before it should")
        offset, size = offset + done, size - done


def link_or_copy(source: Path, target: Path, copy: bool = False) -> str:
    """Make `target` a file with the bytes of `source`, sharing its blocks ("reflink") or the file itself ("link") where
    the file system can, unless `copy`. Returns "reflink", "link" or "copy"."""
    if copy:
        shutil.copyfile(source, target)
        return "copy"
    with open(source, "rb") as old, open(target, "wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return "reflink"
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    target.unlink()
    try:
        os.link(source, target)
        return "link"
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    shutil.copyfile(source, target)
    return "copy"

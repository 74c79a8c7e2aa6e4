"""Members of one tar written into another without their bytes passing through this process, and whole files likewise."""

import errno
import fcntl
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from crc32c import crc32c

from shards.schema import JSON_CRCS, Video
from shards.table import Table
from shards.tar import DISK_FULL, index_text, naming, read_index, sync_and_close

_FICLONE = 0x40049409  # Linux: share the blocks of another file until either is written to
_SHARDS_OPEN = 16  # of which samples are taken; a table of 256 videos takes about 3 MB
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EMLINK, errno.ENOTTY}


# of a sample, {extension: bytes, or where they are: (file descriptor, offset, size)}
Members = Mapping[str, bytes | tuple[int, int, int]]


class TarCopier:
    """Writes a tar with the bytes that `shards.tar.TarWriter` writes, its members taken from places in other files.

    It is written at `path`, to become `target`, which errors name.
    """

    def __init__(self, path: Path, target: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed in close()
        self._path, self._target = path, target
        self._offset = 0
        self._index: list[str] = []

    def add(self, key: str, members: Members) -> dict[str, int]:
        """Append one sample. Returns {extension: offset of its first byte}."""
        offsets, line = {}, []
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data) if isinstance(data, bytes) else data[2], 0o644
            self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            offsets[extension] = self._offset
            if isinstance(data, bytes):
                self._write(data)
            else:
                with naming(self._target, DISK_FULL):
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
        sync_and_close(self._file, self._target)

    def discard(self) -> None:
        """Close and delete what is written so far, after an error."""
        self._file.close()  # unbuffered: it writes nothing
        self._path.unlink(missing_ok=True)

    def index(self) -> str:
        """The text of DALI's index file."""
        return index_text(self._index)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take less than all
            with naming(self._target):
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


def copy_file(source: Path, target: Path) -> None:
    """Make `target` a file with the bytes of `source`. Raises OSError, which names the one that is to blame."""
    with open(source, "rb") as old, open(target, "wb") as new, naming(source), naming(target, DISK_FULL):
        copy_range(old.fileno(), 0, new.fileno(), os.fstat(old.fileno()).st_size)


def link_or_copy(source: Path, target: Path, copy: bool = False) -> str:
    """Make `target` a file with the bytes of `source`, sharing its blocks ("reflink") or the file itself ("link") where
    the file system can, unless `copy`. Returns "reflink", "link" or "copy"."""
    if copy:
        copy_file(source, target)
        return "copy"
    with open(source, "rb") as old, open(target, "wb") as new, naming(target):
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
    copy_file(source, target)
    return "copy"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample is: the name of its shard, and its row there."""

    shard: str
    row: int


class DamagedError(Exception):
    """A stored sample is not what was packed."""


class Samples:
    """Samples of the committed shards in a folder, to be written into other shards. Use it in one thread."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._shards: OrderedDict[str, _Shard] = OrderedDict()

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_) -> None:
        while self._shards:
            self._shards.popitem()[1].file.close()

    def video(self, place: Place) -> Video:
        """Its row of the sample table. Raises ShardError if the table cannot be read."""
        return self._shard(place).table.video(place.row)

    def json(self, place: Place) -> bytes:
        """Its JSON member. Raises DamagedError if the crc is wrong."""
        shard = self._shard(place)
        offset, size = shard.index[f"{self.video(place).key}.json"]
        data = os.pread(shard.file.fileno(), size, offset)
        if crc32c(data) != shard.json_crcs[place.row]:
            raise DamagedError
        return data

    def json_crc(self, place: Place) -> int:
        """What the crc32c of its JSON member is to be."""
        return self._shard(place).json_crcs[place.row]

    def file(self, place: Place) -> "Window":
        """Its video, as a file. Reading the last byte raises DamagedError if the crc is wrong."""
        video = self.video(place)
        return Window(self._shard(place).file.fileno(), video.offset, video.size, video.crc32c)

    def _shard(self, place: Place) -> "_Shard":
        if place.shard not in self._shards:
            self._shards[place.shard] = _Shard(self._folder, place.shard)
            if len(self._shards) > _SHARDS_OPEN:
                self._shards.popitem(last=False)[1].file.close()
        self._shards.move_to_end(place.shard)
        return self._shards[place.shard]


class _Shard:
    def __init__(self, folder: Path, name: str):
        base = folder / name
        self.table = Table(base.with_suffix(".parquet"), name, 0)
        self.index = read_index(base.with_suffix(".idx"))
        self.json_crcs = json.loads(pq.read_schema(base.with_suffix(".parquet")).metadata[JSON_CRCS])
        self.file = open(base.with_suffix(".tar"), "rb")  # noqa: SIM115 closed by Samples


class Window:
    """Bytes of another file as a file that is read once, from its beginning to its end."""

    def __init__(self, descriptor: int, offset: int, size: int, crc: int):
        self._descriptor, self._offset, self._size, self._expected = descriptor, offset, size, crc
        self._at, self._crc = 0, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to the beginning or the end."""
        self._at = offset + (self._size if whence == io.SEEK_END else 0)
        self._crc = 0
        return self._at

    def read(self, size: int, /) -> bytes:
        """The next bytes; at the end, their crc is compared."""
        data = os.pread(self._descriptor, min(size, self._size - self._at), self._offset + self._at)
        self._at += len(data)
        self._crc = crc32c(data, self._crc)
        if (not data and size) or (self._at == self._size and self._crc != self._expected):
            raise DamagedError
        return data

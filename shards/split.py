"""Reading a packed split: rows of the sample table, captions, and bytes of stored files."""

import difflib
import json
import shlex
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from shards import ShardError, count, storage
from shards.names import Names
from shards.open_files import FilePool
from shards.remote import Local, Refused, RemoteFiles, Unreachable
from shards.schema import CAPTION_COUNTS, Video
from shards.summary import read_summary
from shards.table import COPY_AGAIN, Table, read_counts, read_table

T = TypeVar("T")

_TABLES_IN_MEMORY = 512  # shards whose sample table stays decoded; a table of 256 videos takes about 3 MB
_LOADERS = 64  # locks, so that no two threads read one table
_SIZES_CHECKED = 1000  # shards whose size is looked at on opening; of more it would take long on a network mount


class Split:
    """A packed split, opened for reading. Safe to use from several threads.

    `path`: a folder, or a URL (s3://, gs://, hf://, https://), of which `local` says where pieces are kept.
    Raises ShardError if there is no finished split.
    """

    def __init__(self, path: str | Path, local: Local | None = None):
        place = storage.place(str(path))
        self.remote = RemoteFiles(place, local or Local()) if storage.is_remote(place) else None
        self.path = place
        self.info = _read_info(place) if self.remote is None else self.remote.info
        self.shards = [s["name"] for s in self.info["shards"]]
        self._starts = np.cumsum([0] + [s["videos"] for s in self.info["shards"]])
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._files = FilePool()
        self._lock = threading.Lock()
        self._loading = [threading.Lock() for _ in range(_LOADERS)]
        self._naming = threading.Lock()

    def __len__(self) -> int:
        """Videos in the split."""
        return int(self._starts[-1])

    @property
    def digest(self) -> str:
        """What tells this split from every other: a digest of its profile, keys, videos and captions, see `shards.digest`."""
        return self.info["digest"]

    def video(self, index: int) -> Video:
        """Row `index` of the sample table. Raises IndexError outside [0, len)."""
        table, row = self._find(index)
        return table.video(row)

    def find(self, name: str) -> Video:
        """The video whose id or key is `name`. Raises ShardError if there is none, and names some that are alike."""
        with self._naming:
            rows = self._names.rows(name)
        for video in map(self.video, rows):
            if name in (video.id, video.key):
                return video
        near: list[str] = []
        inside: list[str] = []  # of a folder that was left out
        for first, ids, keys in self._ids_and_keys():
            for row, names in enumerate(zip(ids, keys, strict=True)):
                if name in names:  # of a table that could not be read before
                    return self.video(first + row)
            inside += [id for id in ids if id.endswith(f"/{name}")]
            near = difflib.get_close_matches(name, [*near, *ids], 3, 0.5)
        near = list(dict.fromkeys([*inside, *near]))[:3]
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It holds {count(len(self), 'video')}."
        raise ShardError(f"{self.path} holds no video called {name!r}. {hint}")

    @cached_property
    def _names(self) -> Names:
        return Names(self._ids_and_keys(damaged=True))

    def _ids_and_keys(self, damaged: bool = False) -> Iterator[tuple[int, list[str], list[str]]]:
        """(first row, ids, keys) of each shard: only these columns are decoded, a quarter of the time that whole tables take.

        damaged: pass over tables that cannot be read. The videos of the others are still found."""
        for shard, first in enumerate(self._starts[:-1].tolist()):
            try:
                table = self._read_table(
                    shard, lambda path, data, crc: read_table(path, ("id", "key"), crc=crc, data=data)
                )
            except Unreachable:
                raise
            except ShardError:
                if damaged:
                    continue
                raise
            yield first, table.column("id").to_pylist(), table.column("key").to_pylist()

    def captions(self, index: int) -> list[dict]:
        """Captions of a video: dicts with `text`, and `start`, `end` in seconds or None."""
        table, row = self._find(index)
        return table.captions(row)

    @property
    def parts(self) -> list["Split"]:
        """The splits that this one is made of: itself. See `shards.dataset.Dataset`."""
        return [self]

    @property
    def is_remote(self) -> bool:
        """Whether it is read over a network."""
        return self.remote is not None

    @property
    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first video of each shard, and the number of all."""
        return self._starts

    @cached_property
    def caption_counts(self) -> np.ndarray:
        """Captions of each video, [videos], in the smallest unsigned type that holds them. Not to be written to."""
        if self.info["captions"] == len(self):  # no video is without
            return np.broadcast_to(np.uint8(1), len(self))
        path, data = self.path / CAPTION_COUNTS, self._caption_counts()
        if data is None:  # it only saves time
            parts = [np.diff(self._table(i).caption_bounds) for i in range(len(self.shards))]
            counts = np.concatenate([np.zeros(0, np.int64), *parts])
            return counts.astype(np.min_scalar_type(counts.max(initial=0)))
        try:
            return self._fitting(data)
        except ValueError as error:
            if self.remote is None:
                raise ShardError(f"{path} {error}. Copy it again, or delete it: it only saves time") from error
        self.remote.forget(CAPTION_COUNTS)  # the local copy may be the damaged one
        try:
            return self._fitting(self._caption_counts() or b"")
        except ValueError as error:
            self.remote.forget(CAPTION_COUNTS)
            raise ShardError(
                f"{path} {error}, also when it was fetched again. Upload it again, or delete it there: it only saves "
                f"time. No copy of it is kept in {self.remote.pieces.folder}"
            ) from error

    def _fitting(self, data: bytes) -> np.ndarray:
        """captions.npy. Raises ValueError if it does not fit dataset.json."""
        counts = read_counts(data)
        sums = [int(counts[a:b].sum()) for a, b in pairwise(self._starts)] if len(counts) == len(self) else []
        if sums != [shard["captions"] for shard in self.info["shards"]]:
            raise ValueError("does not fit dataset.json")
        return counts

    def _caption_counts(self) -> bytes | None:
        if self.remote is None:
            path = self.path / CAPTION_COUNTS
            return path.read_bytes() if path.exists() else None
        try:
            return self.remote.small_file(CAPTION_COUNTS)
        except Refused:  # a store that may not be listed refuses what is not there
            return None
        except Unreachable:
            raise
        except ShardError:
            return None

    def read(self, video: Video, offset: int = 0, size: int = -1) -> bytes:
        """Bytes of the stored file; `size` -1 reads to its end. Raises ShardError if the tar is shorter than that."""
        size = video.size - offset if size < 0 else size
        if self.remote is not None:
            return self.remote.read(video, offset, size)
        data = self._files.get(self._tar(video.shard)).read(size, video.offset + offset)
        if len(data) != size:
            raise ShardError(
                f"{self.path / video.shard}.tar ends inside {video.id!r}: the file was cut short after packing. "
                f"Run: python -m c4c.shard verify {shlex.quote(str(self.path))}"
            )
        return data

    def fetch(self, video: Video, low: int, high: int) -> int:
        """Bring bytes [low, high) of the stored file to this machine. Returns how many that took up; 0 if they are here
        for good."""
        return 0 if self.remote is None else self.remote.fetch(video, low, high)

    def fetch_again(self, video: Video) -> bool:
        """Forget the local copy of a video whose bytes are wrong. False: there is none, the split itself is damaged."""
        if self.remote is None:
            return False
        self.remote.drop(video)
        return True

    def json(self, video: "Video | TarPlace") -> dict:
        """The sample's JSON member, which follows the video in the tar."""
        if self.remote is not None:
            raise ShardError(f"{self.path}: copy the split to a disk to read its JSON members")
        file, start = self._files.get(self._tar(video.shard)), video.offset + _blocks(video.size)
        member = tarfile.TarInfo.frombuf(file.read(512, start), "utf-8", "strict")
        if member.type == tarfile.GNUTYPE_LONGNAME:  # a name over 100 bytes stands in blocks of its own
            start += 512 + _blocks(member.size)
            member = tarfile.TarInfo.frombuf(file.read(512, start), "utf-8", "strict")
        return json.loads(file.read(member.size, start + 512))

    def close(self) -> None:
        """Close the tars; reading goes on with opening them again."""
        self._files.close()

    def _find(self, index: int) -> tuple[Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"video {index} of {len(self)} in {self.path}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._table(shard), index - int(self._starts[shard])

    def _table(self, shard: int) -> Table:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        with self._loading[shard % _LOADERS]:  # several threads may want it at once
            with self._lock:
                if shard in self._tables:
                    return self._tables[shard]
            table = self._load(shard)
            with self._lock:
                self._tables[shard] = table
                while len(self._tables) > _TABLES_IN_MEMORY:
                    self._tables.popitem(last=False)
        return table

    def _load(self, number: int) -> Table:
        shard, first = self.info["shards"][number], int(self._starts[number])
        table = self._read_table(number, lambda path, data, crc: Table(path, shard["name"], first, data, crc))
        if (table.rows, int(table.caption_bounds[-1])) != (shard["videos"], shard["captions"]):
            raise ShardError(
                f"{self.path / shard['name']}.parquet holds {count(table.rows, 'video')} and {count(int(table.caption_bounds[-1]), 'caption')}, dataset.json says "
                f"{shard['videos']} and {shard['captions']}. {COPY_AGAIN}"
            )
        return table

    def _read_table(self, number: int, read: Callable[[Path, bytes | None, int], T]) -> T:
        """What `read(path, bytes or None, crc32c)` makes of a shard's sample table; bytes are those of a remote one."""
        shard = self.info["shards"][number]
        file, crc = f"{shard['name']}.parquet", shard["table_crc32c"]
        path = self.path / file
        if self.remote is None:
            return read(path, None, crc)
        try:
            return read(path, self.remote.small_file(file), crc)
        except Unreachable:
            raise
        except ShardError:  # the local copy may be the damaged one
            self.remote.forget(file)
            return read(path, self.remote.small_file(file), crc)

    def reopen(self, video: Video) -> None:
        """Let go of the video's tar, so that the next read opens it anew."""
        self._files.forget(self._tar(video.shard))

    def _tar(self, shard: str) -> str:
        return f"{self.path}/{shard}.tar"  # not a Path: there is one for each read


class TarPlace(NamedTuple):
    """Where a video stands in the tar of a shard."""

    shard: str
    offset: int
    size: int


def _blocks(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def find_splits(path: str | Path) -> list[Path]:
    """`path` itself if it is a split, else the splits directly inside it. Raises ShardError if there is none."""
    path = Path(path)
    if (path / "dataset.json").exists() or (path / "packing.json").exists():
        return [path]
    inside = sorted(p.parent for name in ("dataset.json", "packing.json") for p in path.glob(f"*/{name}"))
    if not inside:
        _read_info(path)
    return sorted(set(inside))


def _shards_planned(path: Path) -> str:
    try:
        return str(int(json.loads((path / "packing.json").read_text())["shards"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its"  # it is damaged; the packing command says so


def _read_info(path: Path) -> dict:
    if not path.is_dir():
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise ShardError(f"there is no folder {path}{looked}. Pack one with: python -m c4c.shard --help")
    if not (path / "dataset.json").exists():
        inside = sorted(p.parent.name for p in path.glob("*/dataset.json"))
        if inside:
            named = " or ".join(str(path / name) for name in inside[:3])
            raise ShardError(f"{path} is not a split, but holds some: did you mean {named}?")
        if (path / "packing.json").exists():
            total = _shards_planned(path)
            done = len(list(path.glob("[0-9]*.parquet")))
            raise ShardError(
                f"{path} is incomplete: {done} of {total} shards are packed. Run the packing command again; it goes on "
                "where it stopped."
            )
        raise ShardError(
            f"{path} holds no dataset.json, so it is not a packed split. Pack one: python -m c4c.shard --help"
        )
    info = read_summary((path / "dataset.json").read_bytes(), path)
    listing = {entry.name for entry in path.iterdir()}  # at once: there may be 100 000
    for shard in info["shards"]:
        for suffix in ("tar", "parquet"):
            if f"{shard['name']}.{suffix}" not in listing:
                raise ShardError(
                    f"{path} is incomplete: {shard['name']}.{suffix} is missing ({len(info['shards'])} shards are listed). Copy it "
                    "again, or run the packing command again; it packs what is missing."
                )
        if len(info["shards"]) > _SIZES_CHECKED:  # read() notices a short one
            continue
        size = (path / f"{shard['name']}.tar").stat().st_size
        if size != shard["bytes"]:
            raise ShardError(
                f"{path / shard['name']}.tar has {size} bytes, {shard['bytes']} were packed: it was cut short or changed. "
                "Copy it again, or run the packing command again; it packs that shard again."
            )
    return info

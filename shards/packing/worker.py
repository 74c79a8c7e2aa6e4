"""One shard: its videos read, decoded, written into a tar, and committed.

Runs in a process of its own, which says through a pipe what it is about to do, so that
whoever started it knows which video it hangs or dies on.
"""

import contextlib
import ctypes
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, VideoError, memory, storage
from shards.annotations import Caption, Item
from shards.schema import JSON_CRCS, REJECTS, SCHEMA, FrameTable
from shards.tar import DISK_FULL, TarWriter, commit, naming, safe_key, sync_and_close
from shards.tarcopy import DamagedError, Place, Samples
from shards.video.profiles import Profile, Stored, store

MISSING = "the file is missing"  # as `storage` says it
ABSENT = -1  # instead of a size: there is no such file
_DRIFT = 0.5  # seconds between a frame's time and where counting frames puts it, from which on the user is told
_VANISHED = 3  # source files that were there, missing one after the other
_GO_ON = "What is committed stays: bring them back, and run the same command again to go on."
_PLAIN_COLUMNS = (
    "key", "id", "ext", "size", "crc32c", "codec", "width", "height", "rotation", "mirrored", "source_frames", "duration",
    "extradata",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """One input dealt with: `bytes` read of it, why it was rejected, if it was, and what the user should know of it.
    `stored`: it was taken from a shard that was there; `missing`: it was rejected, and there is no file."""

    bytes: int
    rejected: str | None
    note: str | None = None
    stored: bool = False
    missing: bool = False


@dataclass(frozen=True)
class Job:
    """A shard to be packed. `lost` names videos, by their place in `items`, that are known to hang or to kill, or to be
    missing. `folders` holds, for each item whose file was there when packing began, the inode of its folder. `stored` names those that are packed already, and where in the shards of the folder `source`. With
    `table_only` all of its tar is there, in the shard of that name, and only the sample table is written."""

    name: str
    items: tuple[Item, ...]
    out: Path  # or UPath
    profile: Profile
    timeout: float = 600.0
    tag: str = ""  # of temporary files
    lost: dict[int, str] = field(default_factory=dict)
    folders: dict[int, int] = field(default_factory=dict)
    stored: dict[int, Place] = field(default_factory=dict)
    source: Path | None = None
    table_only: bool = False


@dataclass(frozen=True)
class Event:
    """What a packing process says: item number `item` is `opening`, `decoding` (it has `size` bytes) or `done`; or the
    whole shard is `packed`; or `error`."""

    what: str
    item: int = -1
    size: int = 0
    progress: Progress | None = None
    error: Exception | None = None


def pack_shard(job: Job, report: Callable[[Event], None] = lambda event: None) -> None:
    """Pack and commit one shard. Raises ShardError or OSError where that is not the fault of a video."""
    target = storage.output(job.out)
    rows, rejects, json_crcs = [], [], []
    sources = _Sources(job)
    drafts: dict[str, BinaryIO] = {}
    suffixes = ("parquet",) if job.table_only else ("tar", "idx", "parquet")
    try:
        for suffix in suffixes:
            drafts[suffix] = target.draft(f"{job.name}.{suffix}", job.tag)
        writer = None if job.table_only else TarWriter(drafts["tar"])
        with Samples(job.source or Path()) as samples:
            for number, item in enumerate(job.items):
                report(Event("opening", number))
                size, reason, packed = 0, None, _Packed()

                def ready(bytes: int, number: int = number) -> None:
                    nonlocal size
                    size = bytes
                    report(Event("decoding", number, bytes))

                try:
                    captions = screened(item, rejects)
                    if number in job.lost:
                        raise VideoError(job.lost[number])
                    packed = _stored_before(job, number, captions, writer, samples) or _pack_video(
                        item, captions, job.profile, writer, ready
                    )
                    rows.append(packed.row)
                    json_crcs.append(packed.json_crc)
                    sources.read()
                except VideoError as error:
                    if number not in job.lost and not item.problem:
                        sources.rejected(number)
                    reason = str(error)
                    rejects.append(rejection(item, reason))
                missing = reason is not None and "missing" in rejects[-1]
                said = Progress(size, reason and f"{item.id}: {reason}", packed.note, packed.stored, missing)
                report(Event("done", number, progress=said))
        if writer:
            with naming(f"{target}/{job.name}.tar"):
                writer.close()
            drafts["idx"].write(writer.index().encode())
        with naming(f"{target}/{job.name}.parquet"):
            _put_table(drafts["parquet"], pa.Table.from_pylist(rows, schema=SCHEMA), rejects, json_crcs)
        for suffix in suffixes:
            target.commit(drafts[suffix], f"{job.name}.{suffix}")
            del drafts[suffix]
    except Exception:
        for file in drafts.values():
            with contextlib.suppress(OSError, ValueError):
                target.discard(file)
        raise


class _Sources:
    """Watches that the folders of source videos stay where they are: what is not there must not pass for rejected."""

    def __init__(self, job: Job):
        self._job, self._vanished = job, 0

    def read(self) -> None:
        """A file could be read."""
        self._vanished = 0

    def rejected(self, number: int) -> None:
        """Raises ShardError if that is because the folder is gone, or files that were there vanish one after the other."""
        if number not in self._job.folders:  # it never was there, or is on a server
            return
        path = local_path(self._job.items[number].path)
        try:
            folder = os.stat(path.parent).st_ino
        except OSError:
            folder = None
        gone = not _is_there(path)
        if folder is None or (gone and folder != self._job.folders[number]):
            raise ShardError(
                f"{path.parent}, a folder of source videos, is gone or another one now (unmounted?): {path.name} was in it when "
                f"packing began. {_GO_ON}"
            )
        if not gone:
            return self.read()
        self._vanished += 1
        listed = [local_path(self._job.items[n].path) for n in self._job.folders]
        away = sum(not _is_there(path) for path in listed)
        if self._vanished >= _VANISHED or 1 < len(listed) < 2 * away:
            raise ShardError(
                f"the source videos vanish while they are packed: {away} of {len(listed)} files of this shard are gone that were "
                f"there when packing began, one of them {path}. {_GO_ON}"
            )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def local_path(path) -> Path:
    return Path(getattr(path, "path", path))


def folders_of(items: Sequence[Item]) -> dict[int, int]:
    """For each item, by its place, whose file is there: the inode of its folder. Each folder is listed once; files are not
    looked at, but for links. Of items on servers nothing is said."""
    listed: dict[Path, tuple[int, frozenset[str]]] = {}
    found = {}
    for number, item in enumerate(items):
        if storage.is_remote(item.path):
            continue
        path = local_path(item.path)
        if path.parent not in listed:
            listed[path.parent] = _listed(path.parent)
        inode, names = listed[path.parent]
        if path.name in names:
            found[number] = inode
    return found


def _listed(folder: Path) -> tuple[int, frozenset[str]]:
    try:
        with os.scandir(folder) as entries:
            names = frozenset(e.name for e in entries if not e.is_symlink() or os.path.exists(e.path))
        return os.stat(folder).st_ino, names
    except (OSError, ValueError):
        return 0, frozenset()


@dataclass(frozen=True)
class _Packed:
    """A video's row, the crc32c of its JSON, and what its Progress says."""

    row: dict = field(default_factory=dict)
    json_crc: int = 0
    note: str | None = None
    stored: bool = False


def write_table(path: Path, temporary: Path, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    """Commit a shard's sample table; `json_crcs` are the crc32c of its rows' .json members."""
    file = open(temporary, "wb")  # noqa: SIM115 closed in sync_and_close()
    with naming(path):
        _put_table(file, table, rejects, json_crcs)
        sync_and_close(file, path)
    commit(temporary, path)


def _put_table(file, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    metadata = {REJECTS: json.dumps(rejects, sort_keys=True).encode(), JSON_CRCS: json.dumps(json_crcs).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd", write_page_checksum=True)


def screened(item: Item, rejects: list[dict]) -> list[Caption]:
    """The captions that can be stored; the others go to `rejects`. Raises VideoError for an item that is to be rejected
    whatever its file holds."""
    if problem := item.problem:
        raise VideoError(problem)
    kept = []
    for caption in item.captions:
        reason = None if caption.text.strip() else "the caption is empty"
        if not _is_unicode(caption.text):
            reason = "the caption is not valid Unicode"
        if reason:
            rejects.append({"id": item.id, "caption": caption.text, "reason": reason})
        else:
            kept.append(caption)
    if not kept:
        raise VideoError("it has no caption")
    try:
        safe_key(item.id)
    except ValueError as error:
        raise VideoError(str(error)) from error
    return kept


def rejection(item: Item, reason: str) -> dict:
    """A line of rejects.jsonl about a video."""
    reject = {"id": item.id, "path": str(item.path), "reason": reason, "captions": len(item.captions)}
    if reason == MISSING or (not item.problem and source_size(item.path) == ABSENT):
        reject["missing"] = True
    return reject


def source_size(path) -> int | None:
    """Bytes of the file at `path`; ABSENT if there is none; None if that is not known (a URL, a folder)."""
    if storage.is_remote(path):
        return None
    try:
        status = os.stat(getattr(path, "path", path))
    except FileNotFoundError:
        return ABSENT
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pack_video(
    item: Item, captions: list[Caption], profile: Profile, writer: TarWriter, ready: Callable[[int], None]
) -> _Packed:
    """Write one video into the tar. Writes nothing unless all of it decoded."""
    with storage.opened(item.path, ready) as file:
        stored = _stored(file, item, profile)
        with stored.file:
            row = _row(item, safe_key(item.id), captions, stored)
            text = _description(item, row, stored, profile, os.fstat(file.fileno()).st_size)
            try:
                offsets = writer.add(row["key"], {stored.extension: stored.file, "json": text})
            except OSError as error:
                if error.errno is not None:
                    raise
                raise VideoError("the file changed while it was read") from error
    row["offset"] = offsets[stored.extension]
    drift, note = stored.source.drift, None
    if drift > _DRIFT:
        note = (
            f"{item.id}: its frame rate varies: frames are sampled by time; counting frames as the official code does would "
            f"be up to {drift:.1f} s off (data.sampling=uniform_by_frame)"
        )
    return _Packed(row | frame_columns(stored.frames), crc32c(text), note)


def _stored_before(
    job: Job, number: int, captions: list[Caption], writer: TarWriter | None, samples: Samples
) -> _Packed | None:
    """Write a video as a committed shard holds it, with the captions and the meta of now. None: no shard holds it, or
    what is there is damaged. Without a `writer` its place in the tar stays the same."""
    if number not in job.stored:
        return None
    item, place = job.items[number], job.stored[number]
    if writer is None:
        video, crc = samples.video(place), samples.json_crc(place)
        said, offset = [asdict(in_clip(c, item, video.duration)) for c in captions], video.offset
    else:
        try:
            video = samples.video(place)
            said = [asdict(in_clip(c, item, video.duration)) for c in captions]
            described = json.loads(samples.json(place)) | {"captions": said, "meta": item.meta}
            if (size := source_size(item.path)) not in (None, ABSENT):
                described["source"] |= {"bytes": size}
            text = _dumped(described)
            offset = writer.add(video.key, {video.ext: samples.file(place), "json": text})[video.ext]
            crc = crc32c(text)
        except (DamagedError, ShardError, ValueError, KeyError):
            return None
    row = {name: getattr(video, name) for name in _PLAIN_COLUMNS}
    row |= {"fps_num": video.fps.numerator, "fps_den": video.fps.denominator, "captions": said, "offset": offset}
    row["coding"] = None if video.coding is None else asdict(video.coding)
    return _Packed(row | frame_columns(video.frames), crc, stored=True)


def _stored(file, item: Item, profile: Profile) -> Stored:
    try:
        return store(file, item.path.name, profile, item.start, item.end)
    except (ShardError, VideoError, ImportError):
        raise
    except Exception as error:  # damaged files find ways that nobody foresaw
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if memory.is_short(error):
            raise VideoError(f"there is not enough memory to decode it{memory.limit_text()}") from error
        what = str(error).splitlines()[0][:200] if str(error) else ""
        raise VideoError(f"it cannot be decoded ({type(error).__name__}: {what})") from error


def _row(item: Item, key: str, captions: list[Caption], stored: Stored) -> dict:
    """The video's row, without what only the tar knows and without its frames."""
    source = stored.source
    return {
        "key": key,
        "id": item.id,
        "ext": stored.extension,
        "size": stored.size,
        "crc32c": stored.crc32c,
        "codec": stored.codec,
        "width": stored.width,
        "height": stored.height,
        "rotation": stored.rotation,
        "mirrored": stored.mirrored,
        "fps_num": source.fps.numerator,
        "fps_den": source.fps.denominator,
        "source_frames": len(source.times),
        "duration": source.duration,
        "extradata": stored.extradata,
        "coding": None if stored.coding is None else asdict(stored.coding),
        "captions": [asdict(in_clip(c, item, source.duration)) for c in captions],
    }


def in_clip(caption: Caption, item: Item, duration: float) -> Caption:
    """The caption with its times, which count from the file's beginning, in seconds of the clip that was cut out."""
    if item.start is None and item.end is None:
        return caption
    first = item.start or 0.0
    start, end = (None if t is None else min(max(t - first, 0.0), duration) for t in (caption.start, caption.end))
    return replace(caption, start=start, end=end)


def _description(item: Item, row: dict, stored: Stored, profile: Profile, size: int) -> bytes:
    """The sample's .json; `size` is that of its source in bytes."""
    source, cut = stored.source, (item.start, item.end) != (None, None)
    told = cut or profile.name != "copy"  # else all frames are there, and the stored file tells their times itself
    described = {k: row[k] for k in ("id", "captions", "codec", "width", "height", "duration", "source_frames")}
    described |= {
        "fps": f"{source.fps.numerator}/{source.fps.denominator}",
        "source": {
            "file": item.path.name, "bytes": size, "codec": source.codec, "width": source.width, "height": source.height,
        },
        # with these the tar alone tells all that the sample table does
        "frame_number": stored.frames.number.tolist() if told else None,
        "frame_time": stored.frames.time.tolist() if told else None,
        "cut": [item.start, item.end] if cut else None,
        "rotation": stored.rotation,
        "mirrored": stored.mirrored,
        "profile": profile.describe(),
        "meta": item.meta,
    }  # fmt: skip
    return _dumped(described)


def _dumped(described: dict) -> bytes:
    try:
        return json.dumps(described, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError:  # a file's name need not be Unicode
        return json.dumps(described, sort_keys=True).encode()


def frame_columns(frames: FrameTable) -> dict:
    """The frame table as columns of the sample table."""
    return {f"frame_{name}": getattr(frames, name) for name in ("number", "time", "offset", "size", "key", "crc32c")}


def main(descriptor: int, parent: int) -> None:
    """Pack the shards that come through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives a killed packer
        if os.getppid() != parent:
            os._exit(1)
    with Connection(descriptor) as pipe, contextlib.suppress(EOFError, OSError):  # the packer is gone
        while True:
            job = pipe.recv()
            try:
                pack_shard(job, pipe.send)
                pipe.send(Event("packed"))
            except Exception as error:
                pipe.send(Event("error", error=_plain(error)))


def _plain(error: Exception) -> Exception:
    """The error in a form that survives the pipe."""
    if isinstance(error, ShardError):
        return ShardError(str(error))
    if memory.is_short(error):
        return ShardError(f"there is not enough memory to pack with{memory.limit_text()}. Use fewer --workers")
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return ShardError(f"{type(error).__name__}: {error}")

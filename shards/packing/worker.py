"""One shard: its videos read, decoded, written into a tar, and committed.

Runs in a process of its own, which says through a pipe what it is about to do, so that
whoever started it knows which video it hangs or dies on.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from crc32c import crc32c

from shards import ShardError, VideoError, first_line, memory, storage
from shards.annotations import Caption, Item
from shards.packing.rows import (
    description,
    frame_columns,
    in_clip,
    odd_times,
    put_table,
    rejection,
    row_of,
    row_of_stored,
    screened,
    to_json,
)
from shards.packing.sources import ABSENT, SourceWatch, source_size
from shards.schema import SCHEMA, SUFFIXES
from shards.tar import DISK_FULL, TarWriter, naming, safe_key
from shards.tarcopy import DamagedError, Place, Samples
from shards.video.profiles import Profile, Stored, store

_DRIFT = 0.5  # seconds between a frame's time and where counting frames puts it, from which on a note is shown

_FASTEST = 1000  # frames a second, above which a note is shown


@dataclass(frozen=True)
class Progress:
    """One input video is done: `bytes` read, why it was rejected if it was, and a note for the user.
    `stored`: it was copied from a shard that existed; `missing`: it was rejected since its file does not exist;
    `odd_times`: captions whose times cannot be right; `cut_short`: its file ends before the cut should."""

    bytes: int
    rejected: str | None
    note: str | None = None
    stored: bool = False
    missing: bool = False
    odd_times: int = 0
    cut_short: bool = False


@dataclass(frozen=True)
class Job:
    """A shard to be packed.

    lost        why videos are rejected unread, by position in `items`: they hang, crash or are missing
    folders     for each item whose file existed when packing began, the inode of its folder
    stored      where in the shards of the folder `source` those are that are packed already
    table_only  its tar is complete, in the shard of that name: only the sample table is written
    """

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
    """What a packing process reports: item number `item` is `opening`, `decoding` (it has `size` bytes) or `done`; or the
    shard is `packed`; or `error`."""

    what: str
    item: int = -1
    size: int = 0
    progress: Progress | None = None
    error: Exception | None = None


def pack_shard(job: Job, report: Callable[[Event], None] = lambda event: None) -> None:
    """Pack and commit one shard. Raises ShardError or OSError where that is not the fault of a video."""
    target = storage.output(job.out)
    rows: list[dict] = []
    rejects: list[dict] = []
    json_crcs: list[int] = []
    sources = SourceWatch(job.items, job.folders)
    drafts: dict[str, BinaryIO] = {}
    suffixes = ("parquet",) if job.table_only else SUFFIXES
    try:
        for suffix in suffixes:
            drafts[suffix] = target.draft(f"{job.name}.{suffix}", job.tag)
        writer = None if job.table_only else TarWriter(drafts["tar"])
        with Samples(job.source or Path()) as samples:
            for number, item in enumerate(job.items):
                report(Event("opening", number))
                size, reason, packed, odd = 0, None, _Packed(), (0, False)

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
                    odd = odd_times(item, captions, packed.row)
                    sources.read()
                except VideoError as error:
                    if number not in job.lost and not item.problem:
                        sources.rejected(number)
                    reason = str(error)
                    rejects.append(rejection(item, reason))
                missing = reason is not None and "missing" in rejects[-1]
                progress = Progress(size, reason and f"{item.id}: {reason}", packed.note, packed.stored, missing, *odd)
                report(Event("done", number, progress=progress))
        if writer:
            with naming(f"{target}/{job.name}.tar"):
                writer.close()
            drafts["idx"].write(writer.index().encode())
        with naming(f"{target}/{job.name}.parquet"):
            put_table(drafts["parquet"], pa.Table.from_pylist(rows, schema=SCHEMA), rejects, json_crcs)
        for suffix in suffixes:
            target.commit(drafts[suffix], f"{job.name}.{suffix}")
            del drafts[suffix]
    except Exception:
        for file in drafts.values():
            with contextlib.suppress(OSError, ValueError):
                target.discard(file)
        raise


@dataclass(frozen=True)
class _Packed:
    """A video's row, the crc32c of its JSON, and what its Progress says."""

    row: dict = field(default_factory=dict)
    json_crc: int = 0
    note: str | None = None
    stored: bool = False


def _pack_video(
    item: Item, captions: list[Caption], profile: Profile, writer: TarWriter | None, ready: Callable[[int], None]
) -> _Packed:
    """Write one video into the tar. Writes nothing unless all of it decoded."""
    assert writer is not None, "with table_only every video is stored already, or rejected"
    with storage.opened(item.path, ready) as file:
        stored = _stored(file, item, profile)
        with stored.file:
            row = row_of(item, safe_key(item.id), captions, stored)
            text = description(item, row, stored, profile, os.fstat(file.fileno()).st_size)
            try:
                offsets = writer.add(row["key"], {stored.extension: stored.file, "json": text})
            except OSError as error:
                if error.errno is not None:
                    raise
                raise VideoError("the file changed while it was read") from error
    row["offset"] = offsets[stored.extension]
    notes = [*stored.source.notes]
    if (drift := stored.source.drift) > _DRIFT:
        notes.append(
            f"its frame rate varies: frames are sampled by time; counting frames as the official code does would "
            f"be up to {drift:.1f} s off (data.sampling=uniform_by_frame)"
        )
    elif stored.source.fps > _FASTEST:
        notes.append(
            f"its time stamps say {float(stored.source.fps):.0f} frames a second, so all of it lasts "
            f"{stored.source.duration:.3g} s; they are hardly right. Write it anew at its true rate"
        )
    note = f"{item.id}: {'; '.join(notes)}" if notes else None
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
        clipped, offset = [asdict(in_clip(c, item, video.duration)) for c in captions], video.offset
    else:
        try:
            video = samples.video(place)
            clipped = [asdict(in_clip(c, item, video.duration)) for c in captions]
            described = json.loads(samples.json(place)) | {"captions": clipped, "meta": item.meta}
            if (size := source_size(item.path)) not in (None, ABSENT):
                described["source"] |= {"bytes": size}
            text = to_json(described)
            offset = writer.add(video.key, {video.ext: samples.file(place), "json": text})[video.ext]
            crc = crc32c(text)
        except (DamagedError, ShardError, ValueError, KeyError):
            return None
    return _Packed(row_of_stored(video, clipped, offset), crc, stored=True)


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
        raise VideoError(f"it cannot be decoded ({first_line(error, named=True)})") from error


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

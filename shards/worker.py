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
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, storage
from shards.datasets import Caption, Item
from shards.profiles import Profile, Stored, store
from shards.schema import JSON_CRCS, REJECTS, SCHEMA, FrameTable
from shards.tar import DISK_FULL, TarWriter, commit, safe_key, sync_and_close
from shards.video import VideoError


@dataclass(frozen=True)
class Progress:
    """One input dealt with: `bytes` read of it, and why it was rejected, if it was."""

    bytes: int
    rejected: str | None


@dataclass(frozen=True)
class Job:
    """A shard to be packed. `lost` names videos, by their place in `items`, that are known to hang or to kill."""

    name: str
    items: tuple[Item, ...]
    out: Path  # or UPath
    profile: Profile
    timeout: float = 600.0
    tag: str = ""  # of temporary files
    lost: dict[int, str] = field(default_factory=dict)


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
    drafts = []
    try:
        drafts.append(target.draft(f"{job.name}.tar", job.tag))
        writer = TarWriter(drafts[0])
        for number, item in enumerate(job.items):
            report(Event("opening", number))
            size, reason = 0, job.lost.get(number)

            def ready(bytes: int, number: int = number) -> None:
                nonlocal size
                size = bytes
                report(Event("decoding", number, bytes))

            try:
                if reason:
                    raise VideoError(reason)
                captions = _captions(item, rejects)
                row, json_crc = _pack_video(item, captions, job.profile, writer, ready)
                rows.append(row)
                json_crcs.append(json_crc)
            except VideoError as error:
                reason = str(error)
                rejects.append({"id": item.id, "path": str(item.path), "reason": reason})
            report(Event("done", number, progress=Progress(size, reason and f"{item.id}: {reason}")))
        writer.close()
        drafts.append(target.draft(f"{job.name}.idx", job.tag))
        drafts[1].write(writer.index().encode())
        drafts.append(target.draft(f"{job.name}.parquet", job.tag))
        _put_table(drafts[2], pa.Table.from_pylist(rows, schema=SCHEMA), rejects, json_crcs)
        for suffix in ("tar", "idx", "parquet"):
            target.commit(drafts[0], f"{job.name}.{suffix}")
            drafts.pop(0)
    except Exception:
        for file in drafts:
            with contextlib.suppress(OSError, ValueError):
                target.discard(file)
        raise


def write_table(path: Path, temporary: Path, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    """Commit a shard's sample table; `json_crcs` are the crc32c of its rows' .json members."""
    file = open(temporary, "wb")  # noqa: SIM115 closed in sync_and_close()
    _put_table(file, table, rejects, json_crcs)
    sync_and_close(file)
    commit(temporary, path)


def _put_table(file, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    metadata = {REJECTS: json.dumps(rejects, sort_keys=True).encode(), JSON_CRCS: json.dumps(json_crcs).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd", write_page_checksum=True)


def _captions(item: Item, rejects: list[dict]) -> list[Caption]:
    """The captions that can be stored; the others go to `rejects`."""
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
    return kept


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pack_video(
    item: Item, captions: list[Caption], profile: Profile, writer: TarWriter, ready: Callable[[int], None]
) -> tuple[dict, int]:
    """Write one video into the tar; returns its row and its json's crc32c. Writes nothing unless all of it decoded."""
    try:
        key = safe_key(item.id)
    except ValueError as error:
        raise VideoError(str(error)) from error
    with storage.opened(item.path, ready) as file:
        stored = _stored(file, item, profile)
        with stored.file:
            row = _row(item, key, captions, stored)
            text = _description(item, row, stored, profile)
            try:
                offsets = writer.add(key, {stored.extension: stored.file, "json": text})
            except OSError as error:
                if error.errno is not None:
                    raise
                raise VideoError("the file changed while it was read") from error
    row["offset"] = offsets[stored.extension]
    return row | frame_columns(stored.frames), crc32c(text)


def _stored(file, item: Item, profile: Profile) -> Stored:
    try:
        return store(file, item.path.name, profile, item.start, item.end)
    except (ShardError, VideoError, ImportError):
        raise
    except Exception as error:  # damaged files find ways that nobody foresaw
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
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
        "captions": [asdict(_in_clip(c, item, source.duration)) for c in captions],
    }


def _in_clip(caption: Caption, item: Item, duration: float) -> Caption:
    """The caption with its times, which count from the file's beginning, in seconds of the clip that was cut out."""
    if item.start is None and item.end is None:
        return caption
    first = item.start or 0.0
    start, end = (None if t is None else min(max(t - first, 0.0), duration) for t in (caption.start, caption.end))
    return replace(caption, start=start, end=end)


def _description(item: Item, row: dict, stored: Stored, profile: Profile) -> bytes:
    """The sample's .json."""
    source, cut = stored.source, (item.start, item.end) != (None, None)
    told = cut or profile.name != "copy"  # else all frames are there, and the stored file tells their times itself
    described = {k: row[k] for k in ("id", "captions", "codec", "width", "height", "duration", "source_frames")}
    described |= {
        "fps": f"{source.fps.numerator}/{source.fps.denominator}",
        "source": {"file": item.path.name, "codec": source.codec, "width": source.width, "height": source.height},
        # with these the tar alone tells all that the sample table does
        "frame_number": stored.frames.number.tolist() if told else None,
        "frame_time": stored.frames.time.tolist() if told else None,
        "cut": [item.start, item.end] if cut else None,
        "rotation": stored.rotation,
        "mirrored": stored.mirrored,
        "profile": profile.describe(),
        "meta": item.meta,
    }
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
    with Connection(descriptor) as pipe, contextlib.suppress(EOFError, BrokenPipeError):
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
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return ShardError(f"{type(error).__name__}: {error}")

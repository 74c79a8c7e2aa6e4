"""What is recorded of a packed video: its row of the sample table, its .json member, and the line of one that is rejected."""

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards import VideoError
from shards.annotations import Caption, Item
from shards.caption_times import SLACK_S, impossible
from shards.packing.sources import ABSENT, source_size
from shards.schema import JSON_CRCS, REJECTS, FrameTable, Video
from shards.storage import MISSING
from shards.tar import safe_key, write_atomic
from shards.video.profiles import Profile, Stored

_PLAIN_COLUMNS = (
    "key", "id", "ext", "size", "crc32c", "codec", "width", "height", "rotation", "mirrored", "source_frames", "duration",
    "extradata",
)  # fmt: skip

NO_CAPTION = "it has no caption"


def write_table(path: Path, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    """Commit a shard's sample table; `json_crcs` are the crc32c of its rows' .json members."""
    with io.BytesIO() as file:
        put_table(file, table, rejects, json_crcs)
        write_atomic(path, file.getvalue())


def put_table(file: BinaryIO, table: pa.Table, rejects: list[dict], json_crcs: list[int]) -> None:
    """Write a sample table with what belongs to the shard but to no row; see `write_table`."""
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
        raise VideoError(NO_CAPTION)
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


def loss(id: str, tar: str, reason: str) -> dict:
    """A line of rejects.jsonl about a packed video that a repair left out, since it is damaged in its tar."""
    return {"id": id, "path": tar, "reason": f"damaged in the tar: {reason}"}


def is_loss(reject: dict) -> bool:
    """Whether a line of rejects.jsonl is one that `loss` made: the packer counts captions, or names one."""
    return "captions" not in reject and "caption" not in reject


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_of(item: Item, key: str, captions: list[Caption], stored: Stored) -> dict:
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


def odd_times(item: Item, captions: list[Caption], row: dict) -> tuple[int, bool]:
    """(captions whose times cannot be right, whether the video was cut shorter than asked for) of a packed item."""
    duration, timed = row["duration"], [c for c in captions if c.start is not None or c.end is not None]
    cut = item.start is not None or item.end is not None
    odd = sum(
        # what lies outside a cut has been moved to its edge
        (cut and impossible(caption.start, caption.end, math.inf))
        or impossible((stored := in_clip(caption, item, duration)).start, stored.end, duration)
        for caption in timed
    )
    # without a start, the end is the most that is packed of any video
    short = item.start is not None and item.end is not None and item.end - item.start > duration + SLACK_S
    return odd, short


def description(item: Item, row: dict, stored: Stored, profile: Profile, size: int) -> bytes:
    """The sample's .json member; `size` is that of its source in bytes."""
    source, cut = stored.source, (item.start, item.end) != (None, None)
    # of an untouched file all frames are stored, and the file itself says when they are shown
    needs_frames = cut or profile.name != "copy"
    described: dict = {k: row[k] for k in ("id", "captions", "codec", "width", "height", "duration", "source_frames")}
    described |= {
        "fps": f"{source.fps.numerator}/{source.fps.denominator}",
        "source": {
            "file": item.path.name, "bytes": size, "codec": source.codec, "width": source.width, "height": source.height,
        },
        # with these the tar alone tells all that the sample table does
        "frame_number": stored.frames.number.tolist() if needs_frames else None,
        "frame_time": stored.frames.time.tolist() if needs_frames else None,
        "cut": [item.start, item.end] if cut else None,
        "rotation": stored.rotation,
        "mirrored": stored.mirrored,
        "profile": profile.describe(),
        "meta": item.meta,
    }  # fmt: skip
    return to_json(described)


def to_json(described: dict) -> bytes:
    """A .json member."""
    try:
        return json.dumps(described, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError:  # a file's name need not be Unicode
        return json.dumps(described, sort_keys=True).encode()


def row_of_stored(video: Video, captions: list[dict], offset: int) -> dict:
    """The row of a video that another shard holds, with other captions and at another place in the tar."""
    row = {name: getattr(video, name) for name in _PLAIN_COLUMNS}
    row |= {"fps_num": video.fps.numerator, "fps_den": video.fps.denominator, "captions": captions, "offset": offset}
    row["coding"] = None if video.coding is None else asdict(video.coding)
    return row | frame_columns(video.frames)


def frame_columns(frames: FrameTable) -> dict:
    """The frame table as columns of the sample table."""
    return {f"frame_{name}": getattr(frames, name) for name in ("number", "time", "offset", "size", "key", "crc32c")}

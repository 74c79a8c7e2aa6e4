"""Rows of an index: what a video becomes in the tables `segments` and `failures` (see store.py)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

FILE, SHARD = "file", "shard"  # what a video is read from


@dataclass(frozen=True)
class Known:
    """What the index holds of a video: enough to see whether its file has changed."""

    video: str
    path: str
    size: int
    mtime_ns: int
    written: int
    source: str = FILE


@dataclass(frozen=True, kw_only=True)
class IndexedVideo:
    """A video as it goes into the index.

    source: "file" or "shard"; starts, ends, duration: seconds; width, height: as shown; vectors: float32 [S, D], unit length;
    frames: float16 [S, F, D] for late heads, zeros for frames that a segment lacks; thumbnails: JPEG."""

    video: str
    path: str
    source: str
    size: int
    mtime_ns: int
    duration: float
    width: int
    height: int
    starts: Sequence[float]
    ends: Sequence[float]
    vectors: np.ndarray
    thumbnails: Sequence[bytes]
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, and why."""

    path: str
    reason: str
    size: int
    mtime_ns: int


FAILURES = pa.schema([("path", pa.string()), ("reason", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])


def schema(width: int, frames: int) -> pa.Schema:
    """The columns of `segments`, of vectors of `width` numbers. `path` is absolute; times are seconds; `written` counts up.

    frames: of a segment at most, which are stored for late heads; 0: none are."""
    columns = [
        ("id", pa.string()), ("video", pa.string()), ("path", pa.string()), ("source", pa.string()), ("size", pa.int64()),
        ("mtime_ns", pa.int64()), ("written", pa.int64()), ("segment", pa.int32()), ("segments", pa.int32()),
        ("start", pa.float64()), ("end", pa.float64()), ("duration", pa.float64()), ("width", pa.int32()),
        ("height", pa.int32()), ("vector", pa.list_(pa.float32(), width)), ("thumbnail", pa.large_binary()),
    ]  # fmt: skip
    if frames:
        columns.append(("frames", pa.list_(pa.float16(), frames * width)))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def segment_id(video: str, segment: int) -> str:
    """The name of a segment."""
    return f"{video}#{segment:06d}"


def batch(video: IndexedVideo, written: int, columns: pa.Schema) -> pa.RecordBatch:
    """The rows of a video. Raises ValueError for vectors that are not finite, or not as many and as long as they should be."""
    count = len(video.starts)
    same = {"video": video.video, "path": video.path, "source": video.source, "size": video.size, "written": written,
            "mtime_ns": video.mtime_ns, "segments": count, "duration": video.duration, "width": video.width,
            "height": video.height}  # fmt: skip
    own: dict[str, Iterable] = {
        "id": [segment_id(video.video, i) for i in range(count)], "segment": range(count), "start": video.starts,
        "end": video.ends, "thumbnail": video.thumbnails,
    }  # fmt: skip
    numbers: dict[str, Any] = {
        "vector": np.asarray(video.vectors, np.float32),
        "frames": None if video.frames is None else np.asarray(video.frames, np.float16),
    }
    arrays = []
    for column in columns:
        if column.name in numbers:
            values = numbers[column.name]
            if values is None or len(values) != count or values.size != count * column.type.list_size:
                raise ValueError(f"{video.path}: its {count} segments have a {column.name} of another size")
            if not np.isfinite(values).all():
                raise ValueError(f"{video.path}: a {column.name} is not finite")
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=column.type))
        else:
            values = list(own[column.name]) if column.name in own else [same[column.name]] * count
            arrays.append(pa.array(values, column.type))
    return pa.record_batch(arrays, schema=columns)

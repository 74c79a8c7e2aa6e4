"""What tells a split, and a video in it, from every other: digests of what decides its frames, their times and pixels.

dataset.json says which rule its digest was made by. Earlier versions hashed the stored bytes and the captions alone (`BYTES`), and
could not tell two cuts of a video that begin at one keyframe. Such a digest stays valid until the split is packed or updated again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.schema import Coding, Video

RULE_KEY = "digest_rule"  # of dataset.json; where it is absent, the rule is BYTES
BYTES, ROWS = 1, 2
RULES = (BYTES, ROWS)

_PLAIN = (
    "size",
    "crc32c",
    "codec",
    "width",
    "height",
    "rotation",
    "mirrored",
    "source_frames",
    "duration",
    "extradata",
)
_CODING = tuple(field.name for field in fields(Coding))
_FRAMES = ("number", "time", "offset", "size", "key")  # a packet's crc32c follows from its place and the file's bytes
_COLUMNS = (*_PLAIN, "fps_num", "fps_den", "coding", *(f"frame_{name}" for name in _FRAMES))
_AT_ONCE = 64  # rows that are held in memory: of long videos a whole table would be much


def fingerprint(video: Video) -> bytes:
    """16 bytes of all that a row of the sample table says of a video's frames, but for where in the tar it stands."""
    coding = [None] * len(_CODING) if video.coding is None else [getattr(video.coding, name) for name in _CODING]
    row = [*(getattr(video, name) for name in _PLAIN), *video.fps.as_integer_ratio(), *coding]
    return _hashed(row, [_bytes(getattr(video.frames, name)) for name in _FRAMES])


def fingerprints(file: pq.ParquetFile) -> Iterator[bytes]:
    """The same of each row of a sample table, in order."""
    rates: dict[tuple, tuple] = {}
    for batch in file.iter_batches(_AT_ONCE, columns=list(_COLUMNS), use_threads=False):
        frames = [_lists(batch.column(f"frame_{name}")) for name in _FRAMES]
        columns = [batch.column(name).to_pylist() for name in _PLAIN]
        fps = list(zip(*(batch.column(name).to_pylist() for name in ("fps_num", "fps_den")), strict=True))
        rates |= {rate: Fraction(*rate).as_integer_ratio() for rate in {*fps} - rates.keys()}
        columns += zip(*(rates[rate] for rate in fps), strict=True)
        columns += [column.to_pylist() for column in batch.column("coding").flatten()]  # a field each
        for row, *lists in zip(zip(*columns, strict=True), *frames, strict=True):
            yield _hashed(row, lists)


def _lists(column: pa.Array) -> list[memoryview]:
    """The lists of a column, one a row, as bytes."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    view, bounds = memoryview(_bytes(values)), column.offsets.to_numpy()
    ends = ((bounds - bounds[0]) * values.itemsize).tolist()
    return [view[low:high] for low, high in pairwise(ends)]


def _bytes(values: np.ndarray) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _hashed(row: Sequence, frames: Sequence[bytes | memoryview]) -> bytes:
    known = hashlib.blake2b(repr((*row, *map(len, frames))).encode(), digest_size=16)
    for values in frames:
        known.update(values)
    return known.digest()

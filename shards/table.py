"""The sample tables and the caption counts of a split, read from their files."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, first_line, memory
from shards.open_files import NoMoreFiles, limit_reached
from shards.schema import FRAME_COLUMNS, Coding, FrameTable, Video, difference

COPY_AGAIN = "Copy it again, or delete it and run the packing command again"


def read_table(
    path, columns: Sequence[str] | None = None, *, crc: int | None = None, data: bytes | None = None
) -> pa.Table:
    """A sample table, or some of its columns. Raises ShardError if the file is not one, or its crc32c is not `crc`."""
    try:
        data = Path(path).read_bytes() if data is None else data
    except OSError as error:
        if reason := limit_reached(error):
            raise NoMoreFiles(f"{path} cannot be opened: {reason}") from error
        raise ShardError(f"{path} cannot be read ({error.strerror}). {COPY_AGAIN}") from error
    if crc is not None and crc32c(data) != crc:
        raise ShardError(
            f"{path} cannot be read (its crc32c is not the one in dataset.json: it was changed). {COPY_AGAIN}"
        )
    try:
        # a thread of Arrow's may keep a Python object beyond the read, and aborts a process that exits meanwhile
        # (apache/arrow#33975, #50482): all tables are read without them
        with pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True) as file:
            wrong = difference(file.schema_arrow)
            table = None if wrong else file.read(columns, use_threads=False)
    except Exception as error:  # Arrow raises many kinds for a damaged file
        if memory.is_short(error):
            raise ShardError(f"there is not enough memory to read {path}{memory.limit_text()}") from error
        raise ShardError(f"{path} cannot be read ({first_line(error)}). {COPY_AGAIN}") from error
    if wrong:
        raise ShardError(f"{path} cannot be read ({wrong}). {COPY_AGAIN}")
    return table


def read_counts(data: bytes) -> np.ndarray:
    """The contents of captions.npy, [videos]. Raises ValueError if it is no list of counts."""
    try:
        counts = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy parses its header as Python
        raise ValueError(f"cannot be read ({first_line(error)})") from error
    if counts.ndim != 1 or counts.dtype.kind != "u":
        raise ValueError(f"holds {counts.dtype} of {counts.ndim} dimensions, not a list of counts")
    return counts


class Table:
    """The sample table of one shard, as numpy columns."""

    def __init__(self, path, name: str, first: int, data: bytes | None = None, crc: int | None = None):
        """`data`: the table's file, where `path` is not one that can be opened. `crc`: the crc32c that it is to have."""
        table = read_table(path, crc=crc, data=data).combine_chunks()
        self.name, self.first, self.rows = name, first, table.num_rows
        flat = [f.name for f in table.schema if not pa.types.is_list(f.type)]
        self._columns = {name: table.column(name).to_pylist() for name in flat}
        self._bounds = _list_column(table, "frame_number")[0]
        self._frames = {c: _list_column(table, c)[1].to_numpy(zero_copy_only=False) for c in FRAME_COLUMNS}
        self.caption_bounds, self._captions = _list_column(table, "captions")

    def video(self, row: int) -> Video:
        """A row, with its frame table."""
        c = {name: values[row] for name, values in self._columns.items()}
        fps = Fraction(c.pop("fps_num"), c.pop("fps_den"))
        if coding := c.get("coding"):
            c["coding"] = Coding(**coding)
        low, high = self._bounds[row], self._bounds[row + 1]
        frames = FrameTable(**{name.removeprefix("frame_"): v[low:high] for name, v in self._frames.items()})
        return Video(index=self.first + row, shard=self.name, fps=fps, frames=frames, **c)

    def column(self, name: str) -> list:
        """The values of a column that is no list, a row each."""
        return self._columns[name]

    def captions(self, row: int) -> list[dict]:
        """The captions of a row: dicts with `text`, and `start`, `end` in seconds or None."""
        low, high = self.caption_bounds[row], self.caption_bounds[row + 1]
        return self._captions.slice(low, high - low).to_pylist()


def _list_column(table: pa.Table, name: str) -> tuple[np.ndarray, pa.Array]:
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    bounds = array.offsets.to_numpy() if len(array) else np.zeros(1, np.int64)
    return bounds - bounds[0], array.flatten()

"""Columns of whole splits as 64-bit hashes: small enough to compare ten million names in memory."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from shards.split import Split
from shards.table import read_table


def hash64(text: str) -> int:
    """64 bits of BLAKE2b; any text has one, valid Unicode or not."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64 [texts]"""
    return np.fromiter((hash64(t) for t in texts), np.uint64)


def tables(split: Split, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of each shard, one shard at a time."""
    for shard in split.info["shards"]:
        yield read_table(split.path / f"{shard['name']}.parquet", list(columns), crc=shard["table_crc32c"])


def key_hashes(split: Split) -> np.ndarray:
    """uint64 [videos] of the videos' keys."""
    parts = [hashes(table.column("key").to_pylist()) for table in tables(split, ["key"])]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def repeated(values: np.ndarray) -> list[np.ndarray]:
    """Positions of equal values, for each value that occurs more than once; in order of first occurrence."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0]) if len(values) else np.zeros(0, int)
    groups = np.split(order, starts[1:]) if len(starts) < len(values) else []
    return sorted((g for g in groups if len(g) > 1), key=lambda g: g[0])

"""Exact search for many queries at once: the vectors are read once for all of them."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa


def best_rows(batches: Iterable[pa.RecordBatch], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(row ids int64 [Q, n], inner products float32 [Q, n]), best first, n <= k.

    batches: with columns `_rowid` and `vector` (float32, as long as the queries [Q, D])."""
    best = np.full((len(queries), 0), -np.inf, np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    for batch in batches:
        if not len(batch):
            continue
        vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        ids = batch.column("_rowid").to_numpy(zero_copy_only=False).astype(np.int64)
        best = np.concatenate([best, queries @ vectors.T], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(ids, (len(queries), len(ids)))], axis=1)
        if best.shape[1] > k:
            kept = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best, rows = np.take_along_axis(best, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(best, order, axis=1)

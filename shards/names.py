"""Where the videos of a split stand, by their names: built once, from two columns of the sample tables."""

from collections.abc import Iterable

import numpy as np


class Names:
    """Which rows may have a name: 16 bytes a name, whatever its length. Ten million names take 160 MB, their strings over 1 GB.

    `columns`: of each shard its first row, its ids and its keys, in the split's order.
    """

    def __init__(self, columns: Iterable[tuple[int, list[str], list[str]]]):
        hashes: list[np.ndarray] = [np.zeros(0, np.int64)]
        rows: list[np.ndarray] = [np.zeros(0, np.int64)]
        for first, ids, keys in columns:
            others = [row for row, (id, key) in enumerate(zip(ids, keys, strict=True)) if id != key]
            hashes += [_hashes(ids), _hashes([keys[row] for row in others])]
            rows += [np.arange(len(ids)) + first, np.array(others, np.int64) + first]
        unsorted, all_rows = np.concatenate(hashes), np.concatenate(rows)
        order = np.lexsort((all_rows, unsorted))
        self._hashes, self._rows = unsorted[order], all_rows[order]

    def rows(self, name: str) -> list[int]:
        """Videos whose id or key may be `name`, in the split's order: all that have it, and seldom one that has not."""
        low, high = (np.searchsorted(self._hashes, hash(name), side) for side in ("left", "right"))
        return self._rows[low:high].tolist()


def _hashes(names: list[str]) -> np.ndarray:
    return np.fromiter(map(hash, names), np.int64, len(names))

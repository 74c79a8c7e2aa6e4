"""Permutations drawn from counters: nothing is kept, and no global random numbers are used."""

import math

import numpy as np

_STREAM = 0x6F72646572  # "order": keeps these draws apart from any others made from the same seed
_SORTED = 4096  # up to here a Feistel network has too few numbers in its tables to mix well, and gains nothing
_ROUNDS = 4  # of both halves; tests/pipelines/test_shuffle.py looks for traces


def stream(seed: int, *place: int) -> np.random.Philox:
    """Random bits that belong to a seed and up to three whole numbers >= 0. numpy promises them for ever."""
    counter = [0, *place, *[0] * (3 - len(place))]  # the first counts the draws
    return np.random.Philox(key=np.array([seed & (2**64 - 1), _STREAM], np.uint64), counter=counter)


def permutations(rows: int, size: int, random: np.random.Philox) -> np.ndarray:
    """int64 [rows, size]: each row an independent permutation of 0 .. size-1.

    Random numbers are sorted, each with its place in the low bits: no two are equal, so every way of sorting, and every
    machine, gives the same. For 2^20 places 44 random bits remain.
    """
    bits = np.uint64(max(1, (size - 1).bit_length()))
    keys = random.random_raw(rows * size).reshape(rows, size)
    keys = (keys >> bits << bits) | np.arange(size, dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def permutation(size: int, random: np.random.Philox) -> np.ndarray:
    """int64 [size]: a permutation of 0 .. size-1. Large ones come from a Feistel network, at a third of sorting's cost.

    Its halves are the row and the column of a number laid out in a near-square; each round adds a table of random numbers,
    looked up by the one, to the other. Numbers beyond `size`, fewer than a row, are passed over.
    """
    if size <= _SORTED:
        return permutations(1, size, random)[0]
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    row = np.repeat(np.arange(height, dtype=np.int32), width)
    column = np.tile(np.arange(width, dtype=np.int32), height)
    for _ in range(_ROUNDS):
        for moved, by, bound in ((row, column, height), (column, row, width)):
            table = (random.random_raw(height) % np.uint64(bound)).astype(np.int32)
            moved += table.take(by)
            moved -= (moved >= bound) * np.int32(bound)
    number = row.astype(np.int64) * width + column
    return number[number < size]


def spread(owner: np.ndarray, batches: int, random: np.random.Philox) -> np.ndarray:
    """Deal grouped items out to batches, at random, so that no batch holds two of one owner.

    owner: [items], equal ones side by side and none more often than there are batches. Returns int64 [rows, batches]:
    of each `batches` items in a row, every batch gets one; batch b holds the items `row * batches + result[row, b]`
    (in the last row only those that exist). Such a dealing always exists and is found without trying: which item a
    batch gets is a Markov chain over the rows, whose permutations are drawn uniformly among those that do not bring an
    owner who stands across the end of a row to a batch twice.
    """
    rows = -(-len(owner) // batches)
    edges = np.flatnonzero(owner[1:] != owner[:-1]) + 1
    edges = np.concatenate([[0], edges, [len(owner)]])
    starts = np.arange(rows) * batches
    group = np.searchsorted(edges, starts, side="right")
    before = (starts - edges[group - 1])[:, None]  # items that the owner at a row's start has in the row above,
    after = (edges[group] - starts)[:, None]  # and in this row
    # a batch that got one of the last `before` items above must not get one of the first `after` here
    drawn = permutations(rows, batches, random)
    allowed = drawn >= after
    taken = allowed & (np.cumsum(allowed, axis=1, dtype=np.int32) <= before)
    last = np.arange(batches) >= batches - before
    move = np.empty_like(drawn)
    move[last], move[~last] = drawn[taken], drawn[~taken]
    return _chained(move)


def _chained(move: np.ndarray) -> np.ndarray:
    """Row r becomes move[r] after .. after move[1] after move[0]: by doubling, so that few large operations do it."""
    rows, size = move.shape
    chain = move.astype(np.int32)  # move[r] takes what stood at i to move[r, i]
    starts = (np.arange(rows, dtype=np.int32) * size)[:, None]
    done = 1
    while done < rows:
        chain[done:] = chain.ravel().take(chain[:-done] + starts[done:])
        done *= 2
    return chain

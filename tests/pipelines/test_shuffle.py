"""Permutations: complete, reproducible, and without a trace that a chi-square test finds."""

from collections import Counter
from itertools import pairwise
from math import factorial, sqrt

import numpy as np
import pytest

from pipelines import shuffle
from pipelines.pair_order import Order
from pipelines.shuffle import permutation, permutations, spread, stream


def excess(observed: np.ndarray, expected: float, freedom: int | None = None) -> float:
    """Chi-square of counts that should all be `expected`, in standard deviations above its mean."""
    observed = np.asarray(observed, float)
    freedom = freedom or observed.size - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 2, 3, 4096, 4097, 4160, 4161, 5000, 39063])
def test_every_number_once(size):
    first = permutation(size, stream(3, 1))
    assert np.array_equal(np.sort(first), np.arange(size))
    assert np.array_equal(first, permutation(size, stream(3, 1)))
    if size > 3:
        for other in (stream(4, 1), stream(3, 2), stream(3, 1, 1), stream(-3, 1)):
            assert (first == permutation(size, other)).mean() < 0.01


def test_all_orders_of_four_are_alike_often():
    rows = permutations(24000, 4, stream(0, 0))
    seen = Counter(map(tuple, rows.tolist()))
    assert len(seen) == factorial(4) and abs(excess(list(seen.values()), 1000)) < 4


def traces(draw) -> dict[str, float]:
    """What would show that permutations of 5000 are not random, each in standard deviations."""
    cell, drawn = 5000 // 25, [draw(seed) for seed in range(60)]
    places = sum(np.histogram2d(np.arange(5000), p, bins=25)[0] for p in drawn)
    steps = np.concatenate([np.diff(p) % 5000 for p in drawn])  # from one to the next
    far = np.concatenate([(p[71:] - p[:-71]) % 5000 for p in drawn])  # the network's rows have 71 numbers
    epochs = sum(np.histogram2d(a, b, bins=25)[0] for a, b in pairwise(drawn))
    rising = np.mean([(np.diff(p) > 0).sum() for p in drawn])
    return {
        "where a number comes to stand": excess(places, cell * 60 / 25, 24**2),
        "what follows a number": excess(np.bincount(steps // 50, minlength=100), len(steps) / 100),
        "what stands a row further": excess(np.bincount(far // 50, minlength=100), len(far) / 100),
        "one epoch tells of the next": excess(epochs, cell * 59 / 25, 24**2),
        "runs": (rising - 4999 / 2) / sqrt(5001 / 12 / 60),
    }


def test_the_feistel_network_leaves_no_trace(monkeypatch):
    found = traces(lambda seed: permutation(5000, stream(seed, 0)))
    assert max(map(abs, found.values())) < 4, found
    monkeypatch.setattr(shuffle, "_ROUNDS", 1)  # the test sees something
    assert max(traces(lambda seed: permutation(5000, stream(seed, 0))).values()) > 20


def test_dealing_out_is_even_and_never_meets_an_owner_twice():
    met, got = np.zeros((12, 12)), np.zeros((30, 5))
    owner = np.repeat(np.arange(12), [5, 1, 2, 3, 1, 4, 2, 2, 1, 5, 1, 3])  # 30 in 6 rows of 5; most rows cut an owner
    for seed in range(2000):
        places = spread(owner, 5, stream(seed, 0))
        items = np.arange(0, 30, 5)[:, None] + places
        assert np.array_equal(np.sort(places, axis=1), np.tile(np.arange(5), (6, 1)))
        for batch in range(5):
            owners = owner[items[:, batch]]
            assert len(set(owners.tolist())) == 6
            met[np.ix_(owners, owners)] += 1
            got[items[:, batch], batch] += 1
    assert abs(excess(got, 400, 24 * 4)) < 4, "any item comes to any batch"
    apart = met[9, [0, 2, 3, 5]] / np.array([5, 2, 3, 4])  # owner 9 is in all batches: it meets each item of all others
    assert np.array_equal(apart, [2000] * 4)


def test_pairs_of_a_block_meet_one_another_alike_often():
    meetings, epochs = np.zeros((24, 24)), 2000
    order = Order([2] * 24, 8, 0)  # 6 batches
    for epoch in range(epochs):
        for step in range(order.steps_per_epoch):
            videos = order.batch(epoch, step)[:, 0]
            meetings[np.ix_(videos, videos)] += 1
    apart = meetings[np.triu_indices(24, 1)]
    assert abs(apart / apart.mean() - 1).max() < 0.08
    assert np.array_equal(np.diag(meetings), [2 * epochs] * 24)


def test_where_a_video_comes_in_an_epoch_is_uniform_with_blocks_too():
    counts, epochs = np.tile([1, 2, 1, 2], 30), 500  # 180 pairs, 15 in each of 12 shards
    order = Order(counts, 9, 1, shard_starts=range(0, 121, 10), block=36)
    assert order.blocks == 5
    seen, together = np.zeros((120, 20)), np.zeros((12, 12))
    for epoch in range(epochs):
        for step in range(20):
            videos = order.batch(epoch, step)[:, 0]
            seen[videos, step] += 1
            shards = np.unique(videos // 10)
            together[np.ix_(shards, shards)] += 1
    for offset in range(10):  # one video of each shard: those of a shard come together
        one = seen[offset::10]
        assert abs(excess(one, one.mean(), 11 * 19)) < 4, offset
    apart = together[np.triu_indices(12, 1)]
    assert abs(apart / apart.mean() - 1).max() < 0.35, "no shards keep each other company"

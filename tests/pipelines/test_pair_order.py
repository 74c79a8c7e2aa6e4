import hashlib
import os
import random
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest

from pipelines.pair_order import Order, rank_rows

UNIFORM = [5] * 40
RAGGED = [1, 7, 2, 2, 9, 1, 4, 3, 3, 1, 6, 2] * 4
MANY = RAGGED * 2


def epoch_of(order: Order, epoch: int = 0) -> list[np.ndarray]:
    return [order.batch(epoch, step) for step in range(order.steps_per_epoch)]


def quiet(counts, batch_size, seed=0, **options) -> Order:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Order(counts, batch_size, seed, **options)


def check(counts, batch_size: int, seed: int = 0, epoch: int = 0, **options) -> Order:
    order = quiet(counts, batch_size, seed, **options)
    batches = epoch_of(order, epoch)
    seen = sorted(map(tuple, np.concatenate(batches).tolist()))
    assert seen == [(v, c) for v, n in enumerate(counts) for c in range(n)], "each pair exactly once"
    for batch in batches:
        assert len(set(batch[:, 0])) == len(batch), "no video twice in a batch"
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size
    return order


@pytest.mark.parametrize(
    "counts, batch_size",
    [
        (UNIFORM, 16),
        (UNIFORM, 7),
        (RAGGED, 16),
        (UNIFORM, 1),
        ([20] * 8, 8),  # a batch holds every video
        ([20] * 8, 7),  # and nearly every one
        ([3] * 5, 100),  # larger than the set
        ([1], 4),
        ([30] + [1] * 20, 4),  # one video with more captions than there would be batches
        ([2, 1, 1], 3),
    ],
)
def test_an_epoch_visits_every_pair_once_and_no_batch_holds_a_video_twice(counts, batch_size):
    for epoch in range(3):
        check(counts, batch_size, seed=epoch, epoch=epoch)


def test_the_same_holds_for_random_sets():
    draw = np.random.default_rng(7)
    for _ in range(1500):
        counts = draw.integers(1, draw.integers(2, 7), size=draw.integers(1, 40)).tolist()
        check(counts, int(draw.integers(1, 2 * len(counts) + 2)), seed=int(draw.integers(1000)))


def test_blocks_keep_all_of_it():
    draw = np.random.default_rng(8)
    cut = 0
    for seed in range(300):
        counts = draw.integers(1, draw.integers(2, 7), size=draw.integers(1, 120))
        starts = np.sort(draw.integers(0, len(counts) + 1, size=draw.integers(0, 12)))  # some shards are empty
        options = {"shard_starts": [0, *starts, len(counts)], "block": int(draw.integers(1, 80))}
        cut += check(counts.tolist(), int(draw.integers(1, 30)), seed, epoch=seed % 3, **options).blocks > 1
    assert cut > 150


def test_a_block_reads_few_shards_and_other_ones_each_epoch():
    counts, starts = np.tile([1, 2, 3], 4000), np.arange(0, 12001, 60)  # 200 shards of 120 pairs
    order = Order(counts, 16, 0, shard_starts=starts, block=480)
    steps = order.steps_per_epoch // order.blocks
    read = []  # shards of each block of two epochs
    for epoch, block in np.ndindex(2, order.blocks):
        first = block * order.steps_per_epoch // order.blocks
        pairs = np.concatenate([order.batch(epoch, step) for step in range(first, first + steps)])
        read.append(frozenset((pairs[:, 0] // 60).tolist()))
        per_batch = [len(set(order.batch(epoch, step)[:, 0] // 60)) for step in range(first, first + steps)]
        assert np.mean(per_batch) > 3.5, "every batch mixes the block's shards"
    assert max(map(len, read)) <= 6  # 4 shards' worth, cut at both ends
    assert len(set(read)) == len(read)
    neighbours = [max(shards) - min(shards) for shards in read]
    assert np.median(neighbours) > 60, "a block's shards come from all over the set"


def test_a_small_set_is_one_block_and_a_large_one_many():
    ones = np.broadcast_to(np.uint8(1), 2**21)
    assert Order(ones[: 2**20], 128, 0, shard_starts=np.arange(0, 2**20 + 1, 2**12)).blocks == 1
    assert Order(ones[: 2**20], 128, 0, shard_starts=np.arange(0, 2**20 + 1, 2**11)).blocks == 32  # too many shards
    large = Order(ones, 128, 0, shard_starts=np.arange(0, 2**21 + 1, 256))
    assert large.blocks == 2**21 // 2**15
    batch = large.batch(5, 12345)
    assert batch.shape == (128, 2) and len(set(batch[:, 0].tolist())) == 128
    assert Order(np.tile([1, 400], 3000), 16, 0, block=1).blocks == 187  # none has fewer steps than a video captions


def test_batches_shrink_with_a_warning_where_a_video_has_more_captions_than_there_are_batches():
    message = r"batches hold 2 pairs instead of 4.*has 30 captions.*train\.batch_size=1 leaves no row empty"
    with pytest.warns(UserWarning, match=message):
        order = Order([30] + [1] * 20, 4, 0)
    assert order.steps_per_epoch == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Order(UNIFORM, 16, 0).steps_per_epoch == 13  # 200 pairs


def test_epochs_and_seeds_differ_and_mix():
    def flat(seed, epoch):
        return np.concatenate(epoch_of(Order(UNIFORM, 16, seed), epoch)).tolist()

    assert flat(0, 0) == flat(0, 0)
    assert flat(0, 0) != flat(0, 1) != flat(1, 1) != flat(0, 0)
    assert flat(-1, 0) != flat(0, 0)  # any integer is a seed
    orders = [np.array(flat(0, e)) for e in range(4)]
    places = np.array([np.lexsort((o[:, 1], o[:, 0])) for o in orders])  # where each pair stands in each epoch
    assert np.abs(np.corrcoef(places) - np.eye(4)).max() < 0.3
    sorted_already = np.corrcoef(orders[0][:, 0], np.arange(len(orders[0])))[0, 1]
    assert abs(sorted_already) < 0.3


@pytest.mark.parametrize("options", [{}, {"shard_starts": range(0, 97, 8), "block": 40}, {"drop_last": True}])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_cut_the_same_global_batch(world, options):
    order = quiet(MANY, 24, 3, **options)
    for step, whole in enumerate(epoch_of(order)):
        parts = [quiet(MANY, 24, 3, **options).batch(0, step)[rank_rows(24, rank, world)] for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert len(set(map(tuple, whole.tolist()))) == sum(map(len, parts)), "ranks share no pair"


def test_a_run_goes_on_past_the_end_of_an_epoch_in_the_same_order():
    options = {"shard_starts": range(0, 49, 8), "block": 40}

    def run(start: int, stop: int) -> list:
        order = Order(RAGGED, 12, 3, **options)  # nothing but (epoch, step) is carried over
        return [order.batch(*divmod(i, order.steps_per_epoch)).tolist() for i in range(start, stop)]

    steps = Order(RAGGED, 12, 3, **options).steps_per_epoch
    unbroken = run(0, 3 * steps)
    for at in (1, steps - 1, steps, steps + 2, 2 * steps - 1):
        assert run(at, 3 * steps) == unbroken[at:]
    assert all(a != b for a, b in pairwise(unbroken))


def test_rank_rows_names_batch_sizes_that_divide():
    with pytest.raises(ValueError, match=r"train\.batch_size=10 does not divide by 4 ranks: use 8 or 12"):
        rank_rows(10, 0, 4)
    with pytest.raises(ValueError, match="use 4 or 8"):
        rank_rows(5, 0, 4)
    with pytest.raises(ValueError, match=r"use 4$"):
        rank_rows(3, 0, 4)


def test_batches_may_be_asked_for_in_any_order():
    order = Order(RAGGED, 8, 0)
    forward = {(e, s): order.batch(e, s) for e in range(4) for s in range(order.steps_per_epoch)}
    other = Order(RAGGED, 8, 0)
    for e, s in reversed(forward):
        assert np.array_equal(other.batch(e, s), forward[e, s])


def test_global_random_state_has_no_part_in_it():
    import torch  # not at the top: a test below starts a process that has no need of it

    first = np.concatenate(epoch_of(Order(RAGGED, 16, 5)))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert np.array_equal(np.concatenate(epoch_of(Order(RAGGED, 16, 5))), first)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def digest(order: Order, epoch: int) -> str:
    return hashlib.sha256(np.concatenate(epoch_of(order, epoch)).astype("<i8").tobytes()).hexdigest()[:16]


def test_the_order_stays_what_it_was():
    # a run started by an older version is resumed by this one: changing these numbers changes its data
    assert digest(Order(RAGGED, 16, 42), 3) == "3ade096a236f992d"
    assert digest(Order([6] * 14, 11, 42), 3) == "728ba0ba5e7e6fe1"  # a batch holds nearly every video
    blocks = Order(RAGGED * 20, 16, 42, shard_starts=range(0, 961, 24), block=200)
    assert digest(blocks, 3) == "10a12cdd9ce31023"
    many = np.broadcast_to(np.uint8(1), 6000)  # a Feistel network
    assert digest(Order(many, 100, 42), 3) == "78107ac3572230d1"


def test_a_fresh_process_draws_the_same():
    code = f"from tests.pipelines.test_pair_order import *; print(digest(Order({RAGGED}, 16, 42), 3))"
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == digest(Order(RAGGED, 16, 42), 3)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="every video needs a caption"):
        Order([2, 0, 1], 2, 0)
    with pytest.raises(ValueError, match="at least one video"):
        Order([], 2, 0)
    with pytest.raises(ValueError, match=r"train\.batch_size=0"):
        Order([1], 0, 0)
    order = Order(UNIFORM, 16, 0)
    for step in (-1, order.steps_per_epoch):
        with pytest.raises(IndexError, match=f"step {step} of an epoch of 13 steps"):
            order.batch(0, step)


@pytest.mark.parametrize("counts", [[20] * 40, [3] * 50, list(range(1, 9)) * 6])
def test_full_batches_only(counts):
    order = Order(counts, 16, 4, drop_last=True)
    left_out = []
    for epoch in range(3):
        batches = [order.batch(epoch, step) for step in range(order.steps_per_epoch)]
        assert order.steps_per_epoch == sum(counts) // 16
        assert all(len(batch) == 16 == len(set(batch[:, 0].tolist())) for batch in batches)
        seen = {tuple(pair) for batch in batches for pair in batch.tolist()}
        assert len(seen) == order.steps_per_epoch * 16
        left_out.append({(v, c) for v, n in enumerate(counts) for c in range(n)} - seen)
    if sum(counts) % 16:
        assert left_out[0] != left_out[1]


def test_full_batches_that_cannot_be_had():
    with pytest.raises(ValueError, match=r"train\.drop_last: 2 full batches"):
        Order([20] * 2, 16, 0, drop_last=True)

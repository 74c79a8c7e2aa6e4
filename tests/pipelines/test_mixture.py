"""Several splits in every batch: by weight, each in its own exact epochs."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.mixture import Mixture, order_of, shares
from pipelines.pair_order import Order
from shards import ShardError
from shards.concat import Concat, open_splits
from shards.split import Split

pytestmark = pytest.mark.slow  # imports DALI

SMALL = DataConfig(num_frames=3, image_size=32, max_words=12, threads=1)
COUNTS = [np.tile([1, 2, 3], 40), np.tile([4], 30), np.tile([1, 5], 10)]  # 240, 120 and 60 pairs


def mixture(weights=(5, 2, 1), batch_size=24, **options) -> Mixture:
    orders = [Order(c, n, i) for i, (c, n) in enumerate(zip(COUNTS, shares(weights, batch_size), strict=True))]
    return Mixture(orders, **options)


def test_each_order_has_its_own_exact_epochs():
    mixed, starts = mixture(), np.cumsum([0] + [len(c) for c in COUNTS])
    batches = [mixed.batch(*divmod(i, mixed.steps_per_epoch)) for i in range(80)]
    for number, order in enumerate(mixed.orders):
        own = [b[(b[:, 0] >= starts[number]) & (b[:, 0] < starts[number + 1])] for b in batches]
        steps = order.steps_per_epoch
        assert steps in (16, 20) and len(own) >= 4 * steps
        for epoch in range(4):
            pairs = np.concatenate(own[epoch * steps : (epoch + 1) * steps]) - [starts[number], 0]
            expected = [(v, c) for v, n in enumerate(COUNTS[number]) for c in range(n)]
            assert sorted(map(tuple, pairs.tolist())) == expected
    for batch in batches:
        assert len(set(batch[:, 0].tolist())) == len(batch) == 24


def test_an_epoch_is_as_long_as_asked_for():
    assert mixture().steps_per_epoch == 18  # 420 pairs
    longer = mixture(epoch_samples=1000)
    assert longer.steps_per_epoch == 42
    assert np.array_equal(longer.batch(1, 3), mixture().batch(2, 9)), "which changes when epochs end, and nothing else"
    with pytest.raises(IndexError, match="step 42 of an epoch of 42"):
        longer.batch(0, 42)


def test_ranks_get_like_shares_of_each():
    batch = mixture().batch(0, 0)
    for rows in np.split(batch, 3):
        assert np.histogram(rows[:, 0], [0, 120, 150, 170])[0].tolist() == [5, 2, 1]


def test_weights_become_whole_numbers():
    assert shares([2, 1], 128) == [85, 43]
    assert shares([1, 1, 1], 8) == [3, 3, 2]
    assert shares([0.5], 7) == [7]
    with pytest.raises(ValueError, match=r"set 2 of 2 would get 0\.13 of the 128 pairs .* raise its weight"):
        shares([1000, 1], 128)
    with pytest.raises(ValueError, match=r"data\.weights=\[1\.0\]: give one number above 0 for each of the 2 folders"):
        DataConfig(train=("a", "b"), weights=(1.0,))
    with pytest.raises(ValueError, match="one number above 0 for each of the 2"):
        DataConfig(train=("a", "b"), weights=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"data\.shuffle_block=-1: must be at least 0"):
        DataConfig(shuffle_block=-1)


@pytest.mark.parametrize(("pairs", "drop_last", "said"), [
    (65, False, "fills 32.5 of its 64 rows of a batch, .*65 pairs .* over 2 batches, .*drop_last=true fills them"),
    (40, False, "fills 40 of its 64 rows of a batch, .*40 pairs .* over 1 batch, .*give it a smaller weight"),
    (65, True, None), (64, False, None), (1300, False, None),
])  # fmt: skip
def test_a_set_that_is_too_small_for_its_weight_is_told(pairs, drop_last, said):
    both = SimpleNamespace(parts=[SimpleNamespace(path=name, shard_starts=None) for name in ("small", "large")])
    sizes, config = [pairs, 6400], DataConfig(train=("small", "large"), weights=(1.0, 1.0))
    groups = SimpleNamespace(size=1, sizes=sizes, counts=[np.ones(n, np.uint8) for n in sizes])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mixed = order_of(both, config, 128, 0, drop_last, groups)
    here = np.mean([(mixed.batch(0, step)[:, 0] < pairs).sum() for step in range(20)])
    assert (here >= 0.95 * 64) == (said is None)
    assert len(caught) == (said is not None) and all(re.search(f"small {said}", str(w.message)) for w in caught)


def test_drop_last_is_not_advised_where_another_set_is_too_small_for_it():
    both = SimpleNamespace(parts=[SimpleNamespace(path=name, shard_starts=None) for name in ("small", "tiny")])
    sizes, config = [65, 40], DataConfig(train=("small", "tiny"), weights=(1.0, 1.0))
    groups = SimpleNamespace(size=1, sizes=sizes, counts=[np.ones(n, np.uint8) for n in sizes])
    with pytest.raises(ValueError, match=r"train\.drop_last: 0 full batches"):
        order_of(both, config, 128, 0, True, groups)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        order_of(both, config, 128, 0, False, groups)
    assert [str(one.message).rpartition("; ")[2] for one in caught] == ["give it a smaller weight"] * 2


def test_a_batch_far_larger_than_the_set_is_refused(numbered):
    pairs = int(sum(numbered.intra.caption_counts))
    with pytest.warns(UserWarning, match="batches hold 12 pairs"):
        assert order_of(numbered.intra, DataConfig(), 1024, 0, False).pairs == pairs < 512
    with pytest.raises(ValueError, match=rf"train\.batch_size=1025: .* data\.train has {pairs} pairs"):
        order_of(numbered.intra, DataConfig(), 1025, 0, False)


@pytest.fixture
def two(numbered, tmp_path) -> SimpleNamespace:
    """The copy split and another that looks like a different set."""
    other = shutil.copytree(numbered.intra.path, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(info | {"digest": "f" * 64}))
    return SimpleNamespace(intra=numbered.intra, copy=numbered.copy, other=Split(other))


def test_joined_splits_read_as_one(two):
    joined = open_splits([two.intra.path, two.other.path])
    assert len(joined) == 24 and joined.info["profile"] == two.intra.info["profile"]
    assert joined.info["captions"] == 48 and joined.digest not in (two.intra.digest, two.other.digest)
    for index in (0, 11, 12, 23):
        alone, video = (two.intra, two.other)[index // 12], joined.video(index)
        assert video.index == index and video.key == alone.video(index % 12).key
        assert joined.captions(index) == alone.captions(index % 12)
        assert joined.read(video, 5, 20) == alone.read(alone.video(index % 12), 5, 20)
        assert joined.json(video) == alone.json(alone.video(index % 12))
    with pytest.raises(IndexError, match=r"video 24 of 24 in .*intra.* \+ .*other"):
        joined.video(24)
    with pytest.raises(ShardError, match="hold the same videos: name the set once"):
        open_splits([two.intra.path, two.intra.path])
    assert Concat([two.copy, two.other]).info["profile"] == {"name": "mixed"}
    assert isinstance(open_splits([two.intra.path]), Split) and isinstance(open_splits(str(two.intra.path)), Split)


def test_a_loader_mixes_splits_and_goes_on_exactly(two):
    joined, config = Concat([two.intra, two.other]), replace(SMALL, train=("a", "b"), weights=(2.0, 1.0))

    def run(start, count, **options):
        with Loader(joined, config, batch_size=6, seed=0, **options) as loader:
            assert loader.steps_per_epoch == 8  # 48 pairs
            return list(loader.batches(*divmod(start, 8), count=count))

    unbroken = run(0, 13)
    for batch in unbroken:
        assert np.histogram(batch.pairs[:, 0], [0, 12, 24])[0].tolist() == [4, 2] and batch.valid.all()
        assert batch.keys == [joined.video(int(v)).key for v in batch.pairs[:, 0]]
    resumed = run(7, 6)  # past the end of the first's epoch, the mixture's, and the second's
    ranks = [run(7, 6, rank=r, world=2) for r in range(2)]
    for step, (a, b) in enumerate(zip(unbroken[7:], resumed, strict=True)):
        assert (a.epoch, a.step, a.keys, a.captions) == (b.epoch, b.step, b.keys, b.captions)
        assert a.frames.equal(b.frames) and np.array_equal(a.frame_numbers, b.frame_numbers)
        assert a.keys == [key for rank in ranks for key in rank[step].keys]


def test_a_set_that_comes_round_again_in_an_epoch_shows_other_frames(two):
    """Twelve videos, two a step: after six steps they come again, in the same epoch of the mixture."""
    joined = Concat([two.intra, two.other])
    config = replace(SMALL, train=("a", "b"), weights=(1.0, 2.0), sampling="random", num_frames=2)

    def run() -> list:
        with Loader(joined, config, batch_size=6, seed=0) as loader:
            return list(loader.batches(count=loader.steps_per_epoch))

    batches, again = run(), run()
    shown: dict[tuple, list] = {}
    for batch in batches:
        for pair, numbers in zip(batch.pairs.tolist(), batch.frame_numbers.tolist(), strict=True):
            shown.setdefault(tuple(pair), []).append(tuple(numbers))
    repeated = [numbers for numbers in shown.values() if len(numbers) > 1]
    assert repeated and sum(len(set(numbers)) > 1 for numbers in repeated) > len(repeated) / 2
    assert all(np.array_equal(a.frame_numbers, b.frame_numbers) for a, b in zip(batches, again, strict=True))


def test_an_epoch_of_one_set_is_as_long_as_asked_for_too(two):
    order = order_of(two.intra, replace(SMALL, epoch_samples=10), 6, 0, False)
    plain = order_of(two.intra, SMALL, 6, 0, False)
    assert (order.steps_per_epoch, plain.steps_per_epoch) == (2, 4)
    for place in range(10):
        assert np.array_equal(order.batch(*divmod(place, 2)), plain.batch(*divmod(place, 4)))


def test_without_weights_a_set_gets_as_many_as_it_has_captions(two):
    order = order_of(Concat([two.intra, two.other]), SMALL, 6, 0, False)
    assert [o.batch_size for o in order.orders] == [3, 3]
    first, second = ([o.batch(0, s).tolist() for s in range(8)] for o in order.orders)
    assert first != second, "sets of the same size are not shuffled alike"
    assert order_of(two.intra, replace(SMALL, paragraph=True), 6, 0, False).pairs == 12

"""Batches from several splits at once, each in its own exact order."""

import warnings
from collections.abc import Sequence

import numpy as np

from pipelines.captions import CaptionGroups
from pipelines.config import DataConfig
from pipelines.pair_order import Order, PairOrder
from shards import count
from shards.dataset import Dataset

_SMALL_BATCH = 1024  # pairs; one up to this may be larger than the set, as in trials on a few videos
_NEARLY = 0.95  # of its share of a batch: a set that gets less is told


class Mixture:
    """Orders side by side: a batch is a batch of each, and an order that comes to its end starts its next epoch.

    So every one of them visits each of its pairs once in each of its own epochs, whatever the others do, and no batch
    holds a video twice. Videos are numbered through, those of the second order after those of the first. An epoch of the
    mixture is `epoch_samples` pairs; 0: as many as all orders have.
    """

    def __init__(self, orders: Sequence[Order], epoch_samples: int = 0):
        self.orders = orders
        self.batch_size = sum(order.batch_size for order in orders)
        self.pairs = epoch_samples or sum(order.pairs for order in orders)
        self.steps_per_epoch = -(-self.pairs // self.batch_size)
        self._first_videos = np.cumsum([0] + [len(order.counts) for order in orders])

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [pairs, 2]: as Order.batch(). The orders' pairs alternate evenly, so that ranks get like shares of them."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        since_start = epoch * self.steps_per_epoch + step
        parts = [order.batch(*divmod(since_start, order.steps_per_epoch)) for order in self.orders]
        parts = [part + np.array([first, 0]) for part, first in zip(parts, self._first_videos, strict=False)]
        places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
        return np.concatenate(parts)[np.argsort(places, kind="stable")]

    def own_epoch(self, video: int, epoch: int, step: int) -> int:
        """That of the order which the video belongs to."""
        order = self.orders[int(np.searchsorted(self._first_videos, video, side="right")) - 1]
        return (epoch * self.steps_per_epoch + step) // order.steps_per_epoch


def order_of(
    split: Dataset, config: DataConfig, batch_size: int, seed: int, drop_last: bool,
    groups: CaptionGroups | None = None,
) -> PairOrder:  # fmt: skip
    """The order in which training visits a split, or several. Raises ValueError for weights that cannot be had.

    groups: its captions; None: each by itself, and all of them.
    """
    if batch_size < 1:
        raise ValueError(f"train.batch_size={batch_size}: must be at least 1")
    groups = groups or CaptionGroups(split, config, 1, seed)
    splits, sizes = split.parts, groups.sizes
    if batch_size > max(_SMALL_BATCH, 2 * sum(sizes)):
        raise ValueError(
            f"train.batch_size={batch_size}: every step would be padded to it, and data.train has {count(sum(sizes), 'pair' if groups.size == 1 else 'row')}. "
            "Set a smaller one"
        )
    weights = config.weights or sizes
    orders = [
        Order(
            counts,
            share,
            seed + (number << 32),  # sets of the same size must not be shuffled alike
            drop_last,
            shard_starts=one.shard_starts,
            block=config.shuffle_block,
            together=groups.size,
        )
        for number, (one, counts, share) in enumerate(
            zip(splits, groups.counts, shares(weights, batch_size), strict=True)
        )
    ]
    if config.weights and len(splits) > 1:
        # as train.drop_last needs
        drops = all(order.pairs // order.batch_size >= order.counts.max() for order in orders)
        for one, order in zip(splits, orders, strict=True):
            _say_if_short(one.path, order, drops)
    return Mixture(orders, config.epoch_samples) if len(splits) > 1 or config.epoch_samples else orders[0]


def _say_if_short(path: object, order: Order, drops: bool) -> None:
    """Warn of a set that is too small for its share: its epochs are exact, so it cannot begin anew within a batch. drops: whether
    train.drop_last is possible."""
    pairs = order.pairs / order.steps_per_epoch
    if pairs >= _NEARLY * order.batch_size:
        return
    steps = order.steps_per_epoch
    way = "train.drop_last=true fills them all" if drops else "give it a smaller weight"
    warnings.warn(
        f"data.weights: {path} fills {pairs:.3g} of its {order.batch_size} rows of a batch, the others stay empty: its "
        f"{count(order.pairs, 'pair')} are shared out evenly over {steps} batch{'es' * (steps > 1)}, an epoch of its own; {way}",
        stacklevel=3,
    )


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """Pairs of every batch that each weight gets: whole numbers that sum to `batch_size`, by largest remainder."""
    exact = np.array(weights, float) / sum(weights) * batch_size
    pairs = np.floor(exact).astype(int)
    most = np.argsort(pairs - exact, kind="stable")[: batch_size - int(pairs.sum())]
    pairs[most] += 1
    if not pairs.all():
        number = int(np.argmin(pairs))
        raise ValueError(
            f"data.weights: set {number + 1} of {len(pairs)} would get {exact[number]:.2g} of the {batch_size} pairs of a "
            "batch; raise its weight or train.batch_size, or leave the set out"
        )
    return pairs.tolist()

"""Which (video, caption) pairs a step sees.

A pure function of (seed, epoch, step): no state, no shuffle buffer, no global random numbers. Every epoch visits every
pair once; no global batch holds one video twice; batch sizes within an epoch differ by at most one. Ranks cut the
global batch, so it is the same for every number of them.

An epoch is laid out in three moves, none of which needs the whole set. The shards are permuted. Their pairs, end to end,
are cut into blocks of some steps each. Within a block everything is shuffled. So a step costs the permutation of the
shards and the shuffling of one block, and reads from the few shards of that block. What is given up is that pairs meet
only pairs of their block: of shards that are other ones each epoch, but of no others in that epoch. Sets of up to
FULL_SHUFFLE pairs in FULL_SHARDS shards are one block, where nothing is given up; it is shuffled once an epoch, in a
quarter of a second at most, and its sample tables fit in memory.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pipelines.captions import groups_of
from pipelines.shuffle import permutation, spread, stream
from shards import count

FULL_SHUFFLE = 2**20  # pairs of the largest set that is shuffled as a whole by default
FULL_SHARDS = 400  # and its shards: a Split keeps the tables of some more, and a batch may come from all of them
BLOCK = 2**15  # pairs of a block of any larger one


class PairOrder(Protocol):
    """What says which pairs a step sees: `Order` for one split, `mixture.Mixture` for several."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps from one epoch to the next."""

    @property
    def pairs(self) -> int:
        """Pairs of an epoch."""

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [pairs, 2]: (video, caption of that video) of the global batch at `step` of `epoch`, both from 0."""

    def own_epoch(self, video: int, epoch: int, step: int) -> int:
        """Which time the video's captions are gone through at `step` of `epoch`: of several sets, each has epochs of its own."""


class Order:
    """The order of a split's pairs.

    caption_counts: whole numbers [videos], captions of each video, at least 1. batch_size: pairs a global batch holds at
    most. drop_last: every batch holds exactly that many, and the few pairs that are over, others each epoch, are left
    out. shard_starts: [shards + 1], the first video of each shard and the number of all; None: one shard. block: pairs
    of a block, about; 0: see above. A block has at least as many steps as any video captions.

    together: above 1, captions are taken in groups of so many, and a video has as many pairs as groups: (video, group of its
    captions). See pipelines.captions.
    """

    def __init__(
        self,
        caption_counts: np.ndarray,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        *,
        shard_starts: np.ndarray | None = None,
        block: int = 0,
        together: int = 1,
    ):
        self.counts = np.asarray(caption_counts)
        if len(self.counts) == 0 or self.counts.min() < 1:
            raise ValueError("every video needs a caption, and the split needs at least one video")
        if batch_size < 1:
            raise ValueError(f"train.batch_size={batch_size}: must be at least 1")
        self.counts = groups_of(self.counts, together)
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._captions = "captions" if together == 1 else f"groups of {together} captions"
        self._starts = np.unique([0, len(self.counts)] if shard_starts is None else shard_starts)  # none is empty
        self._shard_pairs = np.add.reduceat(self.counts, self._starts[:-1], dtype=np.int64)
        self.pairs, self._most = int(self._shard_pairs.sum()), int(self.counts.max())
        self.steps_per_epoch = self._count_steps()
        small = self.pairs <= FULL_SHUFFLE and len(self._shard_pairs) <= FULL_SHARDS
        block = block or (self.pairs if small else BLOCK)
        self.blocks = max(1, self.steps_per_epoch // max(-(-block // batch_size), self._most))
        self._line = lru_cache(maxsize=2)(self._draw_line)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [pairs, 2]: (video, caption of that video) of the global batch at `step` of `epoch`, both from 0."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        # the block whose range of steps, as _draw_block cuts them, holds this one
        block = self._block(epoch, ((step + 1) * self.blocks - 1) // self.steps_per_epoch)
        return block.batch(step - block.first)

    def own_epoch(self, video: int, epoch: int, step: int) -> int:
        """The epoch itself."""
        return epoch

    def _count_steps(self) -> int:
        if self.drop_last:
            full = self.pairs // self.batch_size
            if full < self._most:
                raise ValueError(
                    f"train.drop_last: {full} full batches of {self.batch_size} are too few to keep apart the {self._most} "
                    f"{self._captions} of one video; use a smaller train.batch_size, or train.drop_last=false"
                )
            return full
        # a video must meet each of its captions in another batch, so no epoch has fewer batches than captions a video
        full = -(-self.pairs // self.batch_size)
        if self._most <= full:
            return full
        fill = self.pairs / self._most
        warnings.warn(
            f"batches hold {fill:.0f} pairs instead of {self.batch_size}: a video has {self._most} {self._captions}, no batch may hold "
            f"a video twice, and there are {count(len(self.counts), 'video')}. train.batch_size={max(1, int(fill))} leaves no row empty",
            stacklevel=3,
        )
        return self._most

    def _draw_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards as this epoch has them, int64 [shards], and the pairs up to the end of each.

        With several blocks the line starts somewhere within its first shard, whose beginning then ends it: else a
        shard's first videos would come first more often than others.
        """
        random = stream(self.seed, epoch)
        shards = permutation(len(self._shard_pairs), random)
        if self.blocks == 1:
            return shards, np.cumsum(self._shard_pairs[shards])
        skipped = int(random.random_raw()) % int(self._shard_pairs[shards[0]])
        shards = np.append(shards, shards[0])
        return shards, np.cumsum(self._shard_pairs[shards]) - skipped

    def _draw_block(self, epoch: int, block: int) -> "_Block":
        random = stream(self.seed, epoch, 1 + block)
        first, last = (b * self.steps_per_epoch // self.blocks for b in (block, block + 1))
        if self.drop_last:  # what is over is left out of the last block
            low, high, kept = first * self.batch_size, last * self.batch_size, (last - first) * self.batch_size
            high = self.pairs if last == self.steps_per_epoch else high
        else:
            low, high = (step * self.pairs // self.steps_per_epoch for step in (first, last))
            kept = high - low
        videos, first_captions, counts = self._videos_between(epoch, low, high)
        order = permutation(len(videos), random)
        video, counts = np.repeat(videos[order], counts[order]), counts[order]
        begins = np.cumsum(counts) - counts
        caption = np.arange(high - low) + np.repeat(first_captions[order] - begins, counts)
        if kept < high - low:
            stay = np.sort(permutation(high - low, random)[:kept])
            video, caption = video[stay], caption[stay]
        once = len(counts) == high - low  # no video has two pairs here: dealing them out in turn is random already
        places = None if once else spread(video, last - first, random)
        return _Block(first, last - first, video, caption, places)

    def _videos_between(self, epoch: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The videos whose pairs stand at [low, high) of the epoch's line: numbers, first captions there, how many."""
        shards, ends = self._line(epoch)
        here = shards[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, high, side="left") + 1]
        sizes = self._starts[here + 1] - self._starts[here]
        videos = np.arange(sizes.sum()) + np.repeat(self._starts[here] - (np.cumsum(sizes) - sizes), sizes)
        counts = self.counts[videos].astype(np.int64)
        ends_of = np.cumsum(counts) + int(ends[np.searchsorted(ends, low, side="right")] - self._shard_pairs[here[0]])
        begins_of = ends_of - counts
        begins, stops = np.maximum(begins_of, low), np.minimum(ends_of, high)
        inside = stops > begins
        return videos[inside], (begins - begins_of)[inside], (stops - begins)[inside]


@dataclass(frozen=True)
class _Block:
    """`steps` batches from step `first` on. `places` is spread()'s answer; None deals the pairs out in turn."""

    first: int
    steps: int
    video: np.ndarray  # int64 [pairs]
    caption: np.ndarray  # int64 [pairs]
    places: np.ndarray | None

    def batch(self, step: int) -> np.ndarray:
        rows = np.arange(0, len(self.video), self.steps)
        at = rows + (step if self.places is None else self.places[:, step])
        at = at[at < len(self.video)]
        return np.stack([self.video[at], self.caption[at]], axis=1)


def check_rank(rank: int, world: int) -> None:
    """Raise ValueError if there is no such rank."""
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}: must be from 0 to {world - 1}, as world={world}")


def rank_rows(batch_size: int, rank: int, world: int) -> slice:
    """The rows of a global batch that a rank takes. Raises ValueError if they cannot be shared out evenly."""
    check_rank(rank, world)
    if batch_size % world:
        usable = [n for n in (batch_size // world * world, (batch_size // world + 1) * world) if n]
        raise ValueError(
            f"train.batch_size={batch_size} does not divide by {world} ranks: use {' or '.join(map(str, usable))}"
        )
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)

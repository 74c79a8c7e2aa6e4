"""Which (video, caption) pairs a step sees.

A pure function of (seed, epoch, step): no state, no shuffle buffer, no global random numbers. Every epoch visits every
pair once; no global batch holds one video twice; batch sizes within an epoch differ by at most one. Ranks cut the
global batch, so it is the same for every number of them.
"""

import warnings
from collections import Counter
from functools import lru_cache

import numpy as np

_REPAIR_TRIES = 200


class Order:
    """The order of a split's pairs.

    caption_counts: int [videos], captions of each video, at least 1. batch_size: pairs a global batch holds at most.
    drop_last: every batch holds exactly that many, and the few pairs that are over, others each epoch, are left out.
    """

    def __init__(self, caption_counts: np.ndarray, batch_size: int, seed: int, drop_last: bool = False):
        self.counts = np.asarray(caption_counts, np.int64)
        if len(self.counts) == 0 or self.counts.min() < 1:
            raise ValueError("every video needs a caption, and the split at least one video")
        if batch_size < 1:
            raise ValueError(f"train.batch_size={batch_size}: must be at least 1")
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.pairs = int(self.counts.sum())
        if drop_last and self.pairs // batch_size < self.counts.max():
            raise ValueError(
                f"train.drop_last: {self.pairs // batch_size} full batches of {batch_size} cannot keep apart the "
                f"{self.counts.max()} captions of one video; use a smaller train.batch_size, or train.drop_last=false"
            )
        # a video must meet each of its captions in another batch, so no epoch has fewer batches than captions a video
        full = -(-self.pairs // batch_size)
        self.steps_per_epoch = max(full, int(self.counts.max()))
        if drop_last:
            self.steps_per_epoch = self.pairs // batch_size
        elif self.steps_per_epoch > full:
            fill = self.pairs / self.steps_per_epoch
            warnings.warn(
                f"batches hold {fill:.0f} pairs, not {batch_size}: a video has {self.counts.max()} captions, no batch may "
                f"hold a video twice, and there are {len(self.counts)} videos. train.batch_size={max(1, int(fill))} wastes none",
                stacklevel=2,
            )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [pairs, 2]: (video, caption of that video) of the global batch at `step` of `epoch`, both from 0."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        pairs, bounds = self._epoch(epoch)
        return pairs[bounds[step] : bounds[step + 1]]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.Philox(key=np.array([self.seed & (2**64 - 1), epoch], np.uint64))
        shown = self.steps_per_epoch * self.batch_size if self.drop_last else self.pairs
        bounds = np.linspace(0, shown, self.steps_per_epoch + 1).round().astype(np.int64)
        video = np.repeat(np.arange(len(self.counts)), self.counts)
        caption = np.arange(self.pairs) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        # argsort of raw counter output: numpy promises those bits for ever, and its own permutation() not
        order = np.argsort(random.random_raw(self.pairs), kind="stable")
        if self.drop_last:
            video, caption, order = video[order[:shown]], caption[order[:shown]], np.arange(shown)
        order = _separate(order, video, bounds, random)
        return np.stack([video[order], caption[order]], axis=1), bounds


def rank_rows(batch_size: int, rank: int, world: int) -> slice:
    """The rows of a global batch that a rank takes. Raises ValueError if they cannot be shared out evenly."""
    if batch_size % world:
        usable = [n for n in (batch_size // world * world, (batch_size // world + 1) * world) if n]
        raise ValueError(
            f"train.batch_size={batch_size} does not divide by {world} ranks: use {' or '.join(map(str, usable))}"
        )
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)


def _separate(order: np.ndarray, video: np.ndarray, bounds: np.ndarray, random: np.random.Philox) -> np.ndarray:
    """Swap pairs between batches until none holds a video twice."""
    steps = len(bounds) - 1
    batch_of = np.repeat(np.arange(steps), np.diff(bounds))
    cell = batch_of * (int(video.max()) + 1) + video[order]  # one number for each (batch, video)
    _, first = np.unique(cell, return_index=True)
    clashing = np.setdiff1d(np.arange(len(order)), first)
    if len(clashing) == 0:
        return order
    order = order.copy()
    held = set(cell.tolist())
    extra = Counter(cell[clashing].tolist())  # copies of a video in a batch beyond the first
    width = int(video.max()) + 1
    for here in clashing.tolist():
        if not extra[int(batch_of[here]) * width + int(video[order[here]])]:
            continue  # a swap for another pair has parted them already
        for there in (random.random_raw(_REPAIR_TRIES) % np.uint64(len(order))).tolist():
            mine, other = int(video[order[here]]), int(video[order[there]])
            a, b = int(batch_of[here]), int(batch_of[there])
            if a != b and a * width + other not in held and b * width + mine not in held:
                order[here], order[there] = order[there], order[here]
                extra[a * width + mine] -= 1
                if extra[b * width + other]:
                    extra[b * width + other] -= 1
                else:
                    held.remove(b * width + other)
                held |= {a * width + other, b * width + mine}
                break
        else:
            return _striped(video, steps, random)
    return order


def _striped(video: np.ndarray, steps: int, random: np.random.Philox) -> np.ndarray:
    """Deal the pairs out video by video, one to each batch in turn: less mixed, and possible whenever anything is.

    Used for tiny sets, where a batch holds nearly all videos. Pairs of a video stand together and there are no more
    of them than batches, so no batch gets two.
    """
    videos = int(video.max()) + 1
    rank_of_video = np.argsort(np.argsort(random.random_raw(videos), kind="stable"), kind="stable")
    noise = random.random_raw(len(video))
    grouped = np.lexsort((noise, rank_of_video[video]))
    batch_order = np.argsort(np.argsort(random.random_raw(steps), kind="stable"), kind="stable")
    # pair i goes to batch i mod steps; batches 0..r-1 get one more where the division leaves r, so put them where
    # the bounds have room
    sizes = np.diff(np.linspace(0, len(video), steps + 1).round().astype(np.int64))
    roomy = np.argsort(-sizes, kind="stable")
    extra = len(video) % steps
    target = np.empty(steps, np.int64)
    target[:extra] = roomy[:extra][np.argsort(batch_order[:extra], kind="stable")]
    target[extra:] = roomy[extra:][np.argsort(batch_order[extra:], kind="stable")]
    return grouped[np.argsort(target[np.arange(len(video)) % steps], kind="stable")]

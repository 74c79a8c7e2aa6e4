"""The texts that describe a video, and which of them a row of a training batch has: one, or a group of several."""

import numpy as np

from pipelines.config import DataConfig
from pipelines.shuffle import permutation, stream
from shards import count
from shards.dataset import Dataset
from shards.split import Split


def texts_of(split: Dataset, video: int, config: DataConfig) -> list[str]:
    """The texts that describe a video: its captions, or with `config.paragraph` all of them as one."""
    texts = [caption["text"] for caption in split.captions(video)]
    return [" ".join(texts)] if config.paragraph else texts


def groups_of(counts: np.ndarray, size: int) -> np.ndarray:
    """Captions of each video, [videos] -> groups of `size` at most that they make, of the same type."""
    return counts if size == 1 else (-(-counts.astype(np.int64) // size)).astype(counts.dtype)


class CaptionGroups:
    """The captions of each video of `split`, in groups of `size` at most.

    In each epoch a video's captions are shuffled and cut into as few groups as there can be, whose sizes differ by one at most; so
    each caption is in one of them. Which ones is a pure function of (seed, epoch, video). In groups of one, caption i is group i.

    With data.drop_duplicate_captions, only the first of equal captions of a video takes part. To find them, the captions of all
    videos that have several are read.

    counts: of each part of the split, captions of its videos that take part, [videos]. notes: how many were dropped, for people.
    """

    def __init__(self, split: Dataset, config: DataConfig, size: int, seed: int):
        self._split, self._config, self._seed, self.size = split, config, seed, size
        self._kept: dict[int, np.ndarray] = {}  # by video, where some captions are dropped
        self.notes: list[str] = []
        self.counts: list[np.ndarray] = []
        first = 0
        for part in split.parts:
            counts = np.broadcast_to(np.uint8(1), len(part)) if config.paragraph else part.caption_counts
            if config.drop_duplicate_captions:
                counts = self._without_duplicates(part, first, counts)
            self.counts.append(counts)
            first += len(part)

    def _without_duplicates(self, part: Split, first: int, counts: np.ndarray) -> np.ndarray:
        counts, dropped = counts.copy(), 0
        for video in np.flatnonzero(counts > 1).tolist():
            texts = [" ".join(caption["text"].casefold().split()) for caption in part.captions(video)]
            kept = list({text: number for number, text in reversed(list(enumerate(texts)))}.values())[::-1]
            if len(kept) < len(texts):
                self._kept[first + video] = np.sort(kept)
                counts[video], dropped = len(kept), dropped + len(texts) - len(kept)
        total = part.info["captions"]
        self.notes.append(
            f"data.drop_duplicate_captions: {dropped} of {count(total, 'caption')} in {part.path} repeat one of their video and are left out"
        )
        return counts

    @property
    def sizes(self) -> list[int]:
        """Groups of each part of the split."""
        return [int(groups_of(counts, self.size).sum(dtype=np.int64)) for counts in self.counts]

    @property
    def captions_a_row(self) -> float:
        """Captions of a group, on average over the rows of batches (see data.weights)."""
        means = [counts.sum(dtype=np.int64) / size for counts, size in zip(self.counts, self.sizes, strict=True)]
        return float(np.average(means, weights=self._config.weights or self.sizes))

    def texts(self, video: int, number: int, epoch: int) -> tuple[str, ...]:
        """The captions of group `number` of a video in an epoch of its set (see PairOrder.own_epoch)."""
        return self.numbered(video, number, epoch)[1]

    def numbered(self, video: int, number: int, epoch: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """As `texts`, and before them the number of each among all texts of the video (`texts_of`), from 0."""
        texts = texts_of(self._split, video, self._config)
        kept = self._kept.get(video, np.arange(len(texts)))
        numbers = kept if self.size > 1 else kept[[number]]
        groups = -(-len(numbers) // self.size)
        if groups > 1:
            # the third number keeps it apart from Order's draws
            order = permutation(len(kept), stream(self._seed, epoch, video, 1))
            low, high = (part * len(kept) // groups for part in (number, number + 1))
            numbers = kept[order[low:high]]
        return tuple(numbers.tolist()), tuple(texts[i] for i in numbers)

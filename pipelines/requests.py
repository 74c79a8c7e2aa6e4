"""Which clips are made: the source of the chain, and what passes along it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import cast

import numpy as np
import torch

from pipelines.captions import CaptionGroups
from pipelines.config import ClipsConfig, DataConfig
from pipelines.frame_sampling import candidates, choose, draws, generator, ordered, shown_between
from pipelines.narration import clip_of_pair
from pipelines.pair_order import PairOrder, check_rank
from pipelines.stages.fetch import NOTHING, BadSample, Source
from shards.dataset import Dataset
from shards.schema import Video

_REPLACEMENT_TRIES = 64  # batches looked through for a replacement


@dataclass(frozen=True)
class ClipRequest:
    """The frames of one clip: positions in the video's frame table, int64 [frames], in clip order, any of them twice.

    `draw`, (seed, epoch of its set, video, caption), decides its view where training augments; without it the clip looks as the
    recipe says. `texts`: the captions that describe it, in training; `captions`: the number of each among all texts of the video, from 0;
    of a part of a video (clips.cut) not said."""

    video: Video
    positions: np.ndarray
    draw: tuple[int, int, int, int] | None = None
    texts: tuple[str, ...] = ()
    captions: tuple[int, ...] = ()


@dataclass(eq=False)
class Sample:
    """A clip on its way along the chain. Each stage fills in what it is for.

    request  what is wanted; no stage looks at it where the sample is `empty`
    pair     (video, caption) in training
    empty    it stands for a batch in which this rank has no clip, and goes along the chain for that batch's place
    source   what was fetched
    frames   uint8 [n, H, W, 3] (an array, a tensor on the device, or a list of pictures), good until the next group of
             samples is asked for; `positions` int64 [n], which stored frames these are, increasing
    error    why the clip cannot be had; a later stage passes it on
    """

    batch: "BatchPlan"
    row: int
    request: ClipRequest
    pair: np.ndarray | None = None
    empty: bool = False
    source: Source = field(default_factory=lambda: NOTHING)
    frames: np.ndarray | torch.Tensor | list[np.ndarray] | None = None
    positions: np.ndarray = field(default_factory=lambda: NOTHING.positions)
    error: BadSample | None = None


@dataclass(eq=False)
class BatchPlan:
    """One rank's share of a batch while it is made.

    place    of the batch among all, counted through the epochs
    rows     of the tensors, those without a clip included
    total    clips that all ranks together have in it
    memory   what the clips are written into, row by row, once the first is there
    ready    on a GPU: happens once they are written
    """

    place: int
    rows: int
    total: int
    samples: list[Sample] = field(default_factory=list)
    memory: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None

    def add(self, request: ClipRequest, pair: np.ndarray | None = None) -> None:
        """One more clip, in the next row."""
        self.samples.append(Sample(self, len(self.samples), request, pair))

    def complete(self) -> list[Sample]:
        """The samples, or one that is empty."""
        if not self.samples:
            self.samples = [Sample(self, 0, cast(ClipRequest, None), empty=True)]
        return self.samples

    @property
    def clips(self) -> list[Sample]:
        """The samples, without an empty one."""
        return [sample for sample in self.samples if not sample.empty]

    @property
    def frames(self) -> torch.Tensor:
        """All rows, of whatever is written in them; see stages/collate.py for shapes."""
        assert self.memory is not None, "the batch has not come as far as its frames"
        return self.memory

    def take(self) -> tuple[list[Sample], torch.Tensor]:
        """The clips and the frames, which the plan forgets.

        Plan and samples refer to each other. Without this, the frames' memory would be free only when Python looks for such
        circles, and every batch would be written into new memory, which costs as much as decoding it.
        """
        clips, frames = self.clips, self.frames
        self.samples, self.memory = [], None
        return clips, frames


class TrainingRequests:
    """The clips of a rank's rows of every batch: a pure function of (seed, epoch, step).

    captions: which ones a pair of `order` has; without clips.cut. pool: stored frames of a video that random rules draw from; 0: all.
    """

    def __init__(
        self, split: Dataset, config: DataConfig, clips: ClipsConfig, order: PairOrder, captions: CaptionGroups,
        rows: slice, seed: int, pool: int,
    ):  # fmt: skip
        self._split, self._config, self._clips, self._seed, self._pool = split, config, clips, seed, pool
        self.order, self._captions, self._rows = order, captions, rows

    def samples(self, place: int, count: int | None) -> Iterator[Sample]:
        """The samples of `count` batches (without end if None) from `place` on, in the order of batches and rows."""
        end = None if count is None else place + count
        while end is None or place < end:
            epoch, step = divmod(place, self.order.steps_per_epoch)
            pairs = self.order.batch(epoch, step)
            plan = BatchPlan(place, self._rows.stop - self._rows.start, len(pairs))
            for pair in pairs[self._rows]:
                plan.add(self.request(pair, epoch, step), pair)
            yield from plan.complete()
            place += 1

    def request(self, pair: np.ndarray, epoch: int, step: int) -> ClipRequest:
        """What the pair (video, caption) shows at a step."""
        video, config = self._split.video(int(pair[0])), self._config
        # a set of a mixture may come round several times in an epoch
        own = self.order.own_epoch(video.index, epoch, step)
        draw = (self._seed, own, int(pair[0]), int(pair[1]))
        drawn = draws(config.sampling) or config.frame_order == "random"
        random = generator(*draw) if drawn else None
        numbers: tuple[int, ...] = ()
        if self._clips.cut:
            clip = clip_of_pair(self._split.captions(video.index), int(pair[1]), video.duration, self._clips)
            between, texts = shown_between(video, clip.start, clip.end, config.sampling), clip.texts
        else:
            between, (numbers, texts) = None, self._captions.numbered(video.index, int(pair[1]), own)
        among = candidates(video, self._pool) if self._pool and draws(config.sampling) else None
        positions = choose(video, config.sampling, config.num_frames, config.fps, random, among, between)
        return ClipRequest(video, ordered(positions, config.frame_order, random), draw, texts, numbers)

    def spares(self, sample: Sample) -> Iterator[np.ndarray]:
        """Pairs that may take a sample's row: of the batches after its own, with videos that are not in it.

        They are dealt out to the rows in turn: no two rows get the same one, whichever ranks they are on, and what a
        row gets does not depend on what else is bad.
        """
        epoch, step = divmod(sample.batch.place, self.order.steps_per_epoch)
        row, pairs = self._rows.start + sample.row, self.order.batch(epoch, step)
        seen, dealt = set(pairs[:, 0].tolist()), 0
        for ahead in range(1, min(_REPLACEMENT_TRIES, self.order.steps_per_epoch)):
            for pair in self.order.batch(epoch, (step + ahead) % self.order.steps_per_epoch):
                if int(pair[0]) not in seen:
                    seen.add(int(pair[0]))
                    if dealt % len(pairs) == row:
                        yield pair
                    dealt += 1


def clip_request(video: Video, config: DataConfig, clip: tuple[int, int]) -> ClipRequest:
    """What evaluation decodes of a video. clip: (i, n), the i-th of n clips. They are evenly shifted: the rule chooses n times as
    many frames, of n times as many a second, and each clip takes every n-th."""
    number, clips = clip
    positions = choose(video, config.sampling, clips * config.num_frames, clips * config.fps)
    positions = positions[min(number, len(positions) - 1) :: clips]  # a clip has a frame at least
    return ClipRequest(video, ordered(positions, config.frame_order))


class EvalRequests:
    """Every video of a split once, in order; ranks take turns, `block` videos each. Each rank has the same number of batches, of
    which the last may have no clip (collectives need that).

    clip: as `clip_request` takes it.
    """

    def __init__(
        self, split: Dataset, config: DataConfig, rank: int, world: int, block: int = 1, clip: tuple[int, int] = (0, 1)
    ):
        check_rank(rank, world)
        self._split, self._config, self._clip = split, config, clip
        videos = np.arange(len(split))
        self._videos = videos[videos // block % world == rank]
        videos_of_a_rank = int((videos // block % world == 0).sum())  # at most: the first's
        self.batches = ceil(videos_of_a_rank / config.eval_batch_size)

    def samples(self) -> Iterator[Sample]:
        """The samples in the order of batches and rows."""
        config, size = self._config, self._config.eval_batch_size
        for place in range(self.batches):
            indices = self._videos[place * size : (place + 1) * size].tolist()
            plan = BatchPlan(place, len(indices), len(indices))
            for index in indices:
                video = self._split.video(index)
                plan.add(clip_request(video, config, self._clip))
            yield from plan.complete()

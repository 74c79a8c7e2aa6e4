"""The next training batches, ready before the step asks for them.

pairs -> requests | fetch | decode | normalise, collate | replace | batch | prefetch -> the step
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipelines import narration
from pipelines.captions import CaptionGroups
from pipelines.chain import Stage, Stream, chain
from pipelines.config import CacheConfig, ClipsConfig, DataConfig
from pipelines.lanes import Lane
from pipelines.mixture import order_of
from pipelines.pair_order import rank_rows
from pipelines.quarantine import Quarantine
from pipelines.requests import BatchPlan, Sample, TrainingRequests
from pipelines.running import LaneLoader, require_opened
from pipelines.stages.transfer import handed_over, recorded, to_device
from pipelines.stats import Stats
from pipelines.tokens import Tokenizer, clips_tokenizer
from shards import ShardError
from shards.dataset import Dataset


@dataclass
class Batch:
    """One rank's share of a global batch, padded to the same number of rows B on every rank.

    frames        data.pixels [B, num_frames, 3, image_size, image_size], normalised; empty slots are 0. From a loader
                  that is `raw`, uint8 [B, num_frames, image_size, image_size, 3], for a model that normalises them
    frame_mask    bool [B, num_frames]
    tokens        int64 [B, L], L of them as the tokenizer says (data.max_words, or all that the text tower takes); with
                  clips.bag above 1 [B, bag, L], the drawn caption first; with captions_per_video above 1 [B, captions_per_video, L]
    tokens_on_host  the same in the host's memory, for those who would have to wait for a GPU to read them
    caption_mask  bool [B, bag], or [B, captions_per_video]; False: no caption, as in padding, or in a bag where a video says less.
                  What `tokens` holds there means nothing
    valid         bool [B]; False: the row is padding
    pairs         int64 [clips, 2]: (video, caption), or with captions_per_video above 1 (video, group of captions); `captions` holds
                  the first caption of each
    caption_numbers  int64 [B, bag] or [B, captions_per_video]: which of all texts of its video each caption is, from 0; -1: no caption, or
                  with clips.cut, whose captions may be joined ones
    frame_numbers int32 [B, num_frames], numbers of the source video's frames; -1: empty
    wait_s        seconds the step waited for this batch
    stats         what it cost
    """

    epoch: int
    step: int
    frames: torch.Tensor
    frame_mask: torch.Tensor
    tokens: torch.Tensor
    caption_mask: torch.Tensor
    caption_numbers: np.ndarray
    valid: torch.Tensor
    frame_numbers: np.ndarray
    pairs: np.ndarray
    keys: list[str]
    captions: list[str]
    tokens_on_host: torch.Tensor
    wait_s: float = field(default=0.0)
    stats: Stats = field(default_factory=Stats)
    ready: torch.cuda.Event | None = None  # on a GPU: happens once the tensors are written; `batches` has waited for it


class Loader(LaneLoader[Batch]):
    """Training batches from a position on, made by a thread `config.prefetch` batches ahead.

    Use it as `with Loader(...) as loader: for batch in loader.batches(epoch, step, steps)`. A video that cannot be
    read or decoded is replaced by another pair of the epoch (by padding where a tiny set has none to spare), named once
    in a warning and in `quarantine` (a JSON-lines file); past `config.max_bad_fraction` of what was read, ShardError
    ends the run. Decoded frames are kept in `cache`. `raw` leaves the normalisation to whoever asked. `tokenizer` makes tokens
    of captions; None: CLIP's. `captions_per_video` above 1: a row has a video and so many of its captions at most; an epoch still
    shows each caption once. notes: what a person should know of the captions.
    """

    def __init__(
        self,
        split: Dataset,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
        cache: CacheConfig | None = None,
        clips: ClipsConfig | None = None,
        raw: bool = False,
        tokenizer: Tokenizer | None = None,
        captions_per_video: int = 1,
    ):
        require_opened(split)
        self._config, clips = (config := config.filled()), clips or ClipsConfig()
        narration.check(split, clips, config, cache)
        groups = CaptionGroups(split, config, captions_per_video, seed)
        order = order_of(split, config, batch_size, seed, drop_last, groups)
        rows = rank_rows(batch_size, rank, world)
        self.steps_per_epoch, self.pairs = order.steps_per_epoch, order.pairs  # pairs: of an epoch
        self.captions_a_row = groups.captions_a_row
        self.notes = groups.notes
        self._requests = TrainingRequests(split, config, clips, order, groups, rows, seed, cache.frames if cache else 0)
        super().__init__(
            Lane(split, config, torch.device(device), rows.stop - rows.start, cache=cache, training=True, raw=raw)
        )
        bad = Quarantine(split.path, quarantine, config.max_bad_fraction)
        self._stats = Stats()
        self._replacing = _Replacing(self._requests, self._lane, bad, self._stats)
        captions = _Captions(tokenizer or clips_tokenizer(), config.max_words, max(clips.bag, captions_per_video))
        self._batching = _Batching(self._lane, config, captions, self.steps_per_epoch, self._stats)

    @property
    def threads(self) -> int:
        """Threads that decode."""
        return self._lane.threads

    @property
    def how(self) -> str:
        """The lane, and what decodes its frames, for people."""
        return self._lane.how

    def batches(self, epoch: int = 0, step: int = 0, count: int | None = None) -> Iterator[Batch]:
        """`count` batches (without end if None) from `step` of `epoch` on, across epoch boundaries.

        Raises ValueError for a step that an epoch does not have.
        """
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"epoch={epoch}, step={step}: an epoch has {self.steps_per_epoch} steps, counted from 0")
        if self._prefetch is not None and not self._closed:
            raise RuntimeError("this loader is already running: make another one to start at another position")
        stream = self._stream(epoch * self.steps_per_epoch + step, count)
        prefetch = self._start(stream, self._config.prefetch, "c4c-loader")
        ready = iter(prefetch)
        while True:
            started, queued = time.perf_counter(), prefetch.waiting
            if (batch := next(ready, None)) is None:
                return
            batch.wait_s = time.perf_counter() - started
            batch.stats.queued = queued
            handed_over(batch.ready, batch.frames, batch.frame_mask, batch.tokens, batch.caption_mask, batch.valid)
            yield batch

    def _stream(self, place: int, count: int | None) -> Stream:
        """The chain, from the batch at `place` on."""
        samples = self._requests.samples(place, count)
        # map, unlike a loop that yields, holds nothing of what it has handed on: its memory is wanted for another batch
        each: list[Stage] = [("read_s", partial(map, self._replacing)), ("order_s", partial(map, self._batching))]
        stages = [*self._lane.stages(), *each]
        return chain(("order_s", samples), stages, self._stats)


class _Replacing:
    """Stage: a batch plan to one without errors. A clip that cannot be had is replaced, or its row left out."""

    def __init__(self, requests: TrainingRequests, lane: Lane, quarantine: Quarantine, stats: Stats):
        self._requests, self._lane, self._quarantine, self._stats = requests, lane, quarantine, stats

    def __call__(self, plan: BatchPlan) -> BatchPlan:
        clips = plan.clips
        self._quarantine.read += len(clips)
        if any(sample.error for sample in clips):
            kept = [good for sample in clips if (good := self._good(sample)) is not None]
            if not kept and len(clips) == plan.total:
                epoch, step = divmod(plan.place, self._requests.order.steps_per_epoch)
                raise ShardError(
                    f"step {step} of epoch {epoch}: no video of {self._quarantine.split} can be read. Check it with python -m c4c.shard verify"
                )
            self._close_gaps(plan, kept)
        return plan

    def _good(self, sample: Sample) -> Sample | None:
        """The sample, or what replaces it with its frames in the sample's row; None if there is nothing to spare."""
        if sample.error is None:
            return sample
        self._report(sample)
        epoch, step = divmod(sample.batch.place, self._requests.order.steps_per_epoch)
        for pair in self._requests.spares(sample):
            (spare,), frames = self._lane.batch([self._requests.request(pair, epoch, step)]).take()
            spare.pair = pair
            self._quarantine.read += 1
            if spare.error is None:
                sample.batch.frames[sample.row] = frames[0]
                return replace(spare, batch=sample.batch, row=sample.row)
            self._report(spare)
        return None

    def _report(self, sample: Sample) -> None:
        assert sample.error is not None
        self._quarantine.report(sample.request.video, sample.error)
        self._stats.bad += 1

    def _close_gaps(self, plan: BatchPlan, kept: list[Sample]) -> None:
        """Have the kept samples in the first rows."""
        for row, sample in enumerate(kept):
            if sample.row != row:
                plan.frames[row] = plan.frames[sample.row]
                sample.row = row
        plan.frames[len(kept) :] = 0
        plan.samples = kept


class _Batching:
    """Stage: a batch plan to a batch."""

    def __init__(self, lane: Lane, config: DataConfig, captions: "_Captions", steps_per_epoch: int, stats: Stats):
        self._lane, self._config, self._captions, self._steps_per_epoch = lane, config, captions, steps_per_epoch
        self._stats, self._before = stats, replace(stats)

    def __call__(self, plan: BatchPlan) -> Batch:
        rows = plan.rows
        clips, frames = plan.take()
        cost, self._before = self._stats.minus(self._before), replace(self._stats)
        cost.count([sample.source for sample in clips], [sample.request.positions for sample in clips])
        epoch, step = divmod(plan.place, self._steps_per_epoch)
        numbers = np.full((rows, self._config.num_frames), -1, np.int32)
        captions = np.full((rows, self._captions.of_a_row), -1, np.int64)
        for row, sample in enumerate(clips):
            positions = sample.request.positions
            numbers[row, : len(positions)] = sample.request.video.frames.number[positions]
            captions[row, : len(sample.request.captions)] = sample.request.captions
        tokens, caption_mask = self._captions([sample.request.texts for sample in clips], rows)
        return Batch(
            epoch=epoch,
            step=step,
            frames=frames,
            frame_mask=self._lane.mask(clips, rows),
            tokens=to_device(tokens, frames.device),
            caption_mask=to_device(caption_mask, frames.device),
            caption_numbers=captions,
            valid=to_device(torch.arange(rows) < len(clips), frames.device),
            frame_numbers=numbers,
            pairs=np.array([sample.pair for sample in clips], np.int64).reshape(-1, 2),
            keys=[sample.request.video.id for sample in clips],
            captions=[sample.request.texts[0] for sample in clips],
            tokens_on_host=tokens,
            stats=cost,
            ready=recorded(frames.device),
        )


class _Captions:
    """The captions of a batch's clips to tokens.

    Which of them are captions is told by a mask: no token marks the begin of a caption in every vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, max_words: int, bag: int):
        self._tokenizer, self._max_words, self.of_a_row = tokenizer, max_words, bag
        self._missing = tokenizer.missing(max_words)

    def __call__(self, texts: list[tuple[str, ...]], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` and `caption_mask` of a batch of `rows`; texts: a bag a clip, of the first rows."""
        sizes = torch.zeros(rows, dtype=torch.int64)
        sizes[: len(texts)] = torch.tensor([len(bag) for bag in texts], dtype=torch.int64)
        mask = torch.arange(self.of_a_row) < sizes[:, None]  # [rows, bag]
        tokens = self._missing.repeat(rows, self.of_a_row, 1)
        tokens[mask] = self._tokenizer([text for bag in texts for text in bag], self._max_words)
        return (tokens[:, 0] if self.of_a_row == 1 else tokens), mask

"""Stage: uint8 frames of clips to the numbers a model takes, written into the memory of their batches."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from pipelines.chain import Stream
from pipelines.config import DataConfig
from pipelines.requests import BatchPlan, Sample
from pipelines.stages.buffers import Buffers
from pipelines.stages.normalise import Normalise
from pipelines.workers import Workers

_BATCHES_BESIDE_PREFETCH = 4  # with the step, handed over next, being filled, begun by the same group


class Collate:
    """A stream of groups of samples to batch plans, each once its last sample is there.

    frames of a plan: data.pixels [rows, num_frames, 3, image_size, image_size], normalised, or with `raw` uint8 [rows,
    num_frames, image_size, image_size, 3]; slots that no clip fills are 0, rows of clips with an error hold anything."""

    def __init__(self, config: DataConfig, device: torch.device, workers: Workers, raw: bool):
        self._config, self._device, self._workers, self._raw = config, device, workers, raw
        self._normalise = Normalise(config)
        self._buffers = Buffers(device, config.prefetch + _BATCHES_BESIDE_PREFETCH)

    def __call__(self, groups: Stream) -> Iterator[BatchPlan]:
        """The stage itself: plans whose memory is filled."""
        for group in groups:
            self._write(group)
            complete = deque(sample.batch for sample in group if sample is sample.batch.samples[-1])
            del group  # a batch that is handed on is not held here: its memory is wanted for another
            while complete:
                yield complete.popleft()

    def _write(self, group: list[Sample]) -> None:
        for plan in {id(sample.batch): sample.batch for sample in group}.values():
            if plan.memory is None:
                plan.memory = self._memory(plan)
            samples = [sample for sample in group if sample.batch is plan and sample.frames is not None]
            if self._device.type == "cuda":
                self._write_on_device(plan.frames, samples)
            else:
                self._workers.map(self._write_row, samples)
            for sample in samples:
                sample.frames = None  # the next group's may stand in the same memory
                sample.source.pieces = []

    def _write_row(self, sample: Sample) -> None:
        self._normalise.fill(sample.batch.frames[sample.row], np.asarray(sample.frames), _slots(sample), self._raw)

    def _write_on_device(self, frames: torch.Tensor, samples: list[Sample]) -> None:
        if not samples:
            return
        made = frames.new_empty(len(samples), *frames.shape[1:])
        self._normalise.fill_on_device(made, [s.frames for s in samples], [_slots(s) for s in samples], self._raw)
        frames[torch.tensor([sample.row for sample in samples], device=self._device)] = made

    def _memory(self, plan: BatchPlan) -> torch.Tensor:
        side = self._config.image_size
        shape = (side, side, 3) if self._raw else (3, side, side)
        dtype = torch.uint8 if self._raw else self._normalise.dtype
        frames = self._buffers.take((plan.rows, self._config.num_frames, *shape), dtype)
        frames[len(plan.clips) :] = 0
        return frames


def _slots(sample: Sample) -> np.ndarray:
    """Which of the sample's frames its clip shows, in the clip's order."""
    among, wanted = sample.positions, sample.request.positions
    return np.arange(len(among)) if np.array_equal(among, wanted) else np.searchsorted(among, wanted)

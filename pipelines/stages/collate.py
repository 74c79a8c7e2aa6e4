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
from pipelines.stages.transfer import Transfer, recorded, slots, to_device
from pipelines.workers import Workers

_BATCHES_BESIDE_PREFETCH = 4  # with the step, handed over next, being filled, begun by the same group


class Collate:
    """A stream of groups of samples to batch plans, each once its last sample is there.

    frames of a plan: data.pixels [rows, num_frames, 3, image_size, image_size], normalised, or with `raw` uint8 [rows,
    num_frames, image_size, image_size, 3]; slots that no clip fills are 0, rows of clips with an error hold anything.
    `ready` of a plan: on a GPU, what whoever reads them on another stream has to wait for."""

    def __init__(self, config: DataConfig, device: torch.device, workers: Workers, raw: bool):
        self._config, self._device, self._workers, self._raw = config, device, workers, raw
        self._normalise = Normalise(config)
        self._buffers = Buffers(device, config.prefetch + _BATCHES_BESIDE_PREFETCH)
        self._transfer = Transfer(device, workers) if device.type == "cuda" else None

    def __call__(self, groups: Stream) -> Iterator[BatchPlan]:
        """The stage itself: plans whose memory is filled."""
        for group in groups:
            self._write(group)
            complete = deque(sample.batch for sample in group if sample is sample.batch.samples[-1])
            del group  # a batch that is handed on is not held here: its memory is wanted for another
            while complete:
                if self._transfer is not None:
                    self._finish_on_device(complete[0])
                yield complete.popleft()

    def close(self) -> None:
        """Let go of the decoder's memory."""
        if self._transfer is not None:
            self._transfer.close()

    def _write(self, group: list[Sample]) -> None:
        for plan in {id(sample.batch): sample.batch for sample in group}.values():
            if plan.memory is None:
                plan.memory = self._memory(plan)
            samples = [sample for sample in group if sample.batch is plan and sample.frames is not None]
            if self._transfer is None:
                self._workers.map(self._write_row, samples)
            elif samples:
                self._transfer.write(plan.frames, samples)
            for sample in samples:
                sample.frames = None  # the next group's may stand in the same memory
                sample.source.pieces = []

    def _write_row(self, sample: Sample) -> None:
        self._normalise.fill(sample.batch.frames[sample.row], np.asarray(sample.frames), slots(sample), self._raw)

    def _finish_on_device(self, plan: BatchPlan) -> None:
        if not self._raw:
            frames = self._normalise.on_device(plan.frames)
            if self._has_gaps(plan):
                filled = torch.zeros(frames.shape[:2], dtype=frames.dtype)
                for sample in plan.clips:
                    filled[sample.row, : len(sample.request.positions)] = 1
                frames *= to_device(filled, self._device)[:, :, None, None, None]
            plan.memory = frames
        plan.ready = recorded(self._device)

    def _has_gaps(self, plan: BatchPlan) -> bool:
        full = self._config.num_frames
        return len(plan.clips) < plan.rows or any(len(s.request.positions) < full for s in plan.clips)

    def _memory(self, plan: BatchPlan) -> torch.Tensor:
        side = self._config.image_size
        raw = self._raw or self._transfer is not None  # a GPU normalises a whole batch
        shape = (side, side, 3) if raw else (3, side, side)
        dtype = torch.uint8 if raw else self._normalise.dtype
        frames = self._buffers.take((plan.rows, self._config.num_frames, *shape), dtype)
        if self._transfer is None:  # a row's other slots are written with it
            frames[len(plan.clips) :] = 0
        elif self._has_gaps(plan):
            frames.zero_()
        return frames

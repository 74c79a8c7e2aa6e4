"""Every video of a split, for evaluation: the same chain as in training, with other requests, and nothing is replaced."""

import sys
from collections.abc import Iterator

import numpy as np
import torch

from pipelines.chain import Prefetch, chain
from pipelines.config import DataConfig
from pipelines.lanes import Lane
from pipelines.requests import BatchPlan, EvalRequests
from pipelines.stats import Stats
from shards import ShardError
from shards.split import Split


class EvalLoader:
    """Every video of a split once, in order, for evaluation; ranks take turns.

    Each rank gets the same number of batches (collectives need that); a rank without videos left gets empty ones.
    """

    def __init__(
        self, split: Split, config: DataConfig, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ):
        self.split, self.config = split, config
        self._requests = EvalRequests(split, config, rank, world)
        self.batches = self._requests.batches
        self._lane = Lane(split, config, torch.device(device), config.eval_batch_size)
        self._prefetch: Prefetch[BatchPlan] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(video indices [n], frames [n, num_frames, 3, H, W], mask [n, num_frames]), n <= eval_batch_size, n may be 0.

        Raises ShardError for a video that cannot be decoded: a score over fewer videos would not be the score.
        """
        if self._closed:
            raise RuntimeError("this loader is closed: make another one")
        if self._prefetch is not None:
            self._prefetch.close()  # of an iteration that was not finished
        stream = chain(("order_s", self._requests.samples()), self._lane.stages(), Stats())
        self._prefetch = Prefetch(stream, 1, "c4c-eval-loader", self._lane.use_device)
        for plan in self._prefetch:
            rows = plan.rows
            clips, frames = plan.take()
            for sample in clips:
                if sample.error is not None:
                    raise ShardError(
                        f"{self.split.path}: {sample.request.video.id} cannot be evaluated: {sample.error}. "
                        "Pack the split again."
                    )
            indices = np.array([sample.request.video.index for sample in clips], np.int64)
            yield indices, frames, self._lane.mask(clips, rows)

    def __enter__(self) -> "EvalLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        prefetch: Prefetch | None = getattr(self, "_prefetch", None)
        if prefetch is not None and not sys.is_finalizing():
            prefetch.stop()

    def close(self) -> None:
        """End the threads. Safe to call twice; a loader that is dropped does it itself."""
        self._closed = True
        if self._prefetch is not None:
            self._prefetch.stop()
            self._lane.interrupt()
            self._prefetch.close()
        self._lane.close()

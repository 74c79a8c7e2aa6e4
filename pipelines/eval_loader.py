"""Every video of a split, for evaluation: the same chain as in training, with other requests, and no video takes another's place."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pipelines.chain import chain
from pipelines.config import DataConfig
from pipelines.lanes import Lane
from pipelines.requests import BatchPlan, EvalRequests, Sample
from pipelines.running import LaneLoader, require_opened
from pipelines.stages.transfer import handed_over
from pipelines.stats import Stats
from shards import ShardError
from shards.dataset import Dataset
from shards.schema import Video


class EvalLoader(LaneLoader[BatchPlan]):
    """Every video of a split once, in order, for evaluation; ranks take turns, `block` videos each.

    Each rank gets the same number of batches (collectives need that); a rank without videos left gets empty ones. `raw`
    leaves the normalisation to whoever asked. clip: see `clip_request`. bad: is called with each video that cannot be decoded and the
    reason; its frames are 0 then. None: it is an error.
    """

    def __init__(
        self, split: Dataset, config: DataConfig, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
        raw: bool = False, block: int = 1, clip: tuple[int, int] = (0, 1), bad: Callable[[Video, Exception], None] | None = None,
    ):  # fmt: skip
        require_opened(split)
        self.split, self.config, self._bad = split, (config := config.filled()), bad
        self._requests = EvalRequests(split, config, rank, world, block, clip)
        super().__init__(Lane(split, config, torch.device(device), config.eval_batch_size, raw=raw))

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return self._requests.batches

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(video indices [n], frames [n, num_frames, 3, H, W], mask [n, num_frames]), n <= eval_batch_size, n may be 0.
        With `raw`, frames are uint8 [n, num_frames, H, W, 3].

        Without `bad`, raises ShardError for a video that cannot be decoded: a score over fewer videos would not be the score.
        """
        if self._prefetch is not None:
            self._prefetch.close()  # of an iteration that was not finished
        stream = chain(("order_s", self._requests.samples()), self._lane.stages(), Stats())
        for plan in self._start(stream, 1, "c4c-eval-loader"):
            rows, ready = plan.rows, plan.ready
            clips, frames = plan.take()
            handed_over(ready, frames)
            for row, sample in enumerate(clips):
                if sample.error is not None:
                    self._report(sample, sample.error)
                    frames[row] = 0
            indices = np.array([sample.request.video.index for sample in clips], np.int64)
            yield indices, frames, self._lane.mask(clips, rows)

    def _report(self, sample: Sample, error: Exception) -> None:
        video = sample.request.video
        if self._bad is None:
            raise ShardError(f"{self.split.path}: {video.id} cannot be evaluated: {error}. Pack the split again.")
        self._bad(video, error)

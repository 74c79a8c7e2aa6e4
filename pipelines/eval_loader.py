"""Every video of a split, for evaluation."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.frame_sampling import choose, ordered
from pipelines.lanes import BadSample, Lane, Reading, Request, Source, Undecodable
from pipelines.remote_prefetch import Ahead, share_of, weakly
from shards import ShardError
from shards.split import Split


class VideoReader:
    """Every video of a split once, in order, for evaluation; ranks take turns.

    Each rank gets the same number of batches (collectives need that); a rank without videos left gets empty ones.
    """

    def __init__(self, split: Split, config: DataConfig, *, rank: int = 0, world: int = 1, device="cpu"):
        self.split, self.config = split, config
        self._mine = np.arange(rank, len(split), world)
        size = config.eval_batch_size
        most = -(-len(split) // world)  # videos of a rank
        self.batches = -(-most // size)
        self._lane = Lane(split, config, torch.device(device), size)
        self._fetching = None
        if split.remote:
            self._fetching = Ahead(weakly(self._to_fetch), config.ahead, share_of(config.local_gb))

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(video indices [n], frames [n, num_frames, 3, H, W], mask [n, num_frames]), n <= eval_batch_size, n may be 0.

        Raises ShardError for a video that cannot be decoded: a score over fewer videos would not be the score.
        """
        ahead: Reading | None = None

        def coming() -> tuple[list[Request], list[Source]] | None:
            return None if ahead is None else self._lane.good(ahead)

        for i in range(self.batches):
            now = ahead or self._begin(i)
            sources = self._lane.finish(now)
            ahead = self._begin(i + 1) if i + 1 < self.batches else None
            for request, source in zip(now.requests, sources, strict=True):
                if isinstance(source, BadSample):
                    raise self._refusal(request, source)
            try:
                frames, mask = self._lane.decode(now.requests, sources, coming=coming)
            except Undecodable as error:
                row, reason = next(iter(error.rows.items()))
                raise self._refusal(now.requests[row], reason) from error
            yield np.array([r.video.index for r in now.requests], np.int64), frames, mask

    def _begin(self, i: int) -> Reading:
        if self._fetching is not None:
            self._fetching.reach(i, self.batches - 1)
        return self._lane.start([self._request(int(index)) for index in self._part(i)])

    def _part(self, i: int) -> np.ndarray:
        size = self.config.eval_batch_size
        return self._mine[i * size : (i + 1) * size]

    def _request(self, index: int) -> Request:
        video, config = self.split.video(index), self.config
        positions = choose(video, config.sampling, config.num_frames, config.fps)
        return Request(video, ordered(positions, config.frame_order))

    def _to_fetch(self, i: int) -> list[Callable[[], int]]:
        return [partial(weakly(self._fetch), int(index)) for index in self._part(i)]

    def _fetch(self, index: int) -> int:
        request = self._request(index)
        return self.split.fetch(request.video, *self._lane.bytes_of(request))

    def _refusal(self, request: Request, reason: BadSample) -> ShardError:
        return ShardError(f"{self.split.path}: {request.video.id} cannot be evaluated: {reason}. Pack the split again.")

    def __del__(self):
        if not sys.is_finalizing() and getattr(self, "_fetching", None) is not None:
            self._fetching.close()

    def close(self) -> None:
        if self._fetching is not None:
            self._fetching.close()
        self._lane.close()

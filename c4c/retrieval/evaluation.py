"""What an evaluation found: for tables, reports, dumps and re-ranking."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from c4c.retrieval.metrics import Score, ScoreGrid, top_of_rows
from c4c.retrieval.work import EvalWork
from pipelines.config import DataConfig
from shards.split import Split


@dataclass(frozen=True)
class Evaluation:
    """Features, ranks and metrics of a split. What reads scores reads those that the ranks were counted from, to the last bit.

    texts: captions in the split's order, [N]; keys: the ids of its videos, [M]. video_of_text: int64 [N], increasing.
    text_features, video_features: what head.text and head.video gave, float32, on the device that computed them. score: head.score.
    by_text, by_video: 0-based ranks, int64 [N] and [M]; see c4c.retrieval.metrics.grid_ranks. metrics: `metrics.report` of them,
    and "pairs" where the split has some (see c4c.retrieval.order_pairs).
    rows: metrics of the re-ranked scores, by the method's name (DSL, QB-Norm). timings: seconds of "decode wait", "towers", "captions"
    and "ranking".
    """

    split: Split
    data: DataConfig
    texts: list[str]
    keys: list[str]
    video_of_text: Tensor
    text_features: Tensor
    video_features: Tensor
    score: Score
    by_text: Tensor
    by_video: Tensor
    metrics: dict
    rows: dict[str, dict] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def grid(self) -> ScoreGrid:
        """The tiles in which scores are computed."""
        return ScoreGrid.of(self.text_features, self.video_features, self.video_of_text, self.score)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(which texts, their scores with all videos, float32 [n, M]), from the first text to the last."""
        with EvalWork(self.video_of_text.device, ranks=False) as work:
            yield from zip(self.grid.text_tiles, work.map(self.grid.scores, self.grid.text_tiles), strict=True)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k best videos of each text, or all if there are fewer: int64 [N, k], and their scores, float32 [N, k]; on the CPU.

        Of equal scores the video that is first in the split comes first; a score that is not a number counts as -inf.
        """
        with EvalWork(self.video_of_text.device, ranks=False) as work:
            parts = list(work.map(lambda texts: top_of_rows(self.grid, texts, k), self.grid.text_tiles))
        return torch.cat([place for place, _ in parts]).cpu(), torch.cat([value for _, value in parts]).cpu()

    def top_texts(self, k: int) -> tuple[Tensor, Tensor]:
        """The k best texts of each video: int64 [M, k], and their scores, float32 [M, k]; see `top`."""
        device, m = self.video_of_text.device, len(self.keys)
        value, place = torch.empty(m, 0, device=device), torch.empty(m, 0, dtype=torch.int64, device=device)
        for texts, scores in self.tiles():
            places = torch.arange(texts.start, texts.stop, device=device)
            value = torch.cat([value, scores.T.nan_to_num(nan=float("-inf"))], dim=1)
            place = torch.cat([place, places.expand(m, -1)], dim=1)
            order = value.sort(dim=1, descending=True, stable=True).indices[:, :k]
            value, place = value.gather(1, order), place.gather(1, order)
        return place.cpu(), value.cpu()

    def similarity(self) -> np.ndarray:
        """All scores, float32 [N, M]."""
        whole = np.empty((len(self.texts), len(self.keys)), np.float32)
        for texts, scores in self.tiles():
            whole[texts] = scores.cpu().numpy()
        return whole

"""Retrieval metrics. A tie never helps: whatever scores at least as high as the right answer stands before it.

Scores are computed tile by tile, so no gallery is too large; ranks are exact whatever the tile. `ScoreGrid` says which tiles, so that
whatever reads scores, reads the same ones to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from c4c.retrieval.work import EvalWork

Score = Callable[[Tensor, Tensor], Tensor]  # texts [N, ...], videos [M, ...] -> [N, M]
Tile = Callable[[slice, slice], Tensor]  # of texts and of videos -> their scores
ROWS, COLUMNS = 128, 1024  # texts and videos of a tile


@dataclass(frozen=True)
class ScoreGrid:
    """The tiles in which the scores of N texts and M videos are computed.

    owner: int64 [N] on the scores' device, the video of each text, increasing. tile: what computes a tile, in `dtype`.
    """

    owner: Tensor
    videos: int
    tile: Tile
    rows: int = ROWS
    columns: int = COLUMNS
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, texts: Tensor, videos: Tensor, owner: Tensor, score: Score, rows: int = ROWS, columns: int = COLUMNS
    ) -> "ScoreGrid":
        """Of features and what scores them."""

        def tile(t: slice, v: slice) -> Tensor:
            return score(texts[t], videos[v]).float()

        return cls(owner, len(videos), tile, rows, columns)

    @cached_property
    def text_tiles(self) -> list[slice]:
        """Runs of about `rows` texts, never between two texts of one video."""
        return [slice(a, b) for a, b in _tiles_of_groups(self.owner.cpu().numpy(), self.rows)]

    @property
    def video_tiles(self) -> list[slice]:
        """Runs of `columns` videos."""
        return [slice(i, min(i + self.columns, self.videos)) for i in range(0, self.videos, self.columns)]

    def scores(self, texts: slice) -> Tensor:
        """Scores of one of `text_tiles` with all videos, float32 [n, M]."""
        return torch.cat([self.tile(texts, videos) for videos in self.video_tiles], dim=1)

    def with_own(self, texts: slice) -> Tensor:
        """Scores of one of `text_tiles`, each text with its own video, [n]."""
        owner = self.owner[texts]
        own = torch.full((len(owner),), float("nan"), dtype=self.dtype, device=owner.device)
        first, last = int(owner[0]), int(owner[-1])
        for videos in self.video_tiles:
            if first < videos.stop and videos.start <= last:
                here = (owner >= videos.start) & (owner < videos.stop)
                own[here] = self.tile(texts, videos)[here, owner[here] - videos.start]
        return own


def ranks(
    texts: Tensor, videos: Tensor, video_of_text: Tensor, score: Score, tile: int = 2048
) -> tuple[Tensor, Tensor]:
    """`grid_ranks` of features. video_of_text int64 [N], in any order, every video named at least once."""
    order = torch.argsort(video_of_text, stable=True)  # texts of one video stand together
    grid = ScoreGrid.of(texts[order], videos, video_of_text[order], score, tile, tile)
    by_text, by_video = grid_ranks(grid)
    return torch.empty_like(by_text).scatter_(0, order, by_text), by_video


def grid_ranks(
    grid: ScoreGrid, work: EvalWork | None = None, tell: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[Tensor, Tensor]:
    """0-based ranks: of each text's video among all videos, int64 [N]; of each video's texts among all texts, int64 [M].

    A video's texts count by their best score, as in CLIP4Clip's evaluation of several captions a video. A score that is not a
    number counts as above the right one, and a right answer that is not a number comes last. work: shares the tiles. tell: gets "texts",
    how many are ranked, of how many.
    """
    owner, m, n = grid.owner, grid.videos, len(grid.owner)
    with work or EvalWork(owner.device, ranks=False) as work:
        pieces = work.share(grid.text_tiles)
        # of each text with its video, in this rank's tiles; of each video with its own texts
        own = torch.full((n,), float("nan"), dtype=grid.dtype, device=owner.device)
        best = torch.full((m,), float("-inf"), dtype=grid.dtype, device=owner.device)
        broken = torch.zeros(m, dtype=torch.int64, device=owner.device)
        for texts, scores in zip(pieces, work.map(grid.with_own, pieces), strict=True):
            own[texts] = scores
            best.scatter_reduce_(0, owner[texts], scores.nan_to_num(nan=float("inf")), "amax")
            broken[owner[texts][scores.isnan()]] = 1
        best, broken = work.most(best), work.most(broken)

        def above(texts: slice) -> tuple[Tensor, Tensor]:
            return _above(grid, texts, own[texts], best)

        by_text = torch.zeros(n, dtype=torch.int64, device=owner.device)
        by_video = torch.zeros(m, dtype=torch.int64, device=owner.device)
        for texts, (rows, columns) in zip(pieces, work.map(above, pieces), strict=True):
            by_text[texts] = rows - 1
            by_video += columns
            tell("texts", texts.stop, n)
        by_text, by_video = work.total(by_text), work.total(by_video)
        tell("texts", n, n)  # the last tile may be another rank's
    return by_text, torch.where(broken.bool(), m - 1, by_video - 1)


def _above(grid: ScoreGrid, texts: slice, own: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Of some texts: how many videos score as high as the right one [n], and how many videos' texts as high as each video's own [M]."""
    owner = grid.owner[texts]
    first, last = int(owner[0]), int(owner[-1]) + 1
    rows = torch.zeros(len(owner), dtype=torch.int64, device=owner.device)
    columns = torch.zeros(grid.videos, dtype=torch.int64, device=owner.device)
    for videos in grid.video_tiles:
        s = grid.tile(texts, videos)
        rows += (~(s < own[:, None])).sum(dim=1)
        group = s.new_full((last - first, s.shape[1]), float("-inf"))  # best score of each video's texts
        index = (owner - first)[:, None].expand_as(s)
        group = group.scatter_reduce(0, index, s.nan_to_num(nan=float("inf")), "amax")
        columns[videos] += (group >= best[videos]).sum(dim=0)
    return rows, columns


def top_of_rows(grid: ScoreGrid, texts: slice, k: int) -> tuple[Tensor, Tensor]:
    """The k best videos of some texts, int64 [n, k], and their scores; of equal scores the first video's; no number comes last."""
    n, device = texts.stop - texts.start, grid.owner.device
    value, place = (
        torch.empty(n, 0, dtype=grid.dtype, device=device),
        torch.empty(n, 0, dtype=torch.int64, device=device),
    )
    for videos in grid.video_tiles:
        value = torch.cat([value, grid.tile(texts, videos).nan_to_num(nan=float("-inf"))], dim=1)
        places = torch.arange(videos.start, videos.stop, device=device)
        place = torch.cat([place, places.expand(n, -1)], dim=1)
        order = value.sort(dim=1, descending=True, stable=True).indices[:, :k]
        value, place = value.gather(1, order), place.gather(1, order)
    return place, value


def _tiles_of_groups(owner: np.ndarray, tile: int) -> list[tuple[int, int]]:
    """Cut sorted texts into runs of about `tile`, never between two texts of one video."""
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    cuts, previous = [0], 0
    for start in [*starts[1:].tolist(), len(owner)]:
        if start - cuts[-1] > tile and previous > cuts[-1]:
            cuts.append(previous)
        previous = start
    return list(zip(cuts, [*cuts[1:], len(owner)], strict=True))


def summarize(ranks_from_0: Tensor, lower_median: bool = False) -> dict[str, float]:
    """R1, R5, R10 in percent; MdR and MnR count from 1. lower_median: of an even number of ranks, the lower middle one."""
    r = np.sort(ranks_from_0.cpu().numpy())
    middle = r[(len(r) - 1) // 2] if lower_median else np.median(r)
    recalls = {f"R{k}": round(100.0 * float(np.mean(r < k)), 4) for k in (1, 5, 10)}
    return recalls | {"MdR": float(middle) + 1, "MnR": round(float(np.mean(r)) + 1, 4)}


def report(by_text: Tensor, by_video: Tensor) -> dict:
    """{"t2v": {...}, "v2t": {...}, "n_texts", "n_videos"} from what `ranks` gives.

    Where videos have several texts, the median of t2v is the lower one, as in the official evaluation of MSVD.
    """
    return {
        "t2v": summarize(by_text, lower_median=len(by_text) != len(by_video)),
        "v2t": summarize(by_video),
        "n_texts": len(by_text),
        "n_videos": len(by_video),
    }

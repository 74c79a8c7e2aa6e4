"""Re-ranking: scores corrected for videos (or texts) that are near to everything. It changes no model, and is reported by itself.

dsl      dual softmax at inference (CAMoE, https://arxiv.org/abs/2109.04290; as CLIP-ViP and others evaluate it): each score times the
         softmax over all queries of the same item. It sees all test queries at once, which a search engine does not have.
qbnorm   querybank normalisation with the dynamic inverted softmax (https://arxiv.org/abs/2112.12777): what it corrects for is measured
         with a bank of other queries, of training. It sees no test query but the one that is ranked.

A text is a query of the videos, and a video a query of the texts; each direction has a correction of its own. All is computed in
float64 from the tiles of a `ScoreGrid`, of which few are held at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from c4c.retrieval.metrics import ScoreGrid, grid_ranks
from c4c.retrieval.work import EvalWork

DSL_SCALE = 100.0  # inverse temperature over cosines, as published
QBNORM_SCALE = 20.0
_TOGETHER = 64  # tiles whose sums over texts are held at once


@dataclass(frozen=True)
class Direction:
    """Of a querybank, for one direction: log of its sum over the bank's queries for each item, float64, and the activation set: bool,
    which items are the best of some query of the bank."""

    log_sum: Tensor
    active: Tensor


def dsl(grid: ScoreGrid, work: EvalWork, scale: float = DSL_SCALE, cosines: bool = True) -> tuple[Tensor, Tensor]:
    """Ranks as `grid_ranks` gives them, of s_ij * softmax(scale * s)_ij: over texts i for text to video, over videos j for video to text.

    cosines: whether 0 means something of a score. Where it does not, and all may be below 0, that product would turn the order
    around; then they are ranked by the product of both softmaxes, over texts and over videos, which no constant changes."""
    with work:
        of_videos, of_texts = _sums(grid, work, scale)

        def by_both(t: slice, v: slice) -> Tensor:
            s = grid.tile(t, v).double()
            return 2 * scale * s - of_videos[v] - of_texts[t, None]

        if not cosines:
            return grid_ranks(replace(grid, tile=by_both, dtype=torch.float64), work)

        def by_texts(t: slice, v: slice) -> Tensor:
            s = grid.tile(t, v).double()
            return s * (scale * s - of_videos[v]).exp()

        def by_videos(t: slice, v: slice) -> Tensor:
            s = grid.tile(t, v).double()
            return s * (scale * s - of_texts[t, None]).exp()

        by_text, _ = grid_ranks(replace(grid, tile=by_texts, dtype=torch.float64), work)
        _, by_video = grid_ranks(replace(grid, tile=by_videos, dtype=torch.float64), work)
    return by_text, by_video


def text_bank(bank: ScoreGrid, work: EvalWork, scale: float = QBNORM_SCALE) -> Direction:
    """Of the scores of a bank's texts with the videos that are searched."""
    active = torch.zeros(bank.videos, dtype=torch.bool, device=bank.owner.device)
    with work:
        log_sum, _ = _sums(bank, work, scale)
        active[_best_videos(bank, work)] = True
    return Direction(log_sum, active)


def video_bank(bank: ScoreGrid, work: EvalWork, scale: float = QBNORM_SCALE) -> Direction:
    """Of the scores of the texts that are searched with a bank's videos."""
    active = torch.zeros(len(bank.owner), dtype=torch.bool, device=bank.owner.device)
    with work:
        _, log_sum = _sums(bank, work, scale)
        active[_best_texts(bank, work)] = True
    return Direction(log_sum, active)


def qbnorm_by_text(grid: ScoreGrid, work: EvalWork, bank: Direction, scale: float = QBNORM_SCALE) -> Tensor:
    """Ranks of each text's video, as `grid_ranks` gives them. bank: from `text_bank`.

    A query whose best item is in the activation set is ranked by exp(scale * s) over the bank's sum of exp(scale * s) for each
    item, here by its logarithm, which has the same order; another query by s.
    """
    with work:
        corrected = bank.active[_best_videos(grid, work)]

        def tile(t: slice, v: slice) -> Tensor:
            s = grid.tile(t, v).double()
            return torch.where(corrected[t, None], scale * s - bank.log_sum[v], s)

        return grid_ranks(replace(grid, tile=tile, dtype=torch.float64), work)[0]


def qbnorm_by_video(grid: ScoreGrid, work: EvalWork, bank: Direction, scale: float = QBNORM_SCALE) -> Tensor:
    """Ranks of each video's texts: as `qbnorm_by_text`, the other way. bank: from `video_bank`."""
    with work:
        corrected = bank.active[_best_texts(grid, work)]

        def tile(t: slice, v: slice) -> Tensor:
            s = grid.tile(t, v).double()
            return torch.where(corrected[v], scale * s - bank.log_sum[t, None], s)

        return grid_ranks(replace(grid, tile=tile, dtype=torch.float64), work)[1]


def _sums(grid: ScoreGrid, work: EvalWork, scale: float) -> tuple[Tensor, Tensor]:
    """log(sum of exp(scale * s)) over texts, for each video, and over videos, for each text; without scores that are no number."""
    device, m = grid.owner.device, grid.videos

    def job(texts: slice) -> Tensor:
        s = torch.cat([grid.tile(texts, videos).double() for videos in grid.video_tiles], dim=1)
        s = scale * s.nan_to_num(nan=float("-inf"))
        return torch.cat([s.logsumexp(dim=0), s.logsumexp(dim=1)])

    of_videos = torch.full((m,), float("-inf"), dtype=torch.float64, device=device)
    of_texts = torch.empty(len(grid.owner), dtype=torch.float64, device=device)
    for texts, sums in _of_tiles(job, grid, work):  # in one order on any number of ranks
        of_videos, of_texts[texts] = torch.logaddexp(of_videos, sums[:m]), sums[m:]
    return of_videos, of_texts


def _best_videos(grid: ScoreGrid, work: EvalWork) -> Tensor:
    """Of each text the best video, the first of equal ones, int64 [N]."""

    def job(texts: slice) -> Tensor:
        best = [grid.tile(texts, videos).nan_to_num(nan=float("-inf")).max(dim=1) for videos in grid.video_tiles]
        places = torch.stack([one.indices + videos.start for one, videos in zip(best, grid.video_tiles, strict=True)])
        return places.gather(0, torch.stack([one.values for one in best]).argmax(dim=0, keepdim=True))[0]

    return torch.cat([found for _, found in _of_tiles(job, grid, work)])


def _best_texts(grid: ScoreGrid, work: EvalWork) -> Tensor:
    """Of each video the best text, the first of equal ones, int64 [M]."""

    def job(texts: slice) -> Tensor:
        s = torch.cat([grid.tile(texts, videos) for videos in grid.video_tiles], dim=1)
        value, place = s.double().nan_to_num(nan=float("-inf")).max(dim=0)
        return torch.stack([value, (place + texts.start).double()])

    value = torch.full((grid.videos,), float("-inf"), dtype=torch.float64, device=grid.owner.device)
    place = torch.zeros(grid.videos, dtype=torch.int64, device=grid.owner.device)
    for _, (values, places) in _of_tiles(job, grid, work):
        better = values > value
        value, place = torch.where(better, values, value), torch.where(better, places.long(), place)
    return place


def _of_tiles(job: Callable[[slice], Tensor], grid: ScoreGrid, work: EvalWork) -> Iterator[tuple[slice, Tensor]]:
    """(tile, job(tile)) of all runs of texts, in order, on every rank; few at a time."""
    for start in range(0, len(grid.text_tiles), _TOGETHER):
        tiles = grid.text_tiles[start : start + _TOGETHER]
        own = work.share(list(enumerate(tiles)))
        made = work.map(lambda piece: job(piece[1]), own)
        results = {number: result for (number, _), result in zip(own, made, strict=True)}
        yield from zip(tiles, work.gather(results), strict=True)

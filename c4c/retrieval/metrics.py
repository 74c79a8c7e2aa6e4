"""Retrieval metrics. A tie never helps: whatever scores at least as high as the right answer stands before it.

Scores are computed tile by tile, so no gallery is too large; ranks are exact whatever the tile.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]  # texts [N, ...], videos [M, ...] -> [N, M]


def ranks(
    texts: Tensor, videos: Tensor, video_of_text: Tensor, score: Score, tile: int = 2048
) -> tuple[Tensor, Tensor]:
    """0-based ranks: of each text's video among all videos, int64 [N]; of each video's texts among all texts, int64 [M].

    video_of_text int64 [N], every video named at least once. A video's texts count by their best score, as in
    CLIP4Clip's evaluation of several captions a video. A score that is not a number counts as above the right one, and
    a right answer that is not a number comes last.
    """
    order = torch.argsort(video_of_text, stable=True)  # texts of one video stand together
    owner, texts = video_of_text[order], texts[order]
    text_tiles = _tiles_of_groups(owner.cpu().numpy(), tile)
    video_tiles = [(i, min(i + tile, len(videos))) for i in range(0, len(videos), tile)]

    own = texts.new_full((len(texts),), float("nan"), dtype=torch.float32)  # of each text with its video
    for a, b in text_tiles:
        for c, d in video_tiles:
            here = (owner[a:b] >= c) & (owner[a:b] < d)
            if here.any():
                s = score(texts[a:b], videos[c:d]).float()
                own[a:b][here] = s[here, owner[a:b][here] - c]
    broken = torch.zeros(len(videos), dtype=torch.bool, device=texts.device)
    broken[owner[own.isnan()]] = True
    best = texts.new_full((len(videos),), float("-inf"), dtype=torch.float32)  # of each video with its own texts
    best = best.scatter_reduce(0, owner, own.nan_to_num(nan=float("inf")), "amax")

    above = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
    above_video = torch.zeros(len(videos), dtype=torch.int64, device=texts.device)
    for a, b in text_tiles:
        for c, d in video_tiles:
            s = score(texts[a:b], videos[c:d]).float()
            above[a:b] += (~(s < own[a:b, None])).sum(dim=1)
            first, last = int(owner[a]), int(owner[b - 1]) + 1
            group = s.new_full((last - first, d - c), float("-inf"))  # best score of each video's texts
            rows = (owner[a:b] - first)[:, None].expand_as(s)
            group = group.scatter_reduce(0, rows, s.nan_to_num(nan=float("inf")), "amax")
            above_video[c:d] += (group >= best[c:d]).sum(dim=0)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return (above - 1)[back], torch.where(broken, len(videos) - 1, above_video - 1)


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


def of_matrix(similarity: Tensor) -> tuple[Tensor, Tensor, Score]:
    """(texts, videos, score) that look scores up in a matrix [N, M]: for `ranks`."""
    n, m = similarity.shape
    texts = torch.arange(n, dtype=torch.float64)[:, None]
    videos = torch.arange(m, dtype=torch.float64)[:, None]
    return texts, videos, lambda t, v: similarity[t[:, 0].long()][:, v[:, 0].long()]

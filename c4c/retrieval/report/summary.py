"""Numbers of the report that follow from ranks: recall curves, histograms, and recall by kind of query."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from c4c.retrieval.metrics import summarize

MOST_K = 50  # the last point of a recall curve
_Z = 1.959964  # of a 95 % interval
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # last rank of each bar of the histogram


@dataclass(frozen=True)
class Bin:
    """The queries whose value is in [low, high)."""

    label: str
    low: float
    high: float


@dataclass(frozen=True)
class BinResult:
    """A line of a breakdown: queries of one bin. Recalls in percent; low and high bound R@1's 95 % interval (Wilson; of `independent`
    queries)."""

    label: str
    queries: int
    r1: float
    low: float
    high: float
    r5: float
    median: float


def recall_curve(ranks: np.ndarray, candidates: int) -> list[float]:
    """R@1, R@2, … in percent, up to R@50 or the number of candidates. ranks: from 0."""
    return [100.0 * float(np.mean(ranks < k)) for k in range(1, min(MOST_K, candidates) + 1)]


def histogram(ranks: np.ndarray, candidates: int) -> list[tuple[str, int]]:
    """(ranks from 1, how many queries have them), from the best to the worst that is possible. ranks: from 0."""
    out: list[tuple[str, int]] = []
    first = 1
    for last in (*_STEPS, candidates):
        end = min(last, candidates)
        if first > candidates:
            break
        label = f"{first}" if end == first else f"{first}–{end}"
        out.append((label, int(np.sum((ranks + 1 >= first) & (ranks + 1 <= end)))))
        first = end + 1
    return out


def interval(hits: float, queries: float) -> tuple[float, float]:
    """The 95 % interval of a share, in percent (Wilson, 1927), of independent queries."""
    share, z2 = hits / queries, _Z**2
    middle = (share + z2 / (2 * queries)) / (1 + z2 / queries)
    half = _Z / (1 + z2 / queries) * math.sqrt(share * (1 - share) / queries + z2 / (4 * queries**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def independent(hits: np.ndarray, videos: np.ndarray) -> float:
    """How many independent queries say as much of a share as these: captions of one video are found together, or not at all.

    hits: bool [N]; videos: of the queries, [N]. N over the design effect, by the variance of a ratio over videos; at most N. Where all or
    none are hits, or all are of one video, the spread over videos is not known, and a video counts once. (Kish, "Survey Sampling", 1965.)
    """
    _, group, sizes = np.unique(videos, return_inverse=True, return_counts=True)
    n, m, share = len(hits), len(sizes), float(np.mean(hits))
    if m == n:
        return n
    if m < 2 or share in (0.0, 1.0):
        return m
    off = np.bincount(group, weights=hits) - share * sizes
    variance = m / (m - 1) * float(np.sum(off**2)) / n**2
    return min(n, share * (1 - share) / variance) if variance else n


def word_bins(words: Sequence[int]) -> list[Bin]:
    """About four bins of caption lengths with about as many captions each."""
    cuts = sorted({int(cut) + 1 for cut in np.quantile(words, (0.25, 0.5, 0.75), method="lower")})
    bounds = [0, *(cut for cut in cuts if cut <= max(words)), math.inf]
    out = []
    for low, high in pairwise(bounds):
        first, last = max(int(low), 1), high - 1
        if math.isinf(high):
            label = f"{first} or more words" if low else "any length"
        elif first == last:
            label = "1 word" if first == 1 else f"{first} words"
        else:
            label = f"{first}–{int(last)} words" if low else f"up to {int(last)} words"
        out.append(Bin(label, low, high))
    return out


def duration_bins(seconds: Sequence[float]) -> list[Bin]:
    """About four bins of durations with about as many videos each; their bounds have two digits."""
    cuts = sorted({float(f"{cut:.2g}") for cut in np.quantile(seconds, (0.25, 0.5, 0.75))})
    bounds = [0.0, *(cut for cut in cuts if min(seconds) < cut <= max(seconds)), math.inf]
    out = []
    for low, high in pairwise(bounds):
        if math.isinf(high):
            label = f"{low:g} s and longer" if low else "any duration"
        else:
            label = f"{low:g} to {high:g} s" if low else f"under {high:g} s"
        out.append(Bin(label, low, high))
    return out


def breakdown(
    bins: Sequence[Bin], values: np.ndarray, ranks: np.ndarray, videos: np.ndarray, lower_median: bool = False
) -> list[BinResult]:
    """A row for each bin that has queries. values: of the queries, [N]; ranks: of the queries, from 0, [N]; videos: of the queries, [N].
    lower_median: as `summarize` takes it."""
    out = []
    for one in bins:
        here = (values >= one.low) & (values < one.high)
        r = ranks[here]
        if len(r):
            worth = independent(r < 1, videos[here])
            low, high = interval(float(np.mean(r < 1)) * worth, worth)
            found = summarize(torch.from_numpy(r), lower_median)
            out.append(BinResult(one.label, len(r), found["R1"], low, high, found["R5"], found["MdR"]))
    return out

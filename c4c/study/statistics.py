"""Mean and spread over seeds, and two paired comparisons with a baseline, which answer two questions.

*By seed*: would other seeds say the same? Each seed gives one difference; Student's paired t test is over seeds. Its test texts are
always the same, so it says nothing about other texts.

*By text*: would other test texts say the same? Each text gives one difference of hits, averaged over the seeds; its signs are flipped at
random. The trained models are always the same, so it says nothing about other seeds.

A difference that should hold in general must pass both. No p here is corrected for the number of rows that are compared.

Sources: Student, "The Probable Error of a Mean", Biometrika 1908. Smucker, Allan and Carterette, "A Comparison of Statistical
Significance Tests for Information Retrieval Evaluation", CIKM 2007 (randomisation by query). Phipson and Smyth, "Permutation P-values
Should Never Be Zero", 2010 (the added 1). Clopper and Pearson, "The Use of Confidence or Fiducial Limits", Biometrika 1934.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtr, stdtrit

DRAWS = 10_000  # random choices of signs
LEVEL = 0.95  # of intervals
_ROUNDING = 1e-9  # metrics are rounded to 1e-4: a spread below this is none


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation (n - 1) over n seeds; sd None for one seed."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """A row less its baseline, over the n seeds that both have.

    mean: of the differences. low, high: the 95 % interval of Student's t; p_seeds: its two-sided p (would other seeds say the same?). All
    None for one seed, and where all differences are equal: then the metric is too coarse to show any spread, and t is undefined.
    p_texts: of the sign-flip test over test texts (would other texts say the same?); None where ranks of the same texts are missing.
    """

    mean: float
    low: float | None
    high: float | None
    p_seeds: float | None
    p_texts: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and spread of one value a seed; None for no value."""
    if not values:
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Estimate(mean, sd, n)


def compare(differences: Sequence[float], p_texts: float | None = None) -> Comparison | None:
    """Student's paired t test of one difference a seed, with n - 1 degrees of freedom; None for no difference.

    The interval holds the expected difference over all seeds with a probability of 95 %, if differences over seeds are roughly normal.
    """
    if (found := estimate(differences)) is None:
        return None
    mean, sd, n = found.mean, found.sd, found.n
    if sd is None or sd < _ROUNDING:
        return Comparison(mean, None, None, None, p_texts, n)
    error = sd / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p_seeds = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Comparison(mean, mean - half, mean + half, p_seeds, p_texts, n)


def p_of_texts(
    row: Sequence[np.ndarray], baseline: Sequence[np.ndarray], videos: np.ndarray | None = None, draws: int = DRAWS
) -> float:
    """Two-sided p of the sign-flip test: are texts found as often by both?

    row, baseline: for each seed that both have, bool [texts], whether the right video is among the first k. videos: int [texts], the
    video of each text; texts of one video are not independent, so that their signs are flipped together. The statistic is the sum of
    differences; p = (1 + draws at least as far from 0) / (1 + draws). The draws are the same at every call.

    Raises ValueError if the shapes differ.
    """
    hits = [np.stack([np.asarray(one, np.int64) for one in side]) for side in (row, baseline)]
    if hits[0].shape != hits[1].shape:
        raise ValueError(f"hits of {hits[0].shape} and {hits[1].shape} (seeds, texts) cannot be paired")
    # whole numbers, so that draws as far from 0 as the data compare exactly
    differences = (hits[0] - hits[1]).sum(axis=0)
    if videos is not None:
        _, group = np.unique(videos, return_inverse=True)
        totals = np.zeros(group.max(initial=-1) + 1, np.int64)
        np.add.at(totals, group, differences)
        differences = totals
    rng = np.random.default_rng(20_210_418)
    drawn = np.zeros(draws, np.int64)
    # m random signs sum to 2 B - m with B binomial: a draw for each size of difference does for all texts of that size
    for size, m in zip(*np.unique(np.abs(differences[differences != 0]), return_counts=True), strict=True):
        drawn += size * (2 * rng.binomial(m, 0.5, draws) - m)
    extreme = int((np.abs(drawn) >= abs(int(differences.sum()))).sum())
    return (1 + extreme) / (1 + draws)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Clopper and Pearson's exact 95 % interval of a share of n independent trials, 0 to 1. share x n need not be whole: then it is
    the same formula by the beta distribution, for a mean of several counts."""
    tail, hits = (1 - LEVEL) / 2, share * n
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high

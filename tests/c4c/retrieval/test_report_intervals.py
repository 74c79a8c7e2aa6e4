"""The intervals beside the recalls of a report."""

import numpy as np
import pytest

from c4c.retrieval.report import summary

pytestmark = pytest.mark.slow  # imports DALI


def test_interval():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert summary.interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert summary.interval(0, 20) == pytest.approx((0, 16.11), abs=0.01)


@pytest.mark.parametrize("captions", [1, 5, 40])
def test_an_interval_holds_the_share_of_other_videos(captions):
    """In 95 of 100 tests, however many captions a video has: they are found together. (As in MSVD, with 40 of them.)"""
    rng, covered, share = np.random.default_rng(0), 0, 1 / 2.2
    videos = np.repeat(np.arange(200), captions)
    for _ in range(300):
        ranks = (rng.random(len(videos)) >= rng.beta(1, 1.2, 200)[videos]).astype(int)
        (row,) = summary.breakdown(summary.word_bins([3]), np.full(len(videos), 3), ranks, videos)
        covered += row.low <= 100 * share <= row.high
    assert 0.91 <= covered / 300 <= 0.98


def test_independent_queries():
    """One a video: all of them. Where captions of a video agree: one a video, or about that."""
    hits, videos = np.array([1, 1, 0, 0, 1, 1], bool), np.array([0, 0, 1, 1, 2, 2])
    assert summary.independent(hits, np.arange(6)) == 6
    assert summary.independent(hits, videos) == pytest.approx(2)  # 2/9 over 3/2 * (4 + 16 + 4) / 9 / 36
    assert summary.independent(np.ones(6, bool), videos) == summary.independent(np.zeros(6, bool), videos) == 3
    assert summary.independent(hits, np.zeros(6, int)) == 1
    assert summary.independent(np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1])) == 4  # no spread over videos

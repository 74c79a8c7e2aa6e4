"""Formulas against scipy's own tests and against brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from c4c.study.statistics import DRAWS, compare, estimate, p_of_texts, share_interval

RNG = np.random.default_rng(0)


def test_mean_and_sample_deviation():
    found = estimate([1.0, 2.0, 4.0])
    assert (found.mean, found.n) == (pytest.approx(7 / 3), 3)
    assert found.sd == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_one_seed_has_no_spread_and_none_has_no_estimate():
    assert (estimate([5.0]).mean, estimate([5.0]).sd, estimate([5.0]).n) == (5.0, None, 1)
    assert estimate([]) is None
    assert compare([]) is None


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_t_test_is_scipys(n):
    a, b = RNG.normal(30, 1, n), RNG.normal(31, 1, n)
    found, wanted = compare(list(a - b)), stats.ttest_rel(a, b)
    low, high = wanted.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((float((a - b).mean()), low, high))
    assert found.p_seeds == pytest.approx(wanted.pvalue)
    assert found.n == n


def test_a_known_interval():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t of 2 degrees of freedom 4.302653 (tables of Student's t)."""
    found = compare([1.0, 2.0, 3.0])
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize("differences", [[1.5], [1.5, 1.5, 1.5], [0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_without_spread_nothing_is_said_of_other_seeds(differences):
    found = compare(differences, 0.5)
    assert (found.low, found.high, found.p_seeds, found.p_texts) == (None, None, None, 0.5)
    assert found.mean == pytest.approx(differences[0])


def exact_p(totals) -> float:
    """Over all choices of signs."""
    seen = abs(sum(totals))
    signs = list(itertools.product((-1, 1), repeat=len(totals)))
    return sum(abs(sum(s * d for s, d in zip(one, totals, strict=True))) >= seen for one in signs) / len(signs)


@pytest.mark.parametrize("seed", range(5))
def test_sign_flips_agree_with_all_choices_of_signs(seed):
    rng = np.random.default_rng(seed)
    row, baseline = rng.random((3, 12)) < 0.6, rng.random((3, 12)) < 0.4
    totals = (row.astype(int) - baseline).sum(axis=0)
    exact = exact_p(totals.tolist())
    assert p_of_texts(list(row), list(baseline)) == pytest.approx(
        exact, abs=5 * (exact * (1 - exact) / DRAWS) ** 0.5 + 2e-4
    )


def test_one_seed_is_the_sign_test():
    """McNemar's exact test: of the texts that differ, a fair coin."""
    row, baseline = np.zeros(200, bool), np.zeros(200, bool)
    row[:25], baseline[100:110] = True, True
    wanted = stats.binomtest(25, 35, 0.5).pvalue
    assert p_of_texts([row], [baseline]) == pytest.approx(wanted, abs=0.006)


def test_equal_rows_have_p_one_and_p_is_never_zero():
    hits = RNG.random((2, 50)) < 0.5
    assert p_of_texts(list(hits), list(hits)) == 1.0
    assert p_of_texts([np.ones(500, bool)], [np.zeros(500, bool)]) == 1 / (1 + DRAWS)


def test_p_of_texts_has_no_direction_and_is_the_same_again():
    row, baseline = RNG.random((2, 3, 80)) < np.array([0.55, 0.4])[:, None, None]
    first = p_of_texts(list(row), list(baseline))
    assert p_of_texts(list(row), list(baseline)) == first
    assert p_of_texts(list(baseline), list(row)) == first


def test_texts_of_one_video_are_flipped_together():
    """Ten videos with 20 texts each that all differ: ten signs, not 200."""
    row, baseline = np.ones(200, bool), np.zeros(200, bool)
    videos = np.repeat(np.arange(10), 20)
    assert p_of_texts([row], [baseline], videos) == pytest.approx(2 / 2**10, abs=0.001)
    assert p_of_texts([row], [baseline]) == 1 / (1 + DRAWS)


def test_p_of_texts_is_right_under_chance():
    """Of rows that are equally good, about 5 % have p <= 0.05."""
    rng = np.random.default_rng(3)
    small = 0
    for _ in range(300):
        skill = rng.random(100)
        row, baseline = rng.random((2, 3, 100)) < skill
        small += p_of_texts(list(row), list(baseline), draws=1000) <= 0.05
    assert stats.binomtest(small, 300, 0.05, alternative="greater").pvalue > 0.001


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        p_of_texts([np.ones(3, bool)], [np.ones(4, bool)])


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (15, 30), (22, 30), (30, 30), (1, 1)])
def test_share_interval_is_clopper_and_pearsons(hits, n):
    wanted = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert share_interval(hits / n, n) == pytest.approx((wanted.low, wanted.high))


def test_share_interval_of_a_mean_lies_between():
    assert share_interval(15 / 30, 30)[0] < share_interval(15.5 / 30, 30)[0] < share_interval(16 / 30, 30)[0]

"""Every sentence is true, whatever the numbers: each claim in it is checked against them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from c4c.study.findings import as_number, findings_of
from tests.c4c.study.folders import EVALUATED, TRAINED, row_result, with_comparisons


def said_of(rows) -> tuple[str, ...]:
    return findings_of(with_comparisons(rows))


def sweep(values: dict[float, list], baseline: str = ""):
    return [row_result(f"{x:g}", v, settings={"data.num_frames": x}, baseline=baseline if f"{x:g}" != baseline else "") for x, v in values.items()]  # fmt: skip


def test_a_sweep_that_saturates():
    said = said_of(sweep({1: [12.0, 12.6], 2: [20.0, 21.0], 6: [30.5, 31.5], 12: [30.6, 31.0]}))
    assert said[0] == (
        "R@1 is highest at num_frames=6, 31.0 ± 0.7 (2 seeds); it is 12.3 ± 0.4 at num_frames=1 and 30.8 ± 0.3 at num_frames=12. "
        "From num_frames=6 to 12, no row differs from the best by more than the spread over seeds (± 0.71)."
    )


def test_a_sweep_with_one_best():
    (said, *_) = said_of(sweep({1: [12.0, 12.6], 2: [30.0, 30.1], 4: [20.0, 20.1]}))
    assert said.endswith("Its neighbours are lower by more than the spread over seeds (± 0.42): 1 and 4.")


def test_a_flat_sweep():
    (said, *_) = said_of(sweep({1: [12.0, 14.0], 2: [12.5, 13.0], 4: [11.9, 13.9]}))
    assert said.endswith("No row differs from the best by more than the spread over seeds (± 1.41).")


def test_one_seed_claims_nothing_about_chance():
    (said, *_) = said_of(sweep({1: [12.0], 2: [30.0], 4: [20.0]}))
    assert "may be chance" in said
    (said,) = said_of([row_result("a", [12.0]), row_result("b", [30.0])])
    assert "of one seed: whether another seed says the same is not known" in said


def test_a_lead_with_its_interval():
    (said,) = said_of([row_result("a", [30.0, 31.0, 32.0]), row_result("b", [20.0, 21.5, 21.0])])
    low, high = stats.ttest_rel([30, 31, 32], [20, 21.5, 21]).confidence_interval()
    assert f"95 % interval [{low:+.2f}, {high:+.2f}], which does not contain 0." in said
    (said,) = said_of([row_result("a", [30.0, 31.0, 22.0]), row_result("b", [20.0, 21.5, 31.0])])
    assert "which contains 0, so that these seeds do not tell the two apart" in said


def test_ties_and_seeds_not_in_common():
    assert said_of([row_result("a", [1.0, 2.0]), row_result("b", [2.0, 1.0])])[0].endswith("The two are equal.")
    assert "no seed in common" in said_of([row_result("a", [None, 2.0]), row_result("b", [1.0, None])])[0]
    assert "in each of 2 seeds" in said_of([row_result("a", [1.0, 2.0]), row_result("b", [2.0, 3.0])])[0]


def test_a_difference_over_fewer_seeds_than_the_means_says_so():
    said = said_of([row_result("a", [30.0, 31.0, 35.0]), row_result("b", [30.5, 31.2, None])])[0]
    assert (
        said.startswith("R@1 is highest for a, 32.0")
        and "The difference over the 2 seeds that both have is -0.35" in said
    )


def test_equal_rows_of_a_sweep_are_all_named():
    (said,) = said_of(sweep({1: [12.0, 12.6], 2: [30.0, 30.2], 4: [30.2, 30.0], 8: [20.0, 21.0]}))
    assert said.startswith(
        "R@1 is highest at num_frames=2, 30.1 ± 0.1 (2 seeds), and as high at num_frames=4; it is 12.3"
    )


def fixed(label: str, value: float, x: float):
    row = row_result(label, [value], settings={"data.num_frames": x})
    return replace(row, row=replace(row.row, recipe=EVALUATED))


def test_fixed_weights_have_no_seed():
    (said,) = said_of([fixed("a", 30.0, 1), fixed("b", 20.0, 2)])
    assert (
        said
        == "R@1 is highest for a, 30.0 (fixed weights), then b, 20.0. The difference is +10.00, and no seed changes it."
    )
    (said,) = said_of([fixed("1", 30.0, 1), fixed("2", 20.0, 2), fixed("4", 25.0, 4)])
    assert said.endswith("No seed changes these numbers; other test texts may.")


def test_rows_that_differ_in_more_than_a_number_are_no_sweep():
    rows = sweep({1: [12.0, 12.6], 2: [30.0, 30.1]})
    other = row_result("4", [20.0, 20.1], settings={"data.num_frames": 4})
    rows.append(replace(other, row=replace(other.row, recipe=replace(TRAINED, cfg="other.yaml"))))
    assert said_of(rows)[0].startswith("R@1 is highest for 2,")


def test_a_sweep_of_a_grid_with_a_second_key_names_rows_once():
    rows = [row_result(f"num_frames={x}, head=a", [y, y + 1], settings={"data.num_frames": x, "model.head": "a"}) for x, y in ((1, 9), (2, 20), (4, 12))]  # fmt: skip
    assert said_of(rows)[0].startswith("R@1 is highest at “num_frames=2, head=a”, 20.5")


def test_order_pairs():
    rows = [
        row_result("blind", [50.0, 48.0], "pairs_own_first", n_pairs=30),
        row_result("seeing", [80.0, 90.0], "pairs_own_first", n_pairs=30),
    ]
    (said,) = [one for one in said_of(rows) if one.startswith("Own video")]
    low, high = stats.binomtest(25, 30).proportion_ci(method="exact")  # of 25.5
    assert "above chance: seeing 85.0 % [" in said
    assert "Not above chance: blind 49.0 % [" in said
    shown = [int(n) for n in re.search(r"seeing 85.0 % \[(\d+), (\d+)\]", said).groups()]
    assert 100 * low - 1 < shown[0] < 100 * low + 3
    assert 100 * high - 1 < shown[1] < 100 * high + 3
    assert "over 30 pairs" in said
    (said,) = [one for one in said_of(rows[:1]) if one.startswith("Own video")]
    assert "above chance: none. Not above chance: blind" in said


def test_failures_are_named():
    said = said_of([row_result("a", [None, 2.0, 3.0]), row_result("b", [1.0, 2.0, None])])
    assert said[-1] == "Failed, and not in the numbers: a, seed 0; b, seed 2."
    assert said_of([row_result("a", [None])]) == ("Failed, and not in the numbers: a, seed 0.",)


def test_groups_are_apart():
    rows = [row_result("32", [1.0, 2.0], group="batch"), row_result("64", [5.0, 6.0], group="batch"), row_result("x", [9.0, 9.5], group="head")]  # fmt: skip
    said = said_of(rows)
    assert said[0].startswith("batch: R@1 is highest for 64, 5.5 ± 0.7 (2 seeds), then 32")
    assert said[1] == "head: only x has results so far: R@1 9.2 ± 0.4, 2 seeds."


def test_a_label_that_is_a_number_is_named_with_its_key():
    said = said_of(sweep({1: [12.0, 12.6, 12.2], 2: [30.0, 30.1, None], 4: [20.0, 20.1, 20.4]}, baseline="1"))
    assert said[1].startswith("Rows whose difference from num_frames=1 over seeds has a 95 % interval without 0: ")
    assert "num_frames=4 by +" in said[1]
    assert said[-1] == "Failed, and not in the numbers: num_frames=2, seed 2."


@pytest.mark.parametrize(("value", "number"), [(1, 1.0), ("1.0e-4", 1e-4), (True, None), ("head", None), ("inf", None), (None, None)])  # fmt: skip
def test_numbers(value, number):
    assert as_number(value) == number


def random_rows(rng):
    """Rows of chance, with missing seeds, ties and rows that are no numbers."""
    n_rows, n_seeds = rng.integers(1, 7), rng.integers(1, 5)
    numeric = rng.random() < 0.6
    spread = rng.choice([0.0, 0.1, 2.0])
    values = {}
    for i in range(n_rows):
        mean = rng.choice([20.0, 30.0, rng.uniform(0, 99)])
        one = np.clip(np.round(mean + spread * rng.standard_normal(n_seeds), 1), 0, 100)
        values[i] = [None if rng.random() < 0.2 else v for v in one]
    baseline = "x0" if rng.random() < 0.7 else ""
    return [
        row_result(f"x{i}", v, settings={"k": i if numeric else f"v{i}"}, baseline=baseline if i else "")
        for i, v in values.items()
    ]


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_each_sentence_is_true(first):
    for seed in range(first, first + 100):
        rows = random_rows(np.random.default_rng(seed))
        estimates = {row.row.label: e for row in rows if (e := row.estimate("t2v_R1"))}
        means = {label: e.mean for label, e in estimates.items()}
        sds = {label: e.sd for label, e in estimates.items()}
        by_seed = {row.row.label: {one.seed: one.metrics["t2v_R1"] for one in row.done} for row in rows}
        said = said_of(rows)
        assert len(said) <= 5
        assert bool(means) == any("R@1" in one for one in said)
        for one in said:
            assert check(one, means, sds, by_seed), (seed, one)


def check(said: str, means: dict, sds: dict, by_seed: dict) -> bool:
    if said.startswith("Failed"):
        return len(re.findall(r"x\d, seed \d", said)) > 0
    if said.startswith("only"):
        return len(means) == 1
    if said.startswith("Rows whose"):
        return check_baseline(said, by_seed)
    best = re.match(r"R@1 is highest (?:at k=|for )(x\d), ([\d.]+)", said)
    assert means[best[1]] == max(means.values())
    assert float(best[2]) == pytest.approx(means[best[1]], abs=0.051)
    if " at k=" in said:
        return check_sweep(said, best[1], means, sds)
    second = re.search(r", then (x\d), ", said)[1]
    assert means[second] == sorted(means.values())[-2]
    if "are equal" in said:
        return means[second] == means[best[1]]
    common = by_seed[best[1]].keys() & by_seed[second].keys()
    differences = [by_seed[best[1]][s] - by_seed[second][s] for s in common]
    if "no seed in common" in said:
        return not common
    if "of one seed" in said:
        return len(common) == 1
    if "in each of" in said:
        return np.ptp(differences) < 1e-6
    wanted = stats.ttest_1samp(differences, 0).confidence_interval()
    shown = re.search(r"interval \[([+-][\d.]+), ([+-][\d.]+)\]", said)
    assert [float(n) for n in shown.groups()] == pytest.approx(list(wanted), abs=0.0051)
    return ("does not contain 0" in said) == (not wanted.low <= 0 <= wanted.high)


def check_sweep(said: str, best: str, means: dict, sds: dict) -> bool:
    if "may be chance" in said:
        return any(sd is None for sd in sds.values())
    spread = max(sds.values())
    assert f"(± {spread:.2f})" in said
    far = [label for label in means if means[best] - means[label] > spread]
    labels = sorted(means)
    if "Its neighbour" in said:
        named = re.findall(r"x\d", said.rpartition(":")[2])
        place = labels.index(best)
        return named == [labels[i] for i in (place - 1, place + 1) if 0 <= i < len(labels)] and set(named) <= set(far)
    if ". No row differs" in said:
        return not far
    first, last = re.search(r"From k=(x\d) to (x\d),", said).groups()
    inside = labels[labels.index(first) : labels.index(last) + 1]
    return best in inside and not set(inside) & set(far) and bool(far)


def check_baseline(said: str, by_seed: dict) -> bool:
    sure, compared = [], 0
    for label, values in by_seed.items():
        common = values.keys() & by_seed["x0"].keys()
        differences = [values[s] - by_seed["x0"][s] for s in common]
        if label == "x0" or len(common) < 2 or np.ptp(differences) < 1e-6:
            continue
        compared += 1
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        sure += [label] * (not interval.low <= 0 <= interval.high)
    assert f"without 0: {len(sure) or 'none'} of {compared}" in said
    return re.findall(r"(x\d) by ", said) == sure

"""Sentences that follow from a table's numbers: what came out, and how sure it is. Each is true for any numbers, or is not said.

All are about R@1 of text to video, but for those on order-only pairs. "The spread" is the largest sample standard deviation over seeds of
the rows that a sentence is about. Intervals are of 95 %, paired by seed; they are not corrected for the number of rows compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from c4c.study.results import BLOCKED, DONE, FAILED, RowResult, SeedResult, compared, same_test
from c4c.study.statistics import Comparison, Estimate, share_interval
from c4c.study.words import short_key
from shards import count

METRIC = "t2v_R1"
_CHANCE = 0.5  # of the own video before its twin, for a model that does not see order
_NAMED = 6  # rows that a sentence names
_ALPHA = 0.05


@dataclass(frozen=True)
class _Scored:
    """A row with results."""

    row: RowResult
    of: Estimate

    @property
    def label(self) -> str:
        return _label(self.row)

    @property
    def text(self) -> str:
        """31.0 ± 0.5."""
        return f"{self.of.mean:.1f}" + ("" if self.of.sd is None else f" ± {self.of.sd:.1f}")

    @property
    def is_fixed(self) -> bool:
        """Whether it evaluates weights that no seed changes."""
        return self.row.row.recipe.kind == "evaluate" and self.row.row.recipe.source is None

    @property
    def seeds(self) -> str:
        return "fixed weights" if self.is_fixed else count(self.of.n, "seed")

    def at(self, key: str) -> str:
        """num_frames=4; the label alone where it says so."""
        return f"{key}={self.label}" if len(self.row.row.values) == 1 else self.label


def findings_of(rows: Sequence[RowResult]) -> tuple[str, ...]:
    """Sentences on a table of these rows, which have their comparisons."""
    groups = dict.fromkeys(row.row.group for row in rows)
    said = [sentence for group in groups for sentence in _of_group(group, [r for r in rows if r.row.group == group])]
    return (*said, *_of_pairs(rows), *_of_states(rows))


def _of_group(group: str, rows: list[RowResult]) -> Iterator[str]:
    scored = [_Scored(row, found) for row in rows if (found := row.estimate(METRIC)) is not None]
    start = f"{group}: " if group else ""
    if not scored:
        return
    if len(scored) == 1:
        yield f"{start}only {scored[0].label} has results so far: R@1 {scored[0].text}, {scored[0].seeds}."
        return
    if not all(same_test(row, scored[0].row) for row in (one.row for one in scored)):
        yield (
            f"{start or 'Rows: '}not all are tested on the same texts, so that they are not ranked here; a difference is shown only between rows "
            "with the same texts."
        )
        return
    axis = _axis(scored)
    yield start + (_sweep(axis[0], axis[1]) if axis else _ranking(scored))
    if len(scored) > 2:  # of two rows, the first sentence compares them
        yield from _of_baseline(start, rows)


def _axis(scored: list[_Scored]) -> tuple[str, list[tuple[float, _Scored]]] | None:
    """(key, rows by its value) if one key is all that varies, its values are numbers, and at least three rows have results."""
    recipes = [one.row.row.recipe for one in scored]
    if len({(one.kind, one.cfg, one.checkpoint, one.source.name if one.source else "") for one in recipes}) > 1:
        return None  # they differ in more than their settings
    keys = dict.fromkeys(key for one in scored for key in one.row.row.values)
    varied = [key for key in keys if len({str(one.row.row.values.get(key)) for one in scored}) > 1]
    if len(varied) != 1 or len(scored) < 3:
        return None
    numbers = [as_number(one.row.row.values.get(varied[0])) for one in scored]
    if any(number is None for number in numbers) or len(set(numbers)) < len(numbers):
        return None
    pairs = [(number, one) for number, one in zip(numbers, scored, strict=True) if number is not None]
    return short_key(varied[0]), sorted(pairs, key=lambda pair: pair[0])


def as_number(value: object) -> float | None:
    """A setting's value as a number, if it is one or is written as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _sweep(key: str, pairs: list[tuple[float, _Scored]]) -> str:
    """Of a row of numbers: ends, best, and from where on the rows are as good as the best."""
    scored = [one for _, one in pairs]
    best = _best(scored)
    ends = [f"{one.text} at {one.at(key)}" for one in (scored[0], scored[-1]) if one is not best]
    equal = [one.at(key) for one in scored if one is not best and one.of.mean == best.of.mean]
    as_high = f", and as high at {_listed(equal)}" if equal else ""
    text = f"R@1 is highest at {best.at(key)}, {best.text} ({best.seeds}){as_high}; it is {' and '.join(ends)}."
    if all(one.is_fixed for one in scored):
        return f"{text} No seed changes these numbers; other test texts may."
    if (spread := _spread(scored)) is None:
        return (
            f"{text} Not every row has two seeds, so that the spread is not known and these differences may be chance."
        )
    near = [best.of.mean - one.of.mean <= spread for one in scored]
    if all(near):
        return f"{text} No row differs from the best by more than the spread over seeds (± {spread:.2f})."
    # the run of rows around the best that are as good, in the order of the axis
    first = last = scored.index(best)
    while first > 0 and near[first - 1]:
        first -= 1
    while last < len(scored) - 1 and near[last + 1]:
        last += 1
    if first == last:
        others = [scored[i] for i in (first - 1, first + 1) if 0 <= i < len(scored)]
        names = " and ".join(one.label for one in others)
        return f"{text} Its {'neighbours are' if len(others) > 1 else 'neighbour is'} lower by more than the spread over seeds (± {spread:.2f}): {names}."
    span = f"{scored[first].at(key)} to {scored[last].label}"
    return f"{text} From {span}, no row differs from the best by more than the spread over seeds (± {spread:.2f})."


def _ranking(scored: list[_Scored]) -> str:
    """Of rows without an order: the best, and its lead."""
    best = _best(scored)
    runner_up = _best([one for one in scored if one is not best])
    text = f"R@1 is highest for {best.label}, {best.text} ({best.seeds}), then {runner_up.label}, {runner_up.text}."
    if best.of.mean == runner_up.of.mean:
        return f"{text} The two are equal."
    lead = compared(best.row, runner_up.row).get(METRIC)
    if lead is None:
        return f"{text} The two have no seed in common, so that they are not compared."
    return f"{text} {_lead(lead, best, runner_up)}"


def _lead(lead: Comparison, best: _Scored, runner_up: _Scored) -> str:
    texts = ""
    if lead.p_texts is not None:
        rare = "rare" if lead.p_texts <= _ALPHA else "not rare"
        texts = f" By test texts p is {p_text(lead.p_texts)}: such a difference is {rare} by chance."
    size = f"{lead.mean:+.2f}"
    if best.is_fixed and runner_up.is_fixed:
        return f"The difference is {size}, and no seed changes it.{texts}"
    if lead.n == 1:
        return f"The difference is {size}, of one seed: whether another seed says the same is not known.{texts}"
    if lead.low is None or lead.high is None:
        return f"The difference is {size} in each of {lead.n} seeds, so that no interval can be given.{texts}"
    contains = lead.low <= 0 <= lead.high
    means = (
        "which contains 0, so that these seeds do not tell the two apart" if contains else "which does not contain 0"
    )
    shared = any(one.of.n > lead.n for one in (best, runner_up))  # the means above are over other seeds, too
    over = f"the {lead.n} seeds that both have" if shared else f"{lead.n} seeds"
    return f"The difference over {over} is {size}, 95 % interval {interval_text(lead)}, {means}.{texts}"


def _of_baseline(start: str, rows: list[RowResult]) -> Iterator[str]:
    """Which rows differ from their baseline, if any can be compared by seeds."""
    tested = [(row, found) for row in rows if (found := row.versus.get(METRIC)) is not None and found.low is not None]
    if not tested:
        return
    sure = [(row, found) for row, found in tested if not found.low <= 0 <= found.high]  # type: ignore[operator]
    of_group = _label if start else _name
    baseline = next(of_group(row) for row in rows if row.row.label == tested[0][0].row.baseline)
    names = [f"{of_group(row)} by {found.mean:+.2f} {interval_text(found)}" for row, found in sure]
    which = f": {_listed(names)}" if names else ""
    yield (
        f"{start or 'Rows '}{'rows ' if start else ''}whose difference from {baseline} over seeds has a 95 % interval without 0: "
        f"{len(sure) or 'none'} of {len(tested)}{which}."
    )


def _name(row: RowResult) -> str:
    """The row's, with the key that it is a value of where the label alone is a number."""
    keys = list(row.row.values)
    alone = not row.row.group and len(keys) == 1 and as_number(row.row.label) is not None
    return _quoted(f"{short_key(keys[0])}={row.row.label}" if alone else row.row.name)


def _label(row: RowResult) -> str:
    return _quoted(row.row.label)


def _quoted(name: str) -> str:
    """In quotes, if it would not stand out among other words."""
    return f"“{name}”" if "," in name or ";" in name else name


def _of_pairs(rows: Sequence[RowResult]) -> Iterator[str]:
    """Which rows see order: the exact interval over pairs of the mean over seeds. The two texts of a pair are not independent, and all
    seeds have the same texts, so that a pair counts once."""
    above: list[str] = []
    rest: list[str] = []
    sizes = set()
    for row in rows:
        found, pairs = row.estimate("pairs_own_first"), {one.n_pairs for one in row.done}
        if found is None or len(pairs) != 1 or not (n := next(iter(pairs))):
            continue
        low, high = share_interval(found.mean / 100, n)
        sizes.add(n)
        text = f"{_name(row)} {found.mean:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"
        (above if low > _CHANCE else rest).append(text)
    if not sizes:
        return
    n_pairs = " or ".join(map(str, sorted(sizes)))
    yield (
        f"Own video before the twin that differs in order only (guessing: 50 %; exact 95 % interval over {n_pairs} pairs), above chance: "
        f"{_listed(above) or 'none'}. Not above chance: {_listed(rest) or 'none'}."
    )


def _of_states(rows: Sequence[RowResult]) -> Iterator[str]:
    """What is not in the numbers."""
    cells: dict[Path, tuple[RowResult, SeedResult]] = {}
    for row in rows:
        for one in row.seeds:
            cells.setdefault(one.folder, (row, one))
    failed = [f"{_name(row)}, seed {one.seed}" for row, one in cells.values() if one.state == FAILED]
    blocked = [one for _, one in cells.values() if one.state == BLOCKED]
    open_ = [one for _, one in cells.values() if one.state not in (DONE, FAILED, BLOCKED)]
    if failed:
        yield f"Failed, and not in the numbers: {_listed(failed)}."
    if blocked:
        yield f"Not run, since what they need failed: {count(len(blocked), 'cell')}."
    if open_:
        yield f"Not finished: {len(open_)} of {count(len(cells), 'cell')}; the numbers are of the others."


def _best(scored: list[_Scored]) -> _Scored:
    return max(scored, key=lambda one: one.of.mean)


def _spread(scored: list[_Scored]) -> float | None:
    """The largest over seeds; None if a row has one seed only."""
    spreads = [one.of.sd for one in scored]
    return None if any(sd is None for sd in spreads) else max(sd for sd in spreads if sd is not None)


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def interval_text(found: Comparison) -> str:
    """[-0.31, +1.20]; '' where there is none."""
    return "" if found.low is None or found.high is None else f"[{found.low:+.2f}, {found.high:+.2f}]"


def p_text(p: float | None) -> str:
    """With three decimals, at least 0.001; '' for none."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"

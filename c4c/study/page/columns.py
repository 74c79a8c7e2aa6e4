"""The columns of a study's table: which number of a row, of one seed and of a published result, and how it is written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from c4c.study.results import RowResult, SeedResult

NONE = "–"
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Column:
    """A column. group: the heading over it; full: its name in words; metric: its name in `metrics`, '' for none; up: whether more is better.

    number: of a row, what the column is sorted by, None for nothing; text: of a row; seed: of one seed, '' where a seed has none.
    """

    head: str
    group: str
    full: str
    number: Callable[[RowResult], float | None]
    text: Callable[[float], str]
    seed: Callable[[SeedResult], float | None] | None = None
    metric: str = ""
    up: bool = True

    def of(self, row: RowResult) -> str:
        """What stands in the row."""
        value = self.number(row)
        return NONE if value is None or not math.isfinite(value) else self.text(value)

    def of_seed(self, seed: SeedResult) -> str:
        """What stands in the line of a seed."""
        value = self.seed(seed) if self.seed else None
        return NONE if value is None or not math.isfinite(value) else self.text(value)

    def of_metrics(self, metrics: dict[str, float]) -> str:
        """What stands in the line of a published result."""
        value = metrics.get(self.metric)
        return NONE if value is None else self.text(value)


def decimal(value: float) -> str:
    """`43.1`"""
    return f"{value:.1f}".replace("-", _MINUS)


def signed(value: float) -> str:
    """`+0.4`, with a minus sign that is as wide; `0.0` for what rounds to nothing."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", _MINUS)


def p_text(p: float) -> str:
    """`0.42`, `0.034`, `< 0.001`"""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.095 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """`48 s`, `12.4 min`, `3.2 h`"""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3597 else f"{seconds / 3600:.1f} h"


def rate(value: float) -> str:
    """Three digits at least: `1204`, `98.2`, `0.52`"""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _metric(head: str, group: str, full: str, name: str, up: bool = True) -> Column:
    def number(row: RowResult) -> float | None:
        estimate = row.estimate(name)
        return None if estimate is None else estimate.mean

    return Column(head, group, full, number, decimal, lambda seed: seed.metrics.get(name), name, up)


def _cost(head: str, full: str, name: str, text: Callable[[float], str], up: bool) -> Column:
    def number(row: RowResult) -> float | None:
        estimate = row.cost(name)
        return None if estimate is None else estimate.mean

    return Column(head, "cost of a cell", full, number, text, lambda seed: getattr(seed, name), up=up)


def _versus(head: str, full: str, name: str, text: Callable[[float], str], up: bool = True) -> Column:
    def number(row: RowResult) -> float | None:
        comparison = row.versus.get("t2v_R1")
        return None if comparison is None else getattr(comparison, name)

    return Column(head, "R@1 less the baseline's", full, number, text, up=up)


_T2V, _PAIRS = "text to video", "order-only pairs"
FIRST = _metric("R@1 ± sd", _T2V, "R@1, text to video", "t2v_R1")  # the column that has a spread
DIFFERENCE = _versus("difference", "difference of R@1 to the baseline", "mean", signed)
INTERVAL = _versus("95 %", "95 % interval of the difference", "low", signed)  # sorted by its lower end
ALWAYS = (
    FIRST,
    _metric("R@5", _T2V, "R@5, text to video", "t2v_R5"),
    _metric("R@10", _T2V, "R@10, text to video", "t2v_R10"),
    _metric("MdR", _T2V, "median rank, text to video", "t2v_MdR", up=False),
    _metric("R@1", "video to text", "R@1, video to text", "v2t_R1"),
)
_OPTIONAL = (
    _metric("R@1", _PAIRS, "R@1 of order-only pairs", "pairs_R1"),
    _metric("own first", _PAIRS, "own video before its twin", "pairs_own_first"),
    DIFFERENCE,
    INTERVAL,
    _versus("p seeds", "p over seeds", "p_seeds", p_text, up=False),
    _versus("p texts", "p over texts", "p_texts", p_text, up=False),
    _cost("time", "wall time", "wall_s", duration, up=False),
    _cost("clips/s", "clips per second", "clips_per_s", rate, up=True),
    _cost("GiB", "memory in GiB", "memory_gib", decimal, up=False),
)


def columns_of(rows: Sequence[RowResult]) -> list[Column]:
    """Those of a table: what no row has has no column."""
    return [*ALWAYS, *(one for one in _OPTIONAL if any(one.number(row) is not None for row in rows))]


def groups_of(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """(heading, how many columns it stands over), in order."""
    found: list[tuple[str, int]] = []
    for one in columns:
        if found and found[-1][0] == one.group:
            found[-1] = (one.group, found[-1][1] + 1)
        else:
            found.append((one.group, 1))
    return found


def interval(row: RowResult) -> str:
    """`−0.2 to +1.0`: what the column of intervals shows."""
    comparison = row.versus.get("t2v_R1")
    if comparison is None or comparison.low is None or comparison.high is None:
        return NONE
    return f"{signed(comparison.low)} to {signed(comparison.high)}"

"""The plots of a study's table: a line over a number that was varied, dots for what is no number; both with the spread over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from c4c.pages.charts import Series, line_chart, short, ticks
from c4c.study.config import Plot
from c4c.study.page.rows import baselines_of
from c4c.study.results import RowResult, TableResult
from c4c.study.statistics import Estimate
from c4c.study.words import label_of
from shards import count

METRICS = {  # what can be plotted: its short name, and the axis
    "t2v_R1": ("R@1", "R@1, %"),
    "t2v_R5": ("R@5", "R@5, %"),
    "t2v_R10": ("R@10", "R@10, %"),
    "t2v_MdR": ("MdR", "median rank, lower is better"),
    "pairs_own_first": ("Pairs", "own video before its twin, % (chance of pairs: 50)"),
}
_CHANCE = {"pairs_own_first": 50.0}
_LINES = "abdefg"  # classes of colours and dashes; c is chance
_MARGIN = 0.04  # of the axis of a dot plot, on both sides


@dataclass(frozen=True)
class DotLine:
    """A line of a dot plot; places across it in percent. bar: both ends of mean ± sd, None for one seed."""

    label: str
    text: str
    mean: float | None
    bar: tuple[float, float] | None
    seeds: list[float]
    published: list[float]
    is_baseline: bool


@dataclass(frozen=True)
class DotPlot:
    """What is no number on the left, a metric from left to right. axis: (place in percent, label); marks: (class, place) of vertical lines."""

    title: str
    y_name: str
    lines: list[DotLine]
    axis: list[tuple[float, str]]
    marks: list[tuple[str, float]]


@dataclass(frozen=True)
class Figure:
    """A plot, once for each metric. legend: (class, words); note: what the plot leaves out."""

    title: str
    plots: list[tuple[str, Markup | DotPlot]]
    legend: list[tuple[str, str]]
    note: str


def figures_of(table: TableResult) -> list[Figure]:
    """A figure for each plot that the table asks for, and one of dots for each group of rows that has none."""
    found = []
    for group in dict.fromkeys(row.row.group for row in table.rows):
        rows = [row for row in table.rows if row.row.group == group]
        plots = [plot for plot in table.table.plots if plot.group == group and _fits(rows, plot.key)]
        found += [_lines(table, rows, plot) for plot in plots] or [_dots(table, rows, group)]
    return found


def metrics_of_plots(rows: Sequence[RowResult]) -> list[str]:
    """Those that a row has, or R@1 where there is no result yet."""
    return [name for name in METRICS if any(row.estimate(name) for row in rows)] or ["t2v_R1"]


# ---- lines ----


def _x(row: RowResult, key: str) -> float | None:
    value = row.row.values.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _others(rows: Sequence[RowResult], key: str) -> list[str]:
    """What else each row varies, which makes it part of another line; "" for all where everything changes along with the key."""
    found = [
        ", ".join(f"{name}={label_of(value)}" for name, value in row.row.values.items() if name != key) for row in rows
    ]
    together = len(set(found)) == len({_x(row, key) for row in rows}) == len(rows)
    return [""] * len(rows) if together else found


def _fits(rows: Sequence[RowResult], key: str) -> bool:
    """Whether two numbers at least are on the axis, and no more lines than can be told apart."""
    placed = [row for row in rows if _x(row, key) is not None]
    return len({_x(row, key) for row in placed}) > 1 and len(set(_others(placed, key))) <= len(_LINES)


def _chance(metric: str, rows: Sequence[RowResult]) -> float | None:
    """What guessing gives; None where that is nothing, or not known: more than two videos may differ in order only."""
    having = [seed for row in rows for seed in row.done if metric in seed.metrics]
    return _CHANCE.get(metric) if all(seed.n_pairs for seed in having) else None


def _lines(table: TableResult, rows: Sequence[RowResult], plot: Plot) -> Figure:
    placed = [(x, row) for row in rows if (x := _x(row, plot.key)) is not None]
    by_line: dict[str, list[tuple[float, RowResult]]] = {}
    for one, name in zip(placed, _others([row for _, row in placed], plot.key), strict=True):
        by_line.setdefault(name, []).append(one)
    kinds, values = dict(zip(by_line, _LINES, strict=False)), sorted(x for x, _ in placed)
    log = plot.log and values[0] > 0
    x_name = f"{plot.key} (logarithmic)" if log else plot.key
    charts: list[tuple[str, Markup | DotPlot]] = []
    for metric in metrics_of_plots(table.rows):
        series = []
        for name, alike in by_line.items():
            alike = sorted(alike, key=lambda one: one[0])
            series += [_published(alike, metric, name), _ours(alike, metric, name, kinds[name])]
        if not any(one.points for one in series):
            charts.append((metric, Markup("")))
            continue
        if (chance := _chance(metric, table.rows)) is not None:
            series.insert(0, Series("chance", "c", [(x, chance) for x in (values[0], values[-1])]))
        title, axis = f"{METRICS[metric][1]}, by {plot.key}. The table below has the numbers.", METRICS[metric][1]
        chart = line_chart(title, series, x_name, axis, y_range=_room(series), values=values, log=log)
        charts.append((metric, chart))
    left_out = len(rows) - len(placed)
    note = (
        f"{count(left_out, 'row')} of {len(rows)} without a number for {plot.key}: only in the table."
        if left_out
        else ""
    )
    legend = [(kind, name or _mean(rows)) for name, kind in kinds.items()]
    return Figure(plot.group or plot.key, charts, legend + _published_legend(rows), note)


def _room(series: Sequence[Series]) -> tuple[float, float] | None:
    """A range around a value that is the same everywhere, so that its line is not on the axis."""
    ends = [y for one in series for y in one.ends]
    return None if max(ends) > min(ends) else (max(0.0, ends[0] - 1), ends[0] + 1)


def _ours(alike: Sequence[tuple[float, RowResult]], metric: str, name: str, kind: str) -> Series:
    """The means of rows that vary nothing else, with every seed where there are several."""
    known = [(x, row, estimate) for x, row in alike if (estimate := row.estimate(metric)) is not None]
    points = [(x, estimate.mean) for x, _, estimate in known]
    faint = [(x, value) for x, row, estimate in known if estimate.n > 1 for value in _seeds(row, metric)]
    return Series(name or "ours", kind, points, [estimate.sd for *_, estimate in known], faint)


def _published(alike: Sequence[tuple[float, RowResult]], metric: str, name: str) -> Series:
    """The first published result of each row that has one."""
    found = [
        (x, row.published[0].metrics[metric])
        for x, row in alike
        if row.published and metric in row.published[0].metrics
    ]
    return Series(f"published, {name}" if name else "published", "p", found)


def _seeds(row: RowResult, metric: str) -> list[float]:
    return [seed.metrics[metric] for seed in row.done if metric in seed.metrics]


def _mean(rows: Sequence[RowResult]) -> str:
    return "mean over seeds" if any(len(row.done) > 1 for row in rows) else "one seed"


def _published_legend(rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    return [("p", "published")] if any(row.published for row in rows) else []


# ---- dots ----


def _dots(table: TableResult, rows: Sequence[RowResult], group: str) -> Figure:
    metrics = metrics_of_plots(table.rows)
    legend = [("o", _mean(rows))]
    legend += [("v", "baseline")] if baselines_of(rows) else []
    legend += [("h", "published")] if any(row.published for row in rows) else []
    return Figure(group, [(name, _dot_plot(rows, name)) for name in metrics], legend, "")


def _dot_plot(rows: Sequence[RowResult], metric: str) -> DotPlot | Markup:
    """Every row has a line, so that the plot says what is missing; "" where no row has the metric."""
    known, baselines = [(row, row.estimate(metric)) for row in rows], baselines_of(rows)
    ends = [end for row, estimate in known if estimate for end in _ends(row, estimate, metric)]
    if not ends:
        return Markup("")
    chance = _chance(metric, rows)
    ends += [] if chance is None else [chance]
    axis = ticks(min(ends), max(ends), 5)
    low, high = min(axis[0], *ends), max(axis[-1], *ends)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        share = (value - low) / span if high > low else 0.5
        return round(100 * (_MARGIN + (1 - 2 * _MARGIN) * share), 2)

    marks = [
        ("marker", place(estimate.mean))
        for row, estimate in known
        if estimate and (row.row.group, row.row.label) in baselines
    ]
    if chance is not None:
        marks.append(("line c", place(chance)))
    lines = [
        _dot_line(row, estimate, metric, place, (row.row.group, row.row.label) in baselines) for row, estimate in known
    ]
    labels = [(place(value), short(value)) for value in axis if low <= value <= high]
    return DotPlot(f"{METRICS[metric][1]}. The table below has the numbers.", METRICS[metric][1], lines, labels, marks)


def _ends(row: RowResult, estimate: Estimate, metric: str) -> list[float]:
    half = estimate.sd or 0.0
    published = [one.metrics[metric] for one in row.published if metric in one.metrics]
    return [estimate.mean - half, estimate.mean + half, *_seeds(row, metric), *published]


def _dot_line(
    row: RowResult, estimate: Estimate | None, metric: str, place: Callable[[float], float], is_baseline: bool
) -> DotLine:
    if estimate is None:
        return DotLine(row.row.label, "–", None, None, [], [], is_baseline)
    bar = None if estimate.sd is None else (place(estimate.mean - estimate.sd), place(estimate.mean + estimate.sd))
    published = [place(one.metrics[metric]) for one in row.published if metric in one.metrics]
    seeds = [place(value) for value in _seeds(row, metric)] if estimate.n > 1 else []
    return DotLine(row.row.label, f"{estimate.mean:.1f}", place(estimate.mean), bar, seeds, published, is_baseline)

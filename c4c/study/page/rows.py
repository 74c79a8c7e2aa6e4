"""A row of a study's table as the page shows it, and the counts of cells."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from c4c.study.page.columns import FIRST, INTERVAL, Column, interval
from c4c.study.results import BLOCKED, DONE, FAILED, MISSING, RUNNING, RowResult, SeedResult
from shards import count

WORDS = {DONE: "done", FAILED: "failed", RUNNING: "running", MISSING: "not run yet", BLOCKED: "blocked"}  # of a state


@dataclass(frozen=True)
class ShownCell:
    """A field of a table. key: what it is sorted by, '' for nothing; spread: `± 0.3`, '' for none."""

    text: str
    key: str
    spread: str = ""


@dataclass(frozen=True)
class ShownSeed:
    """A line of a row's seeds. name: `42`, or `42, 43, 44` where one cell serves them all; state: in words."""

    name: str
    seed: SeedResult
    state: str
    values: list[str]


@dataclass(frozen=True)
class ShownRow:
    """A row. id: its anchor; status: which of its seeds are done, in words; troubled: whether one of them failed or cannot run."""

    id: str
    result: RowResult
    is_baseline: bool
    status: str
    troubled: bool
    cells: list[ShownCell]
    seeds: list[ShownSeed]
    published: list[list[str]]


def shown_row(name: str, row: RowResult, columns: Sequence[Column], is_baseline: bool) -> ShownRow:
    """name: the row's anchor; columns: of the table."""
    seeds = [_shown_seed(same, columns) for same in _by_folder(row.seeds)]
    states = Counter(one.seed.state for one in seeds)
    return ShownRow(
        name, row, is_baseline, _status(states, row), bool(states[FAILED] or states[BLOCKED]),
        [_cell(one, row) for one in columns], seeds,
        [[one.of_metrics(published.metrics) for one in columns] for published in row.published],
    )  # fmt: skip


def _by_folder(seeds: Sequence[SeedResult]) -> list[list[SeedResult]]:
    """Seeds that share a cell together: the cell ran once."""
    found: dict[Path, list[SeedResult]] = {}
    for one in seeds:
        found.setdefault(one.folder, []).append(one)
    return list(found.values())


def _shown_seed(same: Sequence[SeedResult], columns: Sequence[Column]) -> ShownSeed:
    first = same[0]
    values = [one.of_seed(first) for one in columns if one.seed]
    return ShownSeed(", ".join(str(one.seed) for one in same), first, WORDS[first.state], values)


def _cell(column: Column, row: RowResult) -> ShownCell:
    value = column.number(row)
    key = "" if value is None else repr(value)
    if column is INTERVAL:
        return ShownCell(interval(row), key)
    estimate = row.estimate(column.metric) if column is FIRST else None
    spread = "" if estimate is None or estimate.sd is None else f"± {estimate.sd:.1f}"
    return ShownCell(column.of(row), key, spread)


def _status(states: Counter[str], row: RowResult) -> str:
    """`3 seeds`; `2 of 3 seeds, 1 failed`; `not run yet`"""
    total = sum(states.values())
    if total == 1 and len(row.seeds) > 1:
        name = f"one cell for all {len(row.seeds)} seeds"
        return name if states[DONE] else f"{name}, {WORDS[next(iter(states))]}"
    if states[DONE] == total:
        return count(total, "seed")
    if len(states) == 1:
        state = next(iter(states))
        return WORDS[state] if total == 1 or state == MISSING else f"all {total} seeds {WORDS[state]}"
    others = [f"{states[state]} {WORDS[state]}" for state in (FAILED, BLOCKED, RUNNING, MISSING) if states[state]]
    return f"{states[DONE]} of {count(total, 'seed')} done, {', '.join(others)}"


def baselines_of(rows: Iterable[RowResult]) -> set[tuple[str, str]]:
    """(group, label) of the rows that another is compared with."""
    return {(row.row.group, row.row.baseline) for row in rows if row.row.baseline}


def cells_by_state(rows: Iterable[RowResult], sources: Sequence[SeedResult] = ()) -> dict[str, list[SeedResult]]:
    """Every cell once, however many rows show it. sources: those that no row shows."""
    cells = {seed.folder: seed for seed in (*(seed for row in rows for seed in row.seeds), *sources)}
    return {state: [one for one in cells.values() if one.state == state] for state in WORDS}

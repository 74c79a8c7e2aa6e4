"""What the template of a study's page shows."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from scipy.special import chdtri, stdtrit

from c4c.pages.filling import fill
from c4c.study.page.columns import columns_of, duration, groups_of
from c4c.study.page.plots import METRICS, figures_of, metrics_of_plots
from c4c.study.page.rows import baselines_of, cells_by_state, shown_row
from c4c.study.results import RowResult, StudyResult, TableResult
from c4c.study.words import label_of, short_key
from shards import count

_FOLDER = Path(__file__).parent
_MOST_VALUES = 12  # of a setting that are listed


def page_of(result: StudyResult) -> bytes:
    """The page, complete: every string of the study is escaped."""
    return fill(_FOLDER, _context(result), filters={"duration": duration})


def _context(result: StudyResult) -> dict:
    study = result.study
    rows = [row for table in result.tables for row in table.rows]
    cells = cells_by_state(rows, result.sources)
    return {
        "title": study.title,
        "seeds": study.seeds,
        "cells": cells,
        "total": sum(len(of_state) for of_state in cells.values()),
        "seconds": sum(one.wall_s or 0.0 for of_state in cells.values() for one in of_state),
        "about": result.about,
        "tables": [_table(table) for table in result.tables],
        "metrics": METRICS,
        "command": shlex.join(["python", "-m", "c4c.study", "--cfg", study.file, *study.words, *study.options]),
        "out": str(study.out),
        "comparisons": sum("t2v_R1" in row.versus for row in rows),
        "n_pairs": sorted({seed.n_pairs for row in rows for seed in row.done if seed.n_pairs}),
        "has_pairs": any(row.estimate("pairs_R1") or row.estimate("pairs_own_first") for row in rows),
        "has_published": any(row.published for row in rows),
        "power": _power(len(study.seeds)),
    }


def _table(table: TableResult) -> dict:
    columns = columns_of(table.rows)
    baselines = baselines_of(table.rows)
    shown = [
        shown_row(f"{table.table.name}-{i}", row, columns, (row.row.group, row.row.label) in baselines)
        for i, row in enumerate(table.rows, 1)
    ]
    groups = dict.fromkeys(row.row.group for row in table.rows)
    return {
        "table": table.table,
        "findings": table.findings,
        "varied": [one for group in groups for one in _varied(group, table.rows)],
        "figures": figures_of(table),
        "plotted": metrics_of_plots(table.rows),
        "columns": columns,
        "heads": groups_of(columns),
        "row_head": _row_head(table.rows),
        "groups": [(group, [one for one in shown if one.result.row.group == group]) for group in groups],
        "seed_columns": [one for one in columns if one.seed],
        "has_spread": any((estimate := row.estimate("t2v_R1")) and estimate.sd is not None for row in table.rows),
        "has_results": any(row.done for row in table.rows),
        "troubles": [one for one in shown if one.troubled],
        "published": list(dict.fromkeys(
            (one.name, one.source, one.differs) for row in table.rows for one in row.published if one.differs
        )),
    }  # fmt: skip


def _varied(group: str, rows: Sequence[RowResult]) -> list[tuple[str, str, str]]:
    """(sweep, setting, its values) of what the rows of a group differ in."""
    alike = [row.row for row in rows if row.row.group == group]
    found = []
    for key in dict.fromkeys(key for row in alike for key in row.values):
        values = list(dict.fromkeys(label_of(row.values[key]) for row in alike if key in row.values))
        more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
        found.append((group, key, ", ".join(values[:_MOST_VALUES]) + more))
    return found


def _row_head(rows: Sequence[RowResult]) -> str:
    """The setting, where the labels of all rows are its values."""
    keys = {key for row in rows for key in row.row.values}
    if len(keys) == 1 and all(row.row.label == label_of(next(iter(row.row.values.values()), "")) for row in rows):
        return short_key(keys.pop())
    return "row"


def _power(n: int) -> dict | None:
    """What n seeds can show; None for one. reach: how many standard deviations of the paired differences a difference must be away
    from 0 for p < 0.05 in Student's test. low, high: the 95 % interval of the true spread, as multiples of the one that is seen
    (chi-squared with n - 1 degrees of freedom)."""
    if n < 2:
        return None
    return {
        "n": count(n, "seed"),
        "reach": float(stdtrit(n - 1, 0.975)) / math.sqrt(n),
        "low": math.sqrt((n - 1) / float(chdtri(n - 1, 0.025))),
        "high": math.sqrt((n - 1) / float(chdtri(n - 1, 0.975))),
    }

"""The tables of a study as files: CSV for spreadsheets and programs, Markdown for people."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from c4c.files import replace_text
from c4c.study.markdown import markdown_of
from c4c.study.outcomes import METRICS, PAIR_METRICS
from c4c.study.published import PublishedRow
from c4c.study.results import RowResult, SeedResult, StudyResult, TableResult

_COSTS = ("wall_s", "clips_per_s", "memory_gib")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DIGITS = 8  # that count: a p of 1e-7 is not 0


def write_csv(path: Path, result: StudyResult) -> None:
    """One line a row of a table in `path`; one a row and seed in the file beside it whose name ends in `_cells.csv`, for statistics of one's
    own. Rates are in per cent, MdR and MnR ranks from 1; an empty field is unknown. RFC 4180, UTF-8.

    Raises OSError that names the file.
    """
    metrics = metrics_of(result)
    rows = [_row(table, row, metrics) for table in result.tables for row in table.rows]
    cells = [_cell(table, row, seed, metrics) for table in result.tables for row in table.rows for seed in row.seeds]
    replace_text({path: _csv(rows), path.with_name(f"{path.stem}_cells.csv"): _csv(cells)})


def write_markdown(path: Path, result: StudyResult) -> None:
    """The tables in Markdown. Raises OSError that names the file."""
    replace_text({path: markdown_of(result)})


def metrics_of(result: StudyResult) -> tuple[str, ...]:
    """Those of text to video and back; those of order-only pairs if a cell has some."""
    found = {name for table in result.tables for row in table.rows for one in row.done for name in one.metrics}
    return (*METRICS, *(name for name in PAIR_METRICS if name in found))


def _row(table: TableResult, row: RowResult, metrics: Sequence[str]) -> dict[str, object]:
    line: dict[str, object] = {
        "table": table.table.name, "title": table.table.title, "group": row.row.group, "row": row.row.label,
        "settings": " ".join(f"{key}={value}" for key, value in row.row.values.items()), "baseline": row.row.baseline,
        "n_seeds": len(row.done), "n_seeds_planned": len({one.folder for one in row.seeds}),
    }  # fmt: skip
    for name in metrics:
        found = row.estimate(name)
        line |= {f"{name}_mean": found and found.mean, f"{name}_sd": found and found.sd}
    for name in metrics:
        line |= _comparison(row, name)
    for name in _COSTS:
        cost = row.cost(name)
        line |= {f"{name}_mean": cost and cost.mean, f"{name}_sd": cost and cost.sd}
    line["published"] = "; ".join(published_text(one) for one in row.published)
    first = row.published[0].metrics if row.published else {}
    line |= {f"published_{name}": first.get(name) for name in METRICS}
    errors = [f"seed {one.seed} {one.state}: {one.error}" for one in row.seeds if one.error]
    return {**line, "command": row.command, "failures": "; ".join(errors)}


def _comparison(row: RowResult, name: str) -> dict[str, object]:
    found = row.versus.get(name)
    columns = {
        "diff": "mean",
        "diff_low": "low",
        "diff_high": "high",
        "p_seeds": "p_seeds",
        "p_texts": "p_texts",
        "diff_n": "n",
    }
    return {f"{name}_{column}": getattr(found, attribute, None) for column, attribute in columns.items()}


def _cell(table: TableResult, row: RowResult, one: SeedResult, metrics: Sequence[str]) -> dict[str, object]:
    line: dict[str, object] = {
        "table": table.table.name, "group": row.row.group, "row": row.row.label, "seed": one.seed, "state": one.state,
        "folder": str(one.folder), "steps": one.steps if one.metrics else None,
    }  # fmt: skip
    line |= {name: one.metrics.get(name) for name in metrics}
    return line | {name: getattr(one, name) for name in _COSTS} | {"error": one.error}


def published_text(one: PublishedRow) -> str:
    """Name, numbers, what differs, and the source."""
    ways = {
        way: [
            f"{name.removeprefix(f'{way}_')} {value:g}" for name, value in one.metrics.items() if name.startswith(way)
        ]
        for way in ("t2v", "v2t")
    }
    numbers = ", ".join(f"{way} {' '.join(values)}" for way, values in ways.items() if values)
    return f"{one.name}: {numbers} ({one.differs} Source: {one.source})"


def _csv(lines: Iterable[dict[str, object]]) -> str:
    lines = list(lines)
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # its own dialect is RFC 4180's
    if lines:
        writer.writerow(lines[0])
    for line in lines:
        writer.writerow([_field(value) for value in line.values()])
    return text.getvalue()


def _field(value: object) -> object:
    """Numbers stay numbers; of a text that a spreadsheet would take for a formula, a quote is put in front.

    (OWASP, "CSV Injection".)
    """
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text

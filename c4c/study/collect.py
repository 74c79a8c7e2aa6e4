"""From the folders of a study's cells to what its tables show. Reading changes nothing, and a damaged file is told in a sentence."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from c4c.files import read_json_object
from c4c.study.attempts import attempts_of, last_code, last_error, seconds_of
from c4c.study.cells import EVALUATED, Cell, cells_of, command_of, in_order
from c4c.study.config import Study
from c4c.study.findings import findings_of
from c4c.study.jobs import is_running
from c4c.study.outcomes import measured, ranks_of, speed_of
from c4c.study.published import published_for
from c4c.study.results import (
    BLOCKED,
    DONE,
    FAILED,
    MISSING,
    RUNNING,
    RowResult,
    SeedResult,
    StudyResult,
    TableResult,
    compared,
)
from c4c.study.words import sentence
from c4c.training.run_folder import DONE as DONE_FILE


def collect(study: Study) -> StudyResult:
    """What the cells hold at this moment. No damaged, missing or half-written file raises: its cell says so."""
    cells = cells_of(study)
    found: dict[Path, SeedResult] = {}
    tables = []
    for table in study.tables:
        rows = []
        baselines = {(row.group, row.baseline) for row in table.rows}
        for row in table.rows:
            seeds = tuple(_seed_result(cells[table.name, row.name, seed], seed, found) for seed in study.seeds)
            beside = published_for(row, (row.group, row.label) in baselines)
            rows.append(RowResult(row, seeds, command_of(study, row, study.seeds[0]), beside))
        done = tuple(replace(row, versus=compared(row, _baseline_of(row, rows))) for row in rows)
        tables.append(TableResult(table, done, findings_of(done)))
    return StudyResult(study, tuple(tables), about(in_order(cells)), _sources(cells, found))


def _sources(cells: dict[tuple[str, str, int], Cell], found: dict[Path, SeedResult]) -> tuple[SeedResult, ...]:
    shown = {cell.folder for cell in cells.values()}
    out: dict[Path, SeedResult] = {}
    for (_, _, seed), cell in cells.items():
        needs = cell.needs
        while needs is not None:
            if needs.folder not in (*shown, *out):
                out[needs.folder] = _seed_result(needs, seed, found)
            needs = needs.needs
    return tuple(out.values())


def _baseline_of(row: RowResult, rows: list[RowResult]) -> RowResult | None:
    """The row that this one is compared with; None for a baseline itself."""
    same = (one for one in rows if (one.row.group, one.row.label) == (row.row.group, row.row.baseline))
    other = next(same, None) if row.row.baseline else None
    return None if other is row else other


def _seed_result(cell: Cell, seed: int, found: dict[Path, SeedResult]) -> SeedResult:
    """A cell is read once, whichever rows show it."""
    if cell.folder not in found:
        found[cell.folder] = _read_cell(cell, seed, found)
    return replace(found[cell.folder], seed=seed)


def _read_cell(cell: Cell, seed: int, found: dict[Path, SeedResult]) -> SeedResult:
    folder = cell.folder
    try:
        attempts = attempts_of(folder)
        if cell.is_done():
            result = DONE_FILE if cell.recipe.kind == "train" else EVALUATED
            return _finished(cell, seed, seconds_of(folder, attempts, result))
        code, wall = last_code(attempts), seconds_of(folder, attempts)
        if is_running(folder):
            return SeedResult(seed, RUNNING, "", folder, wall_s=wall)
        if problem := cell.problem():  # a run with other settings, or of other data, lies there
            return SeedResult(seed, FAILED, problem, folder, wall_s=wall)
        if code:
            return SeedResult(seed, FAILED, last_error(folder, code), folder, wall_s=wall)
    except (ValueError, OSError) as error:
        return SeedResult(seed, FAILED, sentence(error), folder)
    if cell.needs is not None and (source := _seed_result(cell.needs, seed, found)).state in (FAILED, BLOCKED):
        why = f"not run: needs {cell.needs.name}, which failed: {source.error}"
        return SeedResult(seed, BLOCKED, why, folder, wall_s=wall)
    return SeedResult(seed, MISSING, "", folder, wall_s=wall)


def _finished(cell: Cell, seed: int, wall_s: float | None) -> SeedResult:
    """Raises ValueError or OSError where its metrics are not there."""
    folder, trained = cell.folder, cell.recipe.kind == "train"
    found = measured(folder, trained)
    clips_per_s, memory_gib = speed_of(folder) if trained else (None, None)
    texts, error = None, ""
    try:
        texts = ranks_of(folder, found.metrics)
    except (ValueError, OSError) as damage:  # the metrics hold without them
        error = sentence(damage)
    result = SeedResult(
        seed, DONE, error, folder, found.metrics, None, wall_s, clips_per_s, memory_gib, found.steps, n_pairs=found.n_pairs
    )  # fmt: skip
    if texts is None:
        return result
    return replace(result, ranks=texts.ranks, videos=texts.videos, texts_digest=texts.digest)


def about(cells: Iterable[Cell]) -> dict[str, str]:
    """Machine, versions, data set and times, as the cells' own files tell them; what differs between cells is listed."""
    values_by_name: dict[str, dict[str, None]] = {}
    began, ended = [], []
    for cell in cells:
        try:
            attempts = attempts_of(cell.folder)
            versions = read_json_object(path) if (path := cell.folder / "versions.json").is_file() else {}
        except (ValueError, OSError):
            continue  # its row says what is wrong with it
        began += [one["began"] for one in attempts]
        ended += [one["ended"] for one in attempts if one["ended"] is not None]
        for name, value in _about_cell(attempts, versions):
            values_by_name.setdefault(name, {})[value] = None
    times = [("first cell began", min(began, default=None)), ("last cell ended", max(ended, default=None))]
    shown = {name: ", ".join(values) for name, values in values_by_name.items()}
    return shown | {
        name: f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" for name, at in times if at is not None
    }


def _about_cell(attempts: list[dict], versions: dict) -> Iterator[tuple[str, str]]:
    for one in attempts:
        if one.get("host"):
            gpus = one.get("gpus")
            yield "machine", f"{one['host']}{f' ({gpus})' if isinstance(gpus, str) and gpus else ''}"
    for name in ("system", "machine"):
        if versions.get(name):
            yield {"machine": "processor"}.get(name, name), str(versions[name])
    packages = [f"{name} {value}" for name, value in versions.items() if value and name not in ("system", "machine")]
    if packages:
        yield "versions", ", ".join(packages)

"""From the folders of a study's cells to what its tables show. Reading changes nothing, and a damaged file is told in a sentence."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from c4c.files import read_json_object
from c4c.study.attempts import attempts_of, last_code, last_error, seconds_of
from c4c.study.cells import EVALUATED, Cell, cells_of, command_of, in_order
from c4c.study.config import Row, Study, StudyTable
from c4c.study.jobs import is_running
from c4c.study.outcomes import measured, ranks_of, speed_of
from c4c.study.published import PublishedRow, published_for
from c4c.study.statistics import Comparison, Estimate, compare, estimate, p_of_texts
from c4c.study.words import sentence
from c4c.training.run_folder import DONE as DONE_FILE

DONE, FAILED, RUNNING, MISSING, BLOCKED = ("done", "failed", "running", "missing", "blocked")
HITS = {"t2v_R1": 1, "t2v_R5": 5, "t2v_R10": 10}  # metrics that are a share of texts, and the last rank that counts


@dataclass(frozen=True)
class SeedResult:
    """One seed of a row: what its cell holds.

    state: done; failed; running; missing (not begun, or interrupted); blocked (needs a cell that failed). error: a sentence, '' for none; of
    a done cell, what of it could not be used. metrics: t2v_R1 ... in per cent (MdR and MnR: ranks from 1), empty unless done. ranks: int64
    [texts], from 1, of the right video. wall_s: of all attempts. clips_per_s: median over the steps but the first tenth, None for an
    evaluation. memory_gib: the most that rank 0 used. steps: of the training, 0 for an evaluation. videos: int64 [texts], the video of
    each text; texts_digest: of what was ranked; n_pairs: pairs of videos that differ in order only.
    """

    seed: int
    state: str
    error: str
    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    ranks: np.ndarray | None = None
    wall_s: float | None = None
    clips_per_s: float | None = None
    memory_gib: float | None = None
    steps: int = 0
    videos: np.ndarray | None = None
    texts_digest: str = ""
    n_pairs: int = 0


@dataclass(frozen=True)
class RowResult:
    """A row of a table over its seeds. versus: by metric, this row less its baseline; empty for a baseline, and where none can be
    compared."""

    row: Row
    seeds: tuple[SeedResult, ...]
    command: str
    published: tuple[PublishedRow, ...] = ()
    versus: dict[str, Comparison] = field(default_factory=dict)

    @property
    def done(self) -> tuple[SeedResult, ...]:
        """Results that count, one a cell: fixed weights that are only evaluated are one cell for all seeds."""
        return tuple({one.folder: one for one in reversed(self.seeds) if one.state == DONE}.values())[::-1]

    def estimate(self, metric: str) -> Estimate | None:
        """Over the seeds that are done; None if none has the metric."""
        return estimate([one.metrics[metric] for one in self.done if metric in one.metrics])

    def cost(self, name: str) -> Estimate | None:
        """Of wall_s, clips_per_s or memory_gib."""
        values = (getattr(one, name) for one in self.done)
        return estimate([value for value in values if value is not None])


@dataclass(frozen=True)
class TableResult:
    """A table of the study. findings: sentences that follow from its numbers."""

    table: StudyTable
    rows: tuple[RowResult, ...]
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyResult:
    """All that is known of a study now. about: machine, versions, data set, when; only what the cells tell. sources: the cells that no
    row shows, since rows only start from them or evaluate them."""

    study: Study
    tables: tuple[TableResult, ...]
    about: dict[str, str] = field(default_factory=dict)
    sources: tuple[SeedResult, ...] = ()


def read(study: Study) -> StudyResult:
    """What the cells hold at this moment. No damaged, missing or half-written file raises: its cell says so."""
    from c4c.study.findings import findings_of  # which needs the classes above

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


def same_test(row: RowResult, other: RowResult) -> bool:
    """Whether two rows rank the same texts, so that their numbers can be compared: by what was ranked, or by their settings where
    that is not known."""
    ranked = [{one.texts_digest for one in each.done} for each in (row, other)]
    if all(ranked) and not any("" in digests for digests in ranked):
        return len(ranked[0] | ranked[1]) == 1
    config, another = row.row.recipe.config, other.row.recipe.config
    if config is None or another is None:
        return True
    return (config.data.test, config.data.paragraph) == (another.data.test, another.data.paragraph)


def compared(row: RowResult, baseline: RowResult | None) -> dict[str, Comparison]:
    """By metric, `row` less `baseline`: below 0 is better for MdR and MnR. A pair of cells counts once, however many seeds share it. Not
    compared are a cell with itself, and rows with other test texts."""
    if baseline is None or not same_test(row, baseline):
        return {}
    others = {one.seed: one for one in baseline.seeds if one.state == DONE}
    pairs: dict[tuple[Path, Path], tuple[SeedResult, SeedResult]] = {}
    for one in row.seeds:
        if one.state == DONE and (other := others.get(one.seed)) is not None and other.folder != one.folder:
            pairs.setdefault((one.folder, other.folder), (one, other))
    both = list(pairs.values())
    names = dict.fromkeys(name for one, other in both for name in one.metrics if name in other.metrics)
    result = {}
    for name in names:
        having = [(one, other) for one, other in both if name in one.metrics and name in other.metrics]
        comparison = compare([one.metrics[name] - other.metrics[name] for one, other in having], _p_texts(having, name))
        if comparison is not None:
            result[name] = comparison
    return result


def _p_texts(both: list[tuple[SeedResult, SeedResult]], name: str) -> float | None:
    """Of R@k of text to video, over the seeds where both have ranks of the same texts."""
    if name not in HITS:
        return None
    digests = {one.texts_digest for pair in both for one in pair}
    ranks = [(one.ranks, other.ranks) for one, other in both if one.ranks is not None and other.ranks is not None]
    if len(digests) != 1 or len(ranks) != len(both) or not ranks:
        return None
    k = HITS[name]
    return p_of_texts([a <= k for a, _ in ranks], [b <= k for _, b in ranks], both[0][0].videos)


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
    told: dict[str, dict[str, None]] = {}
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
            told.setdefault(name, {})[value] = None
    times = [("first cell began", min(began, default=None)), ("last cell ended", max(ended, default=None))]
    shown = {name: ", ".join(values) for name, values in told.items()}
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

"""What a study came to: its seeds, rows and tables, and one row compared with another."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from c4c.study.config import Row, Study, StudyTable
from c4c.study.published import PublishedRow
from c4c.study.statistics import Comparison, Estimate, compare, estimate, p_of_texts

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

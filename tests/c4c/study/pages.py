"""A study's result that no training made, for the tests of its page: numbers of a seeded generator around a made-up mean for each row."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from c4c.study.config import Plot, Recipe, Row, Study, StudyTable
from c4c.study.published import PublishedRow
from c4c.study.results import RowResult, SeedResult, StudyResult, TableResult
from c4c.study.statistics import compare

HOSTILE = '</script><img src=x onerror="window.hacked=1">&amp;<!-- <b>bold</b>'
RIGHT_TO_LEFT = "الكلب يركض في الحديقة"
SEEDS = (42, 43, 44)
ERROR = f"error: the loss is not a number at step 120 {HOSTILE}"
RECIPE = Recipe("train", "demo.yaml", (), None, "", None)  # of all rows: the page shows none of it

State = Callable[[str, int], str]  # (table/label, seed) -> state of the cell


def row(label: str, values: dict | None = None, group: str = "", baseline: str = "") -> Row:
    return Row(label, values or {}, RECIPE, group, "" if label == baseline else baseline)


def metrics(rng: np.random.Generator, mean: float, pairs: bool) -> dict[str, float]:
    r1 = float(rng.normal(mean, 0.6))
    found = {
        "t2v_R1": r1,
        "t2v_R5": r1 + 25 + float(rng.normal(0, 0.4)),
        "t2v_R10": r1 + 36,
        "t2v_MdR": 2.0,
        "v2t_R1": r1 - 0.7,
    }
    if pairs:
        found |= {"pairs_R1": r1 / 2, "pairs_own_first": 50 + mean / 4 + float(rng.normal(0, 1))}
    return found


def seed_result(rng: np.random.Generator, name: str, seed: int, state: str, mean: float, pairs: bool) -> SeedResult:
    folder = Path("runs/made-up/cells") / f"{name}-1f3a9c02-seed{seed}"
    if state == "failed":
        return SeedResult(seed, state, ERROR, folder, wall_s=12.0)
    if state == "blocked":
        return SeedResult(seed, state, f"not run: needs stage-one-77aa01bc-seed{seed}, which failed", folder)
    if state != "done":
        return SeedResult(seed, state, "", folder)
    found = metrics(rng, mean, pairs)
    return SeedResult(
        seed, state, "", folder, found, None, float(rng.uniform(900, 5000)), float(rng.uniform(80, 1500)),
        float(rng.uniform(8, 60)), 1200, n_pairs=24 if pairs else 0,
    )  # fmt: skip


def results(
    table: StudyTable, means: dict[str, float], seeds: Sequence[int], state: State, pairs: bool = False,
    published: dict[str, float] | None = None,
) -> TableResult:  # fmt: skip
    """means: by label; rows are compared with the baseline of their group."""
    rng = np.random.default_rng(len(table.name))
    rows = []
    for one in table.rows:
        name = f"{table.name}-{one.label}"
        cells = tuple(seed_result(rng, name, seed, state(name, seed), means[one.label], pairs) for seed in seeds)
        known = (published or {}).get(one.label)
        papers = () if known is None else (
            PublishedRow("Made-up et al.", {"t2v_R1": known, "t2v_R5": known + 26}, "no paper", "Everything: it is made up."),
        )  # fmt: skip
        command = f"python launch/train.py --cfg demo.yaml run.seed={seeds[0]} run.dir=runs/made-up/cells/{name}"
        rows.append(RowResult(one, cells, command, papers))
    compared = tuple(RowResult(one.row, one.seeds, one.command, one.published, versus(one, rows)) for one in rows)
    findings = (f"Of {len(rows)} rows, the first has the label {rows[0].row.label}.",) if rows else ()
    return TableResult(table, compared, findings)


def versus(one: RowResult, rows: Sequence[RowResult]) -> dict:
    base = next((o for o in rows if (o.row.group, o.row.label) == (one.row.group, one.row.baseline)), None)
    if base is None or base is one:
        return {}
    pairs = [(a, b) for a, b in zip(one.seeds, base.seeds, strict=True) if a.state == b.state == "done"]
    found = compare([a.metrics["t2v_R1"] - b.metrics["t2v_R1"] for a, b in pairs], 0.0004)
    return {} if found is None else {"t2v_R1": found}


def study(tables: Sequence[TableResult], seeds: Sequence[int] = SEEDS, title: str = "A made-up study") -> StudyResult:
    made = Study(
        title, Path("runs/made-up"), tuple(seeds), tuple(one.table for one in tables), ("python",), 1, 0, {},
        "my study.yaml", ("data.num_frames=4",),
    )  # fmt: skip
    about = {"machine": "made-up", "versions": "c4c 0, torch 0", "data set": "made-up test, 200 videos"}
    return StudyResult(made, tuple(tables), about)


def all_done(name: str, seed: int) -> str:
    return "done"


def frames(seeds: Sequence[int] = SEEDS, state: State = all_done) -> TableResult:
    """A line with published numbers."""
    counts = (1, 2, 4, 6, 8, 12)
    rows = tuple(row(f"{n} frame{'s' * (n != 1)}", {"data.num_frames": n}, "", "12 frames") for n in counts)
    table = StudyTable(
        "frames",
        "Is one image enough?",
        "The model sees this many frames of a video.",
        rows,
        (Plot("", "data.num_frames", False),),
    )
    means = {one.label: 43 - 9 / n for one, n in zip(rows, counts, strict=True)}
    return results(table, means, seeds, state, published={one.label: means[one.label] + 1 for one in rows[::2]})


def pretraining(seeds: Sequence[int] = SEEDS, state: State = all_done) -> TableResult:
    labels = (
        "none, zero-shot",
        "none, fine-tuned",
        "stage one, zero-shot",
        "stage one, fine-tuned",
        HOSTILE,
        RIGHT_TO_LEFT,
    )
    table = StudyTable(
        "pretraining", "Does post-pretraining help?", "", tuple(row(one, baseline=labels[1]) for one in labels), ()
    )
    means = dict(zip(labels, (31.2, 42.1, 33.0, 43.3, 40.0, 41.0), strict=True))
    return results(table, means, seeds, state)


def temporal(seeds: Sequence[int] = SEEDS, state: State = all_done) -> TableResult:
    heads, patches = ("meanP", "seqLSTM", "seqTransf", "tightTransf", "wti"), ("2d", "3d")
    rows = tuple(
        row(f"{head}, {patch}", {"model.head": head, "model.patch": patch}, "", "meanP, 2d")
        for head, patch in product(heads, patches)
    )
    table = StudyTable("temporal", "Which temporal modelling?", "Heads by kinds of patches.", rows, ())
    means = {one.label: 36 + 0.9 * i for i, one in enumerate(rows)}
    return results(table, means, seeds, state, pairs=True)


def sensitivity(seeds: Sequence[int] = SEEDS, state: State = all_done) -> TableResult:
    """Sweeps: a line, a line over a logarithmic axis, dots; a line for each of two other values."""
    rates, sizes = (1e-5, 1e-4, 1e-3), (32, 64, 128)
    rows = [row(f"batch {n}", {"train.batch_size": n}, "batch size", "batch 64") for n in sizes]
    rows += [row(f"lr {lr:g}", {"train.lr": lr}, "learning rate of the head", "lr 0.0001") for lr in rates]
    rows += [row(f"{name}", {"data.sampling": name}, "sampling", "uniform") for name in ("head", "tail", "uniform")]
    rows += [
        row(f"{lr:g}, {n} frozen", {"train.lr": lr, "model.freeze": n}, "frozen layers", "0.0001, 0 frozen") for n in (0, 6) for lr in rates
    ]  # fmt: skip
    plots = (
        Plot("batch size", "train.batch_size", False), Plot("learning rate of the head", "train.lr", True), Plot("frozen layers", "train.lr", True),
    )  # fmt: skip
    table = StudyTable("sensitivity", "How sensitive is it?", "One setting at a time.", tuple(rows), plots)
    return results(table, {one.label: 40 + i % 3 for i, one in enumerate(rows)}, seeds, state)


def some_trouble(name: str, seed: int) -> str:
    """One seed failed, a row blocked, one not run, one running."""
    if name.startswith("pretraining-stage one, zero"):
        return "blocked"
    states = {("frames-4 frames", 44): "failed", ("frames-1 frame", 43): "running", ("temporal-wti, 3d", 44): "missing"}
    return states.get((name, seed), "done")


def whole(
    seeds: Sequence[int] = SEEDS, state: State = some_trouble, title: str = "The paper's four questions, made up"
) -> StudyResult:
    return study([make(seeds, state) for make in (frames, pretraining, temporal, sensitivity)], seeds, title)

"""Folders of cells as trainings and evaluations leave them, and studies of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from c4c.study.config import Recipe, Row, Study, StudyTable
from c4c.study.results import RowResult, SeedResult, compared

TRAINED = Recipe("train", "demo.yaml", (), None, "", None)
EVALUATED = Recipe("evaluate", "demo.yaml", (), None, "openai:ViT-B-32", None)


@dataclass(frozen=True)
class FakeCell:
    """Of the fields that results read."""

    folder: Path
    recipe: Recipe = TRAINED
    needs: "FakeCell | None" = None
    problem_text: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    def problem(self) -> str:
        return self.problem_text

    def is_done(self) -> bool:
        result = self.folder / ("done.json" if self.recipe.kind == "train" else "eval.json")
        return result.exists() and not self.problem_text


def summary(ranks) -> dict[str, float]:
    ranks = np.asarray(ranks)
    rates = {f"R{k}": round(100 * float((ranks <= k).mean()), 4) for k in (1, 5, 10)}
    return rates | {"MdR": float(np.median(ranks)), "MnR": round(float(ranks.mean()), 4)}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ranks(folder: Path, ranks, texts_a_video: int = 1) -> None:
    rows = [{"rank": int(r), "video": f"v{i // texts_a_video}", "text": f"text {i}"} for i, r in enumerate(ranks)]
    write_lines(folder / "ranks.jsonl", rows)


def train_cell(folder: Path, ranks, steps: int = 20, own_first: float | None = None, texts_a_video: int = 1) -> Path:
    """A finished training: two validations, of which the first is better."""
    folder.mkdir(parents=True)
    n = len(ranks)
    last = {f"val/t2v_{k}_{'rank' if k[0] == 'M' else 'pct'}": v for k, v in summary(ranks).items()}
    last |= {name.replace("t2v", "v2t"): value for name, value in last.items()}
    last |= {"val/n_texts": n, "val/n_videos": n // texts_a_video}
    if own_first is not None:
        last |= {"val/pairs_R1_pct": 10.0, "val/pairs_own_first_pct": own_first, "val/pairs_n_texts": n // 2}
    better = last | {"step": steps // 2, "val/t2v_R1_pct": 100.0}
    write_lines(folder / "eval.jsonl", [better, last | {"step": steps}])
    write_lines(folder / "metrics.jsonl", [{"step": i + 1, "clips_per_s": 1.0 if i < steps // 10 else 50.0 + i, "memory_gib": 1 + i / 100} for i in range(steps)])  # fmt: skip
    write_ranks(folder, ranks, texts_a_video)
    (folder / "done.json").write_text(json.dumps({"step": steps, "best": "step1", "time_unix_s": 5.0}))
    return folder


def eval_cell(folder: Path, ranks) -> Path:
    """A finished evaluation."""
    folder.mkdir(parents=True)
    found = {"t2v": summary(ranks), "v2t": summary(ranks), "n_texts": len(ranks), "n_videos": len(ranks)}
    (folder / "eval.json").write_text(json.dumps(found))
    write_ranks(folder, ranks)
    return folder


def study_of(tables: list[StudyTable], out: Path, seeds=(1, 2, 3)) -> Study:
    return Study("A study", out, tuple(seeds), tuple(tables), ("python",), 1, 0, {}, "study.yaml", ())


def row_result(
    label: str, values, metric: str = "t2v_R1", group: str = "", baseline: str = "", settings=None, **more
) -> RowResult:
    """A row with one value a seed; None for a seed that failed."""
    row = Row(label, settings or {}, TRAINED, group, baseline)
    seeds = []
    for seed, value in enumerate(values):
        folder = Path(f"/cells/{group}{label}-{seed}")
        if value is None:
            seeds.append(SeedResult(seed, "failed", "out of memory", folder))
        else:
            seeds.append(SeedResult(seed, "done", "", folder, {metric: float(value), "t2v_R1": float(value)}, **more))
    return RowResult(row, tuple(seeds), f"python launch/train.py {label}")


def with_comparisons(rows: list[RowResult]) -> list[RowResult]:
    by_name = {(row.row.group, row.row.label): row for row in rows}
    return [
        RowResult(
            row.row,
            row.seeds,
            row.command,
            row.published,
            compared(row, by_name.get((row.row.group, row.row.baseline))),
        )
        for row in rows
    ]

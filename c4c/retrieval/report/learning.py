"""What a run folder says about its training, for the report."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from c4c.training.run_folder import SCORE, score
from pipelines.quarantine import json_lines

_MOST_POINTS = 300  # of a curve; more steps are averaged
Curve = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Learning:
    """Curves of a run, and seconds. merged: steps that a point of `loss` and `lr` stands for; marker: the step evaluated."""

    loss: Curve = field(default_factory=list)
    lr: Curve = field(default_factory=list)
    t2v: Curve = field(default_factory=list)
    v2t: Curve = field(default_factory=list)
    steps: int = 0
    merged: int = 1
    step_s: float = 0.0
    wait_s: float = 0.0
    marker: int | None = None

    def __bool__(self) -> bool:
        return bool(self.loss or self.t2v)


def learning(run: Path | None, checkpoint: str) -> Learning:
    """The curves of a run; empty where there is no run, or it has recorded nothing. A damaged line is left out."""
    if run is None:
        return Learning()
    steps = _by_step(json_lines(run / "metrics.jsonl"))
    evals = _by_step(json_lines(run / "eval.jsonl"))
    merged = max(1, math.ceil(len(steps) / _MOST_POINTS))
    tag = re.search(r"step(\d+)$", str(checkpoint).rstrip("/"))
    return Learning(
        loss=_curve(steps, "train/loss", merged),
        lr=_curve(steps, "train/lr", merged),
        t2v=[(step, value) for step, row in evals if (value := _score(row)) is not None],
        v2t=_curve(evals, "val/v2t_R1_pct", 1),
        steps=len(steps),
        merged=merged,
        step_s=sum(_number(row, "step_s") or 0.0 for _, row in steps),
        wait_s=sum(_number(row, "data/wait_s") or 0.0 for _, row in steps),
        marker=int(tag[1]) if tag else None,
    )


def _by_step(rows: list[dict]) -> list[tuple[int, dict]]:
    """In the order of steps; of two rows of one step (a run that was continued) the later."""
    kept = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return sorted(kept.items())


def _number(row: dict, name: str) -> float | None:
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _score(row: dict) -> float | None:
    try:
        return _number({SCORE: score(row)}, SCORE)
    except KeyError:
        return None


def _curve(rows: list[tuple[int, dict]], name: str, merged: int) -> Curve:
    """Means over `merged` points each, at the last of their steps."""
    points = [(step, value) for step, row in rows if (value := _number(row, name)) is not None]
    parts = [points[i : i + merged] for i in range(0, len(points), merged)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]

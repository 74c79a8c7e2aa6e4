"""What a finished cell measured, from the files that training and evaluation write in its folder."""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from c4c.files import read_json_object
from c4c.training.run_folder import read_done
from pipelines.quarantine import json_lines, json_object

METRICS = tuple(f"{way}_{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "MdR", "MnR"))
PAIR_METRICS = ("pairs_R1", "pairs_own_first")  # of splits that have order-only pairs
LOWER_IS_BETTER = tuple(name for name in METRICS if name.endswith(("MdR", "MnR")))
_WAYS = ("t2v", "v2t", "pairs")
_WARM_UP = 0.1  # of the steps, which speed leaves out: compilers, caches and file systems warm up
_SAME = 0.01  # metrics are rounded to 0.0001


@dataclass(frozen=True)
class CellOutcome:
    """What an evaluation gave. metrics: by METRICS and PAIR_METRICS; steps: of the training, 0 for an evaluation; n_pairs: order-only
    pairs of videos in the split, 0 where that is not known."""

    metrics: dict[str, float]
    steps: int
    n_pairs: int


@dataclass(frozen=True)
class TextRanks:
    """ranks: int64 [texts], from 1. videos: int64 [texts], the video of each, numbered as they appear. digest: of texts and videos."""

    ranks: np.ndarray
    videos: np.ndarray
    digest: str


def measured(folder: Path, trained: bool) -> CellOutcome:
    """What a cell that is done came to: at the last step of a training, never at its best; or in an evaluation.

    Raises ValueError, or OSError, if that is not there.
    """
    if not trained:
        path, step = folder / "eval.json", 0
        tree = read_json_object(path)
        parts = {way: part for way in _WAYS if isinstance(part := tree.get(way), dict)}
        values = {f"{way}_{name}": value for way, part in parts.items() for name, value in part.items()}
        sizes = {name: tree.get(name) for name in ("n_texts", "n_videos")}
    else:
        path, step = folder / "eval.jsonl", _last_step(folder)
        row = _validation_of(path, step)
        values = {re.sub("_(pct|rank)$", "", key.removeprefix("val/")): value for key, value in row.items()}
        sizes = {name: values.get(name) for name in ("n_texts", "n_videos")}
    metrics = {name: _number(values[name], name, path) for name in (*METRICS, *PAIR_METRICS) if name in values}
    if "t2v_R1" not in metrics:
        raise ValueError(f"{path} is damaged: it has no R@1 of text to video")
    return CellOutcome(metrics, step, _pairs(values, sizes))


def _pairs(values: dict, sizes: dict) -> int:
    """How many order-only pairs there are; 0 where that is not known."""
    if isinstance(told := values.get("pairs_n_pairs"), int):
        return told
    texts = values.get("pairs_n_texts")  # files of before tell the texts only: with one a video, two are a pair
    return texts // 2 if isinstance(texts, int) and sizes["n_texts"] == sizes["n_videos"] else 0


def _last_step(folder: Path) -> int:
    step = (read_done(folder) or {}).get("step")
    if not isinstance(step, int):
        raise ValueError(f"{folder / 'done.json'} is damaged: it names no step")
    return step


def _validation_of(path: Path, step: int) -> dict:
    rows = json_lines(path)
    if not rows or rows[-1].get("step") != step:
        last = f"; its last is of step {rows[-1].get('step')}" if rows else ""
        raise ValueError(f"{path} has no validation of the last step, {step}{last}")
    return rows[-1]


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{path} is damaged: {name} is {value!r}, not a number")
    return float(value)


def ranks_of(folder: Path, metrics: dict[str, float]) -> TextRanks | None:
    """The rank of each text; None without ranks.jsonl. metrics: which they must give.

    Raises ValueError if the file is damaged, or of another validation.
    """
    path = folder / "ranks.jsonl"
    if not path.is_file():
        return None
    # not splitlines(): captions may hold other line ends
    lines = path.read_text(errors="replace").rstrip("\n").split("\n")
    rows = [row for line in lines if (row := json_object(line)) is not None]
    ranks = [row.get("rank") for row in rows]
    if not rows or len(rows) != len(lines) or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
        raise ValueError(f"{path} is damaged, so that nothing can be tested text by text")
    found = np.array(ranks, np.int64)
    of_file = {f"t2v_R{k}": 100 * float((found <= k).mean()) for k in (1, 5, 10)} | {"t2v_MnR": float(found.mean())}
    if any(abs(value - metrics.get(name, value)) > _SAME for name, value in of_file.items()):
        raise ValueError(
            f"{path} is not of the validation that gave the metrics, so that nothing is tested text by text"
        )
    names = [(str(row.get("video")), str(row.get("text"))) for row in rows]
    number = {video: i for i, video in enumerate(dict.fromkeys(video for video, _ in names))}
    digest = hashlib.sha256(repr(names).encode(errors="replace")).hexdigest()
    return TextRanks(found, np.array([number[video] for video, _ in names], np.int64), digest)


def speed_of(folder: Path) -> tuple[float | None, float | None]:
    """(clips per second of all ranks, GiB) of a training: the median over the steps but the first tenth, and the most that rank 0 used
    (of its GPU's memory, or of the host's where it has none). None for what metrics.jsonl does not tell. Raises OSError."""
    kept = {row["step"]: row for row in json_lines(folder / "metrics.jsonl") if isinstance(row.get("step"), int)}
    rows = [kept[step] for step in sorted(kept)]
    clips = _numbers(rows[math.ceil(_WARM_UP * len(rows)) :] or rows, "clips_per_s")
    memory = _numbers(rows, "memory_gib")
    return float(np.median(clips)) if clips else None, max(memory, default=None)


def _numbers(rows: list[dict], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]

"""Studies whose trainings are stood in for by fake_training.py, which takes a moment."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from c4c.study.config import Study
from c4c.study.reading import read_study

FAKE = f"python {Path(__file__).with_name('fake_training.py')}"
FILE = {
    "launcher": FAKE, "jobs": 2, "seeds": [1, 2], "cfg": "demo_small.yaml",
    "recipes": {"stage-one": {"cfg": "demo_narrated.yaml"}},
    "tables": [
        {"name": "frames", "grid": {"data.num_frames": [1, 2, 4]}, "baseline": {"data.num_frames": 2}, "plot": "data.num_frames"},
        {"name": "pretraining", "baseline": "none", "rows": [
            {"label": "none"}, {"label": "stage one", "from": "stage-one", "set": {"train.lr": 5.0e-4}},
        ]},
    ],
}  # fmt: skip


def written(folder: Path, **changes: object) -> Path:
    """FOLDER/study.yaml, beside the folders that its recipes name as data."""
    for name in ("narrated", "train", "test"):
        (folder / "data/narrated" / name).mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**FILE, "out": str(folder / "out"), **changes}, sort_keys=False))
    return path


def study_in(folder: Path, *words: str, **changes: object) -> Study:
    return read_study(written(folder, **changes), words)


def events(out: Path, *what: str) -> list[str]:
    """Names of the cells that began, were saved, or are done, in order."""
    path = out / "starts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["cell"] for row in rows if row["what"] in what]


def results(out: Path) -> dict[str, str]:
    """The validations of each cell."""
    return {path.parent.name: path.read_text() for path in (out / "cells").glob("*/eval.jsonl")}


def nothing(*_: object) -> None:
    """Stands in for writing the outputs, and for saying something."""


Say = Callable[[str], None]

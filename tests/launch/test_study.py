"""`python -m c4c.study`: a study that really trains, killed in the middle, comes to the very validations of the unbroken one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.runs import ROOT, SETTINGS, lines, own_environment

pytestmark = [pytest.mark.launch, pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def settings(launcher) -> dict:
    words = [
        *SETTINGS,
        f"data.train={launcher.train}",
        f"data.test={launcher.test}",
        "checkpoint.every_steps=2",
        "train.epochs=2",
    ]
    return {key: yaml.safe_load(text) for key, _, text in (word.partition("=") for word in words)}


def file_in(folder: Path, settings: dict) -> Path:
    folder.mkdir()
    rows = [
        {"label": "two frames", "set": {"data.num_frames": 2}}, {"label": "not trained", "evaluate": "two"},
        {"label": "four frames, from two", "from": "two", "set": {"data.num_frames": 4}},
    ]  # fmt: skip
    tables = [{"name": "all", "rows": rows, "baseline": "two frames"}]
    study = {
        "out": str(folder / "out"), "launcher": "python", "jobs": 2, "seeds": [1], "cfg": "demo.yaml", "set": settings,
        "recipes": {"two": {"set": {"data.num_frames": 2}}}, "tables": tables,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def start(file: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "c4c.study", "--cfg", str(file), *words]
    env = own_environment() | {"DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def validations(out: Path) -> dict[str, list[dict]]:
    return {
        path.parent.name: [{key: value for key, value in line.items() if key != "time_unix_s"} for line in lines(path)]
        for path in (out / "cells").glob("*/eval.jsonl")
    }


def wait_for_steps(out: Path, steps: int, study: subprocess.Popen) -> None:
    """Until some cell has taken so many."""
    until = time.monotonic() + 300
    while not any(path.read_text().count("\n") >= steps for path in (out / "cells").glob("*/metrics.jsonl")):
        assert time.monotonic() < until and study.poll() is None, study.communicate()
        time.sleep(0.02)


def test_a_study_that_is_killed_comes_to_the_results_of_the_unbroken_one(tmp_path, settings):
    unbroken, killed = (file_in(tmp_path / name, settings) for name in ("unbroken", "killed"))
    told = (whole := start(unbroken)).communicate(timeout=600)[1]
    assert whole.returncode == 0 and "3 of 3 cells done" in told, told
    out = tmp_path / "killed" / "out"
    study = start(killed)
    wait_for_steps(out, 3, study)
    study.send_signal(signal.SIGKILL)
    told = study.communicate(timeout=300)[1]
    assert study.returncode == -signal.SIGKILL, told
    last = start(killed)
    told = last.communicate(timeout=600)[1]
    assert last.returncode == 0 and "3 of 3 cells done" in told, told
    assert validations(out) == validations(tmp_path / "unbroken" / "out") and len(validations(out)) == 2
    (evaluated,) = (out / "cells").glob("eval-two-*")
    assert json.loads((evaluated / "eval.json").read_text())["t2v"]["R1"] >= 0
    page = (out / "study.html").read_text()
    assert "not trained" in page and "failed" not in (out / "study.csv").read_text()
    attempts = [lines(path) for path in (out / "cells").glob("*/attempts.jsonl")]
    assert sum(len({line["began"] for line in one}) for one in attempts) > 3  # some were continued

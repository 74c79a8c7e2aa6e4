"""The command, stopped and killed at any moment: it goes on, comes to the same results, and runs nothing twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.c4c.study.studies import events, results, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "c4c.study", "--cfg", str(file), *words]


def started(file: Path, seconds: float = 0.3, *words: str) -> subprocess.Popen:
    env = os.environ | {"FAKE_SECONDS": str(seconds)}
    return subprocess.Popen(command(file, *words), cwd=file.parent, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)


def histories(out: Path) -> dict[str, list[str]]:
    """What each cell's processes said, in order."""
    rows = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    return {name: [row["what"] for row in rows if row["cell"] == name] for name in {row["cell"] for row in rows}}


@pytest.mark.nightly
def test_ten_kills_at_random_moments(tmp_path):
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    whole = started(written(tmp_path / "unbroken"), 0.1)
    killed, out, draw, in_work = written(tmp_path / "killed"), tmp_path / "killed" / "out", random.Random(0), 0
    for number in range(10):
        before, study = len(events(out, "began")), started(killed, 2 if number < 3 else 60)
        while number % 4 and len(events(out, "began")) == before:
            assert study.poll() is None
            time.sleep(0.01)
        time.sleep(1.5 * draw.random())
        assert study.poll() is None
        study.kill()
        study.communicate()
        in_work += len(events(out, "began")) > before
    last = started(killed, 0.5)
    told = last.communicate(timeout=200)[1]
    assert last.returncode == 0 and "10 of 10 cells done" in told, told
    whole.communicate(timeout=200)
    assert results(out) == results(tmp_path / "unbroken" / "out") and len(results(out)) == 10
    for name, what in histories(out).items():  # one process at a time, each saved what it had, and none after the end
        assert what == ["began", "saved"] * (len(what) // 2 - 1) + ["began", "done"], name
    assert in_work >= 7
    assert (out / "study.html").exists()


def test_a_killed_study_has_what_it_left_running_ended_by_the_next(tmp_path):
    file, out = written(tmp_path, seeds=[1]), tmp_path / "out"
    study = started(file, 60)
    wait_for(out / "starts.jsonl", study)
    study.kill()
    study.communicate()
    following = started(file, 0.1)
    told = following.communicate(timeout=200)[1]
    assert "which was still running after the study was killed" in told and following.returncode == 0, told
    assert len(events(out, "saved")) >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_cells_and_says_how_to_go_on(tmp_path, number):
    file, out = written(tmp_path, seeds=[1]), tmp_path / "out"
    study = started(file, 60)
    wait_for(out / "starts.jsonl", study)
    second = started(file)
    told = second.communicate(timeout=60)[1]
    assert second.returncode == 1 and "out is in use: process" in told, told
    study.send_signal(number)
    told = study.communicate(timeout=60)[1]
    assert study.returncode == 128 + number
    assert told.rstrip().split("\n")[-2:] == [
        f"stopped by {number.name}: 0 of 5 cells done. The same command goes on", f"    python -m c4c.study --cfg {file}",
    ]  # fmt: skip
    assert len(events(out, "saved")) == len(events(out, "began")) <= 2
    assert {"study.html", "study.csv", "study.md"} <= {path.name for path in out.iterdir()}


def test_the_plan_and_the_page_run_nothing(tmp_path):
    file = written(tmp_path, seeds=[1])
    plan = subprocess.run(command(file, "--plan"), cwd=tmp_path, capture_output=True, text=True)
    assert plan.returncode == 0 and "5 cells, 0 done, 1 in several rows" in plan.stdout
    assert "frames: 2; pretraining: none" in plan.stdout and "what others start from" in plan.stdout
    assert not (tmp_path / "out").exists()
    page = subprocess.run(
        command(file, "--page", "--only", "frames", "--seeds", "3", "train.lr=1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert page.returncode == 1 and "train.lr=1 on the command line" in page.stderr  # which a row sets
    page = subprocess.run(command(file, "--page"), cwd=tmp_path, capture_output=True, text=True)
    assert page.returncode == 0 and page.stdout.strip() == str(tmp_path / "out" / "study.html"), page.stderr
    assert not (tmp_path / "out" / "starts.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "frame"], "--only frame: no table has this name: did you mean frames?"),
        (["--out", ""], "--out is empty: is a variable of the shell not set?"),
        (["--jobs", "0"], "--jobs 0: must be from 1 to 1024"),
        (["--seeds", "1", "--seeds", "1"], "--seeds: seeds names one twice: [1, 1]"),
        (["--only", "train.epochs=1"], "--only train.epochs=1: it names none"),
        (["--seeds", "x"], "--seeds x: seeds are whole numbers"),
        (["--on", "slrum"], "--on slrum: must be local, slurm or dask:ADDRESS"),
        (["data.train=nowhere"], "table frames, row 1: there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_begun(tmp_path, words, message):
    ended = subprocess.run(command(written(tmp_path), *words), cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and message in ended.stderr
    assert not (tmp_path / "out").exists()

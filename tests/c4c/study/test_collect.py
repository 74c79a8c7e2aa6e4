"""From folders to results: what counts, what is said of what cannot count."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from c4c.study import collect
from c4c.study.config import Row, StudyTable
from c4c.study.jobs import LOCK
from c4c.study.lock import FolderLock
from tests.c4c.study.folders import (
    EVALUATED,
    TRAINED,
    FakeCell,
    eval_cell,
    study_of,
    summary,
    train_cell,
    write_lines,
    write_ranks,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Reads a study of rows A and B (the baseline), of the given cells: {(label, seed): cell}."""

    def of(cells: dict, recipe=TRAINED, seeds=(1, 2, 3)):
        rows = (Row("A", {"model.head": "a"}, recipe, "", "B"), Row("B", {"model.head": "b"}, TRAINED, "", ""))
        empty = FakeCell(tmp_path / "none")
        found = {("t", row.name, seed): cells.get((row.label, seed), empty) for row in rows for seed in seeds}
        monkeypatch.setattr(collect, "cells_of", lambda study: found)
        monkeypatch.setattr(collect, "command_of", lambda study, row, seed: f"train {row.name} {seed}")
        monkeypatch.setattr(
            collect, "in_order", lambda cells: list({cell.folder: cell for cell in cells.values()}.values())
        )
        return collect.collect(study_of([StudyTable("t", "T", "", rows, ())], tmp_path, seeds))

    return of


def ranks(p: float, n: int = 200) -> np.ndarray:
    return np.where(RNG.random(n) < p, 1, RNG.integers(2, n + 1, n))


def one_cell(read, folder: Path, recipe=TRAINED, needs=None):
    return read({("A", 1): FakeCell(folder, recipe, needs)}, recipe).tables[0].rows[0].seeds[0]


def test_a_training_counts_by_its_last_step(read, tmp_path):
    given = ranks(0.4)
    found = one_cell(read, train_cell(tmp_path / "a", given, own_first=60.0))
    assert (found.state, found.error, found.steps, found.seed) == ("done", "", 20, 1)
    wanted = {f"{way}_{name}": value for way in ("t2v", "v2t") for name, value in summary(given).items()}
    assert found.metrics == pytest.approx(wanted | {"pairs_R1": 10.0, "pairs_own_first": 60.0})
    assert (found.ranks == given).all()
    assert found.n_pairs == 50  # 100 texts, two a pair
    lines = (tmp_path / "a" / "eval.jsonl").read_text()
    for told, n_pairs in (('"val/n_videos": 150', 0), ('"val/pairs_n_pairs": 7, "val/n_videos": 150', 7)):
        (tmp_path / "a" / "eval.jsonl").write_text(lines.replace('"val/n_videos": 200', told))
        assert one_cell(read, tmp_path / "a").n_pairs == n_pairs  # videos may have several texts, unevenly
    (tmp_path / "a" / "eval.jsonl").write_text(lines)
    assert found.clips_per_s == np.median(50.0 + np.arange(2, 20))  # without the first two steps
    assert found.memory_gib == pytest.approx(1.19)


def test_an_evaluation_has_no_speed(read, tmp_path):
    found = one_cell(read, eval_cell(tmp_path / "a", [1, 2, 6, 11]), EVALUATED)
    assert (found.state, found.clips_per_s, found.memory_gib, found.steps) == ("done", None, None, 0)
    assert (found.metrics["t2v_R1"], found.metrics["t2v_R5"], found.metrics["v2t_MnR"]) == (25.0, 50.0, 5.0)


DAMAGE = {
    "done.json": "done.json is damaged",
    "eval.jsonl": "eval.jsonl has no validation of the last step, 20",
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("how", ["empty", "torn", "bytes"])
def test_a_damaged_file_fails_its_cell_in_a_sentence(read, tmp_path, name, how):
    path = train_cell(tmp_path / "a", ranks(0.4)) / name
    path.write_bytes({"empty": b"", "torn": path.read_bytes()[:5], "bytes": b"\xff\x00\xfe{"}[how])
    found = one_cell(read, tmp_path / "a")
    assert (found.state, found.metrics) == ("failed", {})
    assert DAMAGE[name] in found.error


@pytest.mark.parametrize("value", [None, "43", True, {}])
def test_a_metric_that_is_no_number_fails_its_cell(read, tmp_path, value):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    row = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
    write_lines(folder / "eval.jsonl", [row | {"val/t2v_R5_pct": value}])
    found = one_cell(read, folder)
    assert found.state == "failed"
    assert "t2v_R5 is" in found.error


def test_a_validation_of_another_step_does_not_count(read, tmp_path):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    first = (folder / "eval.jsonl").read_text().splitlines()[0]
    (folder / "eval.jsonl").write_text(first + "\n")
    found = one_cell(read, folder)
    assert found.state == "failed"
    assert "its last is of step 10" in found.error


def test_the_result_of_another_cell_does_not_count(read, tmp_path):
    cell = FakeCell(train_cell(tmp_path / "a", ranks(0.4)), problem_text="train.lr was 1, now 2")
    found = read({("A", 1): cell}).tables[0].rows[0].seeds[0]
    assert (found.state, found.error, found.metrics) == ("failed", "train.lr was 1, now 2", {})


def test_a_file_that_cannot_be_read_is_no_traceback(read, tmp_path):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    (folder / "eval.jsonl").unlink()
    (folder / "eval.jsonl").mkdir()
    assert one_cell(read, folder).state == "failed"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "attempts.jsonl").mkdir()
    assert one_cell(read, tmp_path / "b").state == "failed"


@pytest.mark.parametrize("how", ["torn", "other", "rank 0"])
def test_ranks_that_are_not_the_metrics_own_are_not_used_and_that_is_said(read, tmp_path, how):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    path = folder / "ranks.jsonl"
    if how == "torn":
        path.write_text(path.read_text()[:-9])
    elif how == "other":
        write_ranks(folder, ranks(0.7))
    else:
        path.write_text(path.read_text().replace('"rank": 1,', '"rank": 0,', 1))
    found = one_cell(read, folder)
    assert (found.state, found.ranks) == ("done", None)
    assert "text by text" in found.error


def test_line_ends_inside_a_caption_end_no_line(read, tmp_path):
    folder = train_cell(tmp_path / "a", [1, 2])
    rows = [{"rank": 1, "video": "v0", "text": "a\u2028b\x85c"}, {"rank": 2, "video": "v1", "text": "d\r\ne"}]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = one_cell(read, folder)
    assert found.error == ""
    assert found.ranks.tolist() == [1, 2]


def attempts(folder: Path, *rows: dict) -> None:
    folder.mkdir(exist_ok=True)
    write_lines(
        folder / "attempts.jsonl", [{"host": "h", "gpus": "", "ended": None, "code": None} | row for row in rows]
    )


def test_states_of_what_is_not_done(read, tmp_path):
    failed = tmp_path / "failed"
    attempts(failed, {"began": 10}, {"began": 10, "ended": 40, "code": 1})
    (failed / "study.log").write_text("start\nerror: no folder data/x\nTraceback\n")
    found = one_cell(read, failed)
    assert (found.state, found.error, found.wall_s) == ("failed", "no folder data/x", 30)
    after = one_cell(read, tmp_path / "after", needs=FakeCell(failed))
    assert (after.state, after.error) == ("blocked", "not run: needs failed, which failed: no folder data/x")
    third = one_cell(read, tmp_path / "third", needs=FakeCell(tmp_path / "after", needs=FakeCell(failed)))
    assert third.state == "blocked"
    assert one_cell(read, tmp_path / "new").state == "missing"
    running = tmp_path / "running"
    attempts(running, {"began": time.time() - 5})
    lock = FolderLock(running / LOCK)
    assert lock.take()
    assert one_cell(read, running).state == "running"
    assert one_cell(read, tmp_path / "later", needs=FakeCell(running)).state == "missing"
    lock.release()
    assert one_cell(read, running).state == "missing"  # it was killed
    stopped = tmp_path / "stopped"  # by a signal that the trainer answered: it saved, and goes on at the next start
    attempts(stopped, {"began": 10, "ended": 20, "code": 0})
    assert one_cell(read, stopped).state == "missing"


def test_without_an_error_line_the_last_line_is_the_error(read, tmp_path):
    attempts(tmp_path / "a", {"began": 10, "ended": 11, "code": -9})
    assert one_cell(read, tmp_path / "a").error == "it ended with exit code -9 and said nothing"
    (tmp_path / "a" / "study.log").write_text("$ first\nerror: of an earlier attempt\n\n$ python launch/train.py\n")
    assert one_cell(read, tmp_path / "a").error == "it ended with exit code -9 and said nothing"
    (tmp_path / "a" / "study.log").write_bytes(b"one\rtwo \x1b[31m\xff\n\n")
    assert one_cell(read, tmp_path / "a").error == "two  [31m\ufffd"


def test_a_killed_attempt_lasts_until_its_last_sign(read, tmp_path):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    attempts(folder, {"began": 1000}, {"began": 2000}, {"began": 2000, "ended": 2600, "code": 0})
    for path in folder.iterdir():
        os.utime(path, (2600, 2600))
    (folder / "tensorboard").mkdir()
    old = folder / "tensorboard" / "events.1"
    old.write_text("")
    os.utime(old, (1300, 1300))
    assert one_cell(read, folder).wall_s == 300 + 600
    write_lines(folder / "metrics.jsonl", [{"step": 1, "time_unix_s": 1450.5}, {"step": 2, "time_unix_s": 2500}])
    os.utime(folder / "metrics.jsonl", (2600, 2600))
    assert one_cell(read, folder).wall_s == 450.5 + 600
    attempts(folder, {"began": 2000})  # the study was killed, and the training ended by itself
    os.utime(folder / "done.json", (2500, 2500))
    (folder / "index").write_text("made much later")
    assert one_cell(read, folder).wall_s == 500
    attempts(folder, {"began": 9000})
    assert one_cell(read, folder).wall_s == 0


def test_a_killed_attempt_without_another_is_missing(read, tmp_path):
    attempts(tmp_path / "a", {"began": 1000})
    os.utime(tmp_path / "a" / "attempts.jsonl", (1500, 1500))
    found = one_cell(read, tmp_path / "a")
    assert (found.state, found.wall_s) == ("missing", 500)


def cells_of_seeds(tmp_path: Path, seeds=(1, 2, 3)) -> dict:
    given = {("A", s): ranks(0.5) for s in seeds} | {("B", s): ranks(0.3) for s in seeds}
    return {key: FakeCell(train_cell(tmp_path / f"{key[0]}{key[1]}", one)) for key, one in given.items()}


def test_rows_are_compared_seed_by_seed_and_text_by_text(read, tmp_path):
    cells = cells_of_seeds(tmp_path)
    a, b = read(cells).tables[0].rows
    first, second = ([one.metrics["t2v_R1"] for one in row.seeds] for row in (a, b))
    found, wanted = a.versus["t2v_R1"], stats.ttest_rel(first, second)
    assert (found.p_seeds, found.n) == (pytest.approx(wanted.pvalue), 3)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert found.p_texts < 0.01
    assert a.versus["v2t_R1"].p_texts is None
    assert a.versus["t2v_MnR"].p_texts is None
    assert a.versus["t2v_MnR"].mean < 0
    assert b.versus == {}
    assert a.estimate("t2v_R1").mean == pytest.approx(np.mean(first))
    assert a.estimate("pairs_R1") is None
    assert a.command == "train A 1"


def test_only_seeds_that_both_have_are_compared(read, tmp_path):
    cells = cells_of_seeds(tmp_path)
    (cells["A", 1].folder / "done.json").unlink()
    (cells["B", 3].folder / "eval.jsonl").write_text("")
    a, b = read(cells).tables[0].rows
    found = a.versus["t2v_R1"]
    assert (found.n, found.low, found.p_seeds) == (1, None, None)
    assert found.mean == pytest.approx(a.seeds[1].metrics["t2v_R1"] - b.seeds[1].metrics["t2v_R1"])
    assert found.p_texts is not None
    assert (a.estimate("t2v_R1").n, b.estimate("t2v_R1").n) == (2, 2)
    (cells["A", 2].folder / "done.json").unlink()
    assert read(cells).tables[0].rows[0].versus == {}


def test_other_texts_are_not_compared(read, tmp_path):
    cells = cells_of_seeds(tmp_path, (1, 2))
    cells |= {("A", 3): FakeCell(train_cell(tmp_path / "a3", ranks(0.5, 100))), ("B", 3): FakeCell(train_cell(tmp_path / "b3", ranks(0.3)))}  # fmt: skip
    table = read(cells).tables[0]
    assert table.rows[0].versus == {}
    assert table.findings[0].startswith("Rows: not all are tested on the same texts")
    lines = (tmp_path / "A1" / "ranks.jsonl").read_text()
    (tmp_path / "A1" / "ranks.jsonl").write_text(lines.replace('"text 7"', '"another"'))
    assert read(cells, seeds=(1, 2)).tables[0].rows[0].versus == {}
    (tmp_path / "A1" / "ranks.jsonl").unlink()  # what was ranked is not known: the settings say that it was the same
    found = read(cells, seeds=(1, 2)).tables[0].rows[0].versus["t2v_R1"]
    assert (found.n, found.p_texts) == (2, None)
    (tmp_path / "A1" / "ranks.jsonl").write_text(lines)
    assert read(cells, seeds=(1, 2)).tables[0].rows[0].versus["t2v_R1"].p_texts is not None


def test_fixed_weights_are_one_result_for_all_seeds(read, tmp_path):
    fixed = FakeCell(eval_cell(tmp_path / "zero", ranks(0.2)), EVALUATED)
    cells = {("A", s): fixed for s in (1, 2, 3)} | {("B", s): FakeCell(train_cell(tmp_path / f"b{s}", ranks(0.3))) for s in (1, 2, 3)}  # fmt: skip
    a, b = read(cells, EVALUATED).tables[0].rows
    assert (a.estimate("t2v_R1").n, a.estimate("t2v_R1").sd) == (1, None)
    assert [one.seed for one in a.seeds] == [1, 2, 3]
    assert a.versus["t2v_R1"].n == 3  # against three trainings
    wanted = stats.ttest_1samp([a.seeds[0].metrics["t2v_R1"] - one.metrics["t2v_R1"] for one in b.seeds], 0)
    assert a.versus["t2v_R1"].p_seeds == pytest.approx(wanted.pvalue)


def test_a_cell_is_not_compared_with_itself(read, tmp_path):
    same = {(label, s): FakeCell(tmp_path / f"{s}") for label in "AB" for s in (1, 2)}
    for s in (1, 2):
        train_cell(tmp_path / f"{s}", ranks(0.3))
    assert read(same, seeds=(1, 2)).tables[0].rows[0].versus == {}


def test_cells_that_no_row_shows_count_as_sources(read, tmp_path):
    source = FakeCell(train_cell(tmp_path / "stage-one", ranks(0.4)))
    shown = FakeCell(train_cell(tmp_path / "a", ranks(0.4)), needs=source)
    found = read({("A", 1): shown, ("A", 2): FakeCell(tmp_path / "b", needs=shown)}, seeds=(1, 2))
    assert [(one.folder.name, one.state, one.seed) for one in found.sources] == [("stage-one", "done", 1)]


def test_about_is_what_the_cells_say(read, tmp_path):
    folder = train_cell(tmp_path / "a", ranks(0.4))
    attempts(folder, {"began": 0}, {"began": 0, "ended": 60, "code": 0})
    (folder / "versions.json").write_text(json.dumps({"torch": "2.15.0", "system": "Linux", "c4c": None}))
    found = read({("A", 1): FakeCell(folder)}).about
    assert found == {
        "machine": "h", "system": "Linux", "versions": "torch 2.15.0", "first cell began": "1970-01-01 00:00 UTC",
        "last cell ended": "1970-01-01 00:01 UTC",
    }  # fmt: skip

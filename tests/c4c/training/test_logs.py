"""What is recorded at every step and validation: it survives kills, torn lines and full disks."""

import contextlib
import json
import sys
import tracemalloc
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c4c.training.metric_log import Appender, Metrics
from c4c.training.run_folder import last_validation, require_wandb, validations

RESULT = {"t2v": {"R1": 10.0, "MdR": 3.0}, "v2t": {"R1": 20.0, "MdR": 4.0}, "n_texts": 5, "n_videos": 4}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(folder, name: str = "train/loss") -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.step(1, {"train/loss": 3.5, "data/wait_s": 0.25})
    assert lines(tmp_path / "metrics.jsonl")[0].items() >= {"step": 1, "train/loss": 3.5, "data/wait_s": 0.25}.items()
    metrics.step(2, {"train/loss": 2.5, "data/wait_s": 0.0})
    metrics.validation(2, RESULT)
    metrics.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    (validation,) = lines(tmp_path / "eval.jsonl")
    expected = {
        "step": 2,
        "val/t2v_R1_pct": 10.0,
        "val/t2v_MdR_rank": 3.0,
        "val/v2t_R1_pct": 20.0,
        "val/n_texts": 5,
        "val/n_videos": 4,
    }
    assert validation.items() >= expected.items()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 3.5), (2, 2.5)]
    assert [(e.step, e.value) for e in board.Scalars("val/t2v_R1_pct")] == [(2, 10.0)]


def test_order_pairs_are_logged_with_their_number(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.validation(2, RESULT | {"pairs": {"R1": 5.0, "own_first": 60.0, "n_texts": 4, "n_pairs": 1}})
    metrics.close()
    (validation,) = lines(tmp_path / "eval.jsonl")
    expected = {
        "val/pairs_R1_pct": 5.0,
        "val/pairs_own_first_pct": 60.0,
        "val/pairs_n_texts": 4,
        "val/pairs_n_pairs": 1,
    }
    assert validation.items() >= expected.items()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    for name in ("metrics.jsonl", "eval.jsonl"):
        whole = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
        (tmp_path / name).write_text(whole + '{"step": 6, "train/lo')  # killed while writing
    metrics = Metrics(tmp_path, 3)
    metrics.step(4, {"train/loss": 1.0})
    metrics.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert lines(tmp_path / "metrics.jsonl")[3]["train/loss"] == 1.0
    assert [line["step"] for line in lines(tmp_path / "eval.jsonl")] == [1, 2, 3]


def test_the_curves_of_a_resumed_run_have_each_step_once(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3, 4):
        metrics.step(step, {"train/loss": 1.0})
    metrics.validation(3, RESULT)
    metrics.close()
    metrics = Metrics(tmp_path, 3)
    metrics.step(4, {"train/loss": 2.0})
    metrics.close()
    assert curve(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert curve(tmp_path, "val/t2v_R1_pct") == [(3, 10.0)]


HISTORY = ("metrics.jsonl", "eval.jsonl", "bad_steps.jsonl")


def history(folder, steps: int = 400) -> dict[str, bytes]:
    for name in HISTORY:
        (folder / name).write_text(
            "".join(json.dumps({"step": s, "value": "x" * 60}) + "\n" for s in range(1, steps + 1))
        )
    return {name: (folder / name).read_bytes() for name in HISTORY}


@pytest.mark.parametrize("left", [0, 4096, 40_000])
def test_a_full_disk_takes_nothing_from_the_history_of_a_resumed_run(left, small_disk):
    disk, fill = small_disk
    before = history(disk)
    fill(left)
    with pytest.raises(OSError, match=r"l could not be written and stays as it was: No space left on device"):
        Metrics(disk, 390)
    assert {name: (disk / name).read_bytes() for name in HISTORY} == before
    assert sorted(p.name for p in disk.iterdir()) == sorted([*HISTORY, "filling"])
    (disk / "filling").unlink()
    with contextlib.closing(Metrics(disk, 390)):
        assert all((disk / name).read_text().count("\n") == 390 for name in HISTORY)


def test_a_long_history_is_forgotten_line_by_line(tmp_path):
    Metrics(tmp_path, 0).close()  # so that what it imports is not counted
    history(tmp_path, 20_000)
    tracemalloc.start()
    try:
        Metrics(tmp_path, 19_000).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(lines(tmp_path / name)) for name in HISTORY] == [19_000] * len(HISTORY)
    assert peak < (tmp_path / "metrics.jsonl").stat().st_size / 4


def test_history_that_needs_no_change_is_not_written(tmp_path):
    history(tmp_path)
    before = {name: (tmp_path / name).stat().st_ino for name in HISTORY}
    Metrics(tmp_path, 400).close()
    assert {name: (tmp_path / name).stat().st_ino for name in HISTORY} == before


@pytest.mark.parametrize("torn", ['{"step": 3, "val/t2v_R1_pct"', '{"step"', "3", "\0\0\0", "\xff\xfe", "[" * 5000])
def test_torn_lines_are_passed_over(torn, tmp_path):
    whole = "".join(json.dumps({"step": s, "val/t2v_R1_pct": 10.0 * s}) + "\n" for s in (1, 2))
    (tmp_path / "eval.jsonl").write_bytes((whole + torn).encode("latin-1"))
    assert last_validation(tmp_path) == 2
    assert validations(tmp_path) == [10.0, 20.0]
    metrics = Metrics(tmp_path, 2)
    metrics.validation(3, RESULT)
    metrics.close()
    assert [line["step"] for line in lines(tmp_path / "eval.jsonl")] == [1, 2, 3]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.step(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "epoch": 0})
    metrics.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (
        lines(tmp_path / "metrics.jsonl")[0].items()
        >= {"train/loss": None, "train/grad_norm": None, "epoch": 0}.items()
    )


@pytest.mark.parametrize("left", [0, 700, 4096])
def test_a_full_disk_costs_no_record(left, small_disk):
    """It is full from step 11 to 20; a validation is among what has to wait."""
    disk, fill = small_disk
    (disk / "big").touch()
    said = []
    metrics = Metrics(disk, 0, say=said.append)
    values = {"train/loss": 0.5} | {f"stage {i}": 1.5 for i in range(40)}
    for step in range(1, 31):
        if step == 11:
            fill(left)
        if step == 21:
            (disk / "filling").unlink()
        metrics.step(step, values)
        if step == 20:
            metrics.validation(step, RESULT)
            board = next((disk / "tensorboard").iterdir())
            files = [str(disk / "metrics.jsonl"), str(board)]
            full = [f"warning: {file} cannot be written (No space left on device)" for file in files]
            assert sorted(text.partition(". ")[0] for text in said[:2]) == sorted(full)
            assert all(line["step"] <= 20 for line in lines(disk / "metrics.jsonl"))  # none is torn
    metrics.close()
    assert [line["step"] for line in lines(disk / "metrics.jsonl")] == list(range(1, 31))
    assert [line["step"] for line in lines(disk / "eval.jsonl")] == [20]
    assert curve(disk) == [(step, 0.5) for step in range(1, 31)]
    again = [text for text in said if "can be written again" in text]
    assert len(again) >= 2 and len(said) == 2 * len(again)


def test_a_disk_that_stays_full_is_told_at_the_end(small_disk):
    disk, fill = small_disk
    said = []
    file = Appender(disk / "a.jsonl", said.append, most=1000)
    fill(0)
    for number in range(30):
        file.add(b"%098d\n" % number)
    file.close()
    assert (disk / "a.jsonl").read_bytes() == b""
    assert [text.partition(" (")[0] for text in said] == [
        f"warning: {disk / 'a.jsonl'} cannot be written",
        f"warning: 30 records of {disk / 'a.jsonl'} could not be written and will be missing",
    ]


def test_the_newest_records_wait(small_disk):
    disk, fill = small_disk
    said = []
    file = Appender(disk / "a.jsonl", said.append, most=1000)
    fill(0)
    for number in range(30):
        file.add(b"%099d\n" % number)
    (disk / "filling").unlink()
    file.close()
    assert [int(line) for line in (disk / "a.jsonl").read_text().split()] == list(range(20, 30))
    assert "20 records" in said[-1]


def test_weights_and_biases_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb=mine needs the package wandb"):
        require_wandb("mine")
    require_wandb("")
    calls = []

    class Run:
        log = staticmethod(lambda values, step: calls.append((step, values)))
        finish = staticmethod(lambda: calls.append("finished"))

    def init(**settings):
        calls.append(settings)
        return Run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    metrics = Metrics(tmp_path, 0, "mine", {"train": {"lr": 1}})
    metrics.step(1, {"train/loss": 2.0})
    metrics.close()
    settings, logged, finished = calls
    Metrics(tmp_path, 1, "mine").close()
    assert calls[3]["id"] == settings["id"]
    assert (settings["project"], settings["config"], settings["resume"]) == ("mine", {"train": {"lr": 1}}, "allow")
    assert (logged, finished) == ((1, {"train/loss": 2.0}), "finished")

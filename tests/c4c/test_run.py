"""The run folder: what is moved aside, what is written, what a resumed run forgets."""

import contextlib
import json
import os
import subprocess
import sys
import types

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c4c.files import replace_text
from c4c.run import (
    Metrics,
    RunConfig,
    check_continuation,
    last_validation,
    prepare,
    read_config,
    require_wandb,
    save_description,
    validations,
)

RESULT = {"t2v": {"R1": 10.0, "MdR": 3.0}, "v2t": {"R1": 20.0, "MdR": 4.0}, "n_texts": 5, "n_videos": 4}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_earlier_run_is_moved_aside(tmp_path):
    run = tmp_path / "runs" / "a"
    assert prepare(run, "never") is None
    assert run.is_dir()
    assert prepare(run, "never") is None  # an empty folder is no run
    for number in (1, 2):
        (run / "config.yaml").write_text(str(number))
        assert prepare(run, "never") == tmp_path / "runs" / f"a.old{number}"
        assert list(run.iterdir()) == []
    assert [(tmp_path / "runs" / f"a.old{n}" / "config.yaml").read_text() for n in (1, 2)] == ["1", "2"]


def test_checkpoints_alone_are_moved_aside_too(tmp_path):
    run = tmp_path / "a"
    (run / "checkpoints" / "step00000005").mkdir(parents=True)
    assert prepare(run, "never") == tmp_path / "a.old1"
    assert (tmp_path / "a.old1" / "checkpoints" / "step00000005").is_dir()


def test_a_run_to_be_resumed_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert prepare(tmp_path, "auto") is None
    assert (tmp_path / "config.yaml").exists()


def test_the_description(tmp_path):
    save_description(tmp_path, "train:\n  lr: 0.5\n", {"embed_dim": 8})
    assert read_config(tmp_path) == {"train": {"lr": 0.5}}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"torch", "deepspeed", "open_clip_torch", "python", "machine"} <= versions.keys()
    assert versions["torch"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        read_config(tmp_path)
    for text in ("", "run: [", "- 1"):  # as a full disk may leave it
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml (is damaged|is not YAML: .*: the file is damaged)"):
            read_config(tmp_path)


def test_a_continuation_must_compute_the_same(tmp_path):
    config = {"run": {"dir": "a"}, "train": {"lr": 0.5, "max_steps": 0, "betas": [0.9, 0.999]}, "deepspeed": {}}
    save_description(tmp_path, yaml.safe_dump(config), {})
    check_continuation(tmp_path, config)
    buckets = {"zero_optimization": {"reduce_bucket_size": 5}}
    harmless = {"run": {"dir": "b"}, "train": config["train"] | {"eval_every": 5}, "deepspeed": buckets}
    check_continuation(tmp_path, harmless)
    for more in ({"train": config["train"] | {"max_steps": 5}}, {"deepspeed": {"optimizer": {"type": "Lion"}}}):
        with pytest.raises(ValueError, match="made with other settings"):
            check_continuation(tmp_path, config | more)
    newer = config | {"train": config["train"] | {"new_key": 1}}
    check_continuation(tmp_path, newer, {"train": {"new_key": 1}})  # it was the default before there was a key for it
    with pytest.raises(ValueError, match=r"train\.new_key was 2, is 1"):
        check_continuation(tmp_path, newer, {"train": {"new_key": 2}})
    other = {"run": {"dir": "a"}, "train": {"lr": 0.6, "max_steps": 0, "betas": [0.9, 0.99]}, "model": {"head": "b"}}
    with pytest.raises(ValueError, match=r"run\.resume=auto") as caught:
        check_continuation(tmp_path, other)
    for change in (
        "train.lr was 0.5, is 0.6",
        "train.betas was [0.9, 0.999], is [0.9, 0.99]",
        "model.head was None, is b",
    ):
        assert change in str(caught.value)
    assert "run.dir was" not in str(caught.value)


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


# ---- full disks, torn lines ----


@pytest.fixture
def small_disk(tmp_path):
    """fill(left): a folder on a disk of 1 MB, of which `left` bytes stay free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")

    def fill(left: int) -> None:
        free = os.statvfs(disk)
        (disk / "filling").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))

    yield disk, fill
    subprocess.run(["umount", disk], check=True)


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


def test_a_full_disk_leaves_the_description_as_it_was(small_disk):
    disk, fill = small_disk
    save_description(disk, "run: {dir: a}\n", {})
    before = {p.name: p.read_bytes() for p in disk.iterdir()}
    fill(0)
    with pytest.raises(OSError, match=r"config\.yaml could not be written and stays"):
        save_description(disk, "run: {dir: b}\n" * 500, {})
    assert {p.name: p.read_bytes() for p in disk.iterdir() if p.name != "filling"} == before


def test_what_cannot_be_renamed_is_not_left_beside(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("c4c.files.os.replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        replace_text({tmp_path / "a": "new"})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


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


@pytest.mark.parametrize(("key", "value"), [("resume", "yes"), ("dir", "")])
def test_what_makes_no_sense_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"run\.{key}"):
        RunConfig(**{key: value})


def test_another_seed_is_no_continuation(tmp_path):
    save_description(tmp_path, "run: {dir: a, seed: 1}", {})
    check_continuation(tmp_path, {"run": {"dir": "b", "seed": 1}})
    with pytest.raises(ValueError, match=r"run\.seed was 1, is 2"):
        check_continuation(tmp_path, {"run": {"dir": "a", "seed": 2}})


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.step(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "epoch": 0})
    metrics.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (
        lines(tmp_path / "metrics.jsonl")[0].items()
        >= {"train/loss": None, "train/grad_norm": None, "epoch": 0}.items()
    )


def test_weights_and_biases_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb=mine: the package is not installed"):
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

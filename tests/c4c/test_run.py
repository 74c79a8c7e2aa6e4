"""The run folder: what is moved aside, what is written, what a resumed run forgets."""

import json
import sys
import types

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c4c.run import Metrics, RunConfig, check_continuation, prepare, read_config, require_wandb, save_description

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
        with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
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

"""Which checkpoints there are, and reading them safely. Real ZeRO checkpoints are read in tests/launch."""

import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch

from c4c.models.clip4clip import build
from c4c.settings import CheckpointConfig, ModelConfig
from c4c.zero import checkpoint, patches, snapshot
from c4c.zero.checkpoint import CheckpointError, latest, load_weights, tags
from c4c.zero.snapshot import restore, save
from tests.c4c.zero.checkpoints import Engine, refused, run_of

FLAG = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def write(run: Path, files: dict, step: int = 3) -> Path:
    """A checkpoint of these files, and the pointer to it."""
    folder = run / "checkpoints" / checkpoint.tag_of(step)
    folder.mkdir(parents=True)
    for name, content in files.items():
        torch.save(content, folder / name)
    (folder.parent / "latest").write_text(folder.name)
    return folder


# ---- which there are ----


def test_saving_keeps_the_newest(tmp_path):
    engine = Engine()
    for step in (5, 10, 15, 100_000_000):
        save(engine, tmp_path, step, keep_last=2)
        assert latest(tmp_path) == checkpoint.tag_of(step)
    assert tags(tmp_path) == ["step00000015", "step100000000"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", *tags(tmp_path)]
    there = sorted(p.name for p in (tmp_path / "checkpoints" / "step00000015").iterdir())
    assert there == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_going_on_is_bit_for_bit(tmp_path):
    engine = Engine()
    engine.train(3)
    save(engine, tmp_path, 3)
    unbroken = engine.train(3)
    again = Engine()
    again.train(1)  # whatever it has seen before
    assert restore(again, tmp_path)["step"] == 3
    assert again.train(3) == unbroken  # its random numbers go on too


def test_a_killed_save_leaves_the_last_one(tmp_path, monkeypatch):
    engine, folder = Engine(), tmp_path / "checkpoints"
    save(engine, tmp_path, 5)
    whole = {p.name: p.read_bytes() for p in (folder / "step00000005").iterdir()}

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for moment in ("_sync", "point", "prune"):  # beside; before the pointer moves; before old ones go
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, moment, killed)
            tensors, state = snapshot.snapshot(engine, 6)
            with pytest.raises(Killed):
                checkpoint.write(tmp_path, 6, tensors, state)
                checkpoint.prune(tmp_path, CheckpointConfig())
        assert latest(tmp_path) == ("step00000006" if moment == "prune" else "step00000005")
        assert restore(Engine(), tmp_path)["step"] in (5, 6)
    assert {p.name: p.read_bytes() for p in (folder / "step00000005").iterdir()} == whole
    save(engine, tmp_path, 7)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step00000007"]


def test_a_full_disk_keeps_the_last_one_and_is_told(tmp_path, monkeypatch):
    engine, said = Engine(), []
    saver = snapshot.Saver(tmp_path, CheckpointConfig(), said.append)
    saver.save(engine, 5)
    saver.wait()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_sync", full)
        saver.save(engine, 6)
        saver.wait()
        with pytest.raises(CheckpointError, match="No space left"):
            save(engine, tmp_path, 7)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step00000005"]
        shutil.rmtree(tmp_path / "checkpoints" / "step00000005")
        saver.save(engine, 7)
        saver.wait()
    text, deleted = said
    assert "the checkpoint after step 6 could not be written" in text
    assert "the last good one is step00000005" in text
    assert "the checkpoint after step 7 could not be written" in deleted and "there is none. Make room" in deleted
    assert saver.error
    saver.save(engine, 8)
    saver.wait()
    assert saver.error is None
    assert latest(tmp_path) == "step00000008"


def test_the_state_is_copied_before_training_goes_on(tmp_path, monkeypatch):
    engine, go = Engine(), threading.Event()
    before = engine.module.weight.detach().clone()
    write_now = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (go.wait(10), write_now(*args)))
    saver = snapshot.Saver(tmp_path, CheckpointConfig())
    saver.save(engine, 5)
    engine.train(1)
    go.set()
    saver.wait()
    again = Engine()
    restore(again, tmp_path)
    assert torch.equal(again.module.weight, before)
    assert not torch.equal(engine.module.weight, before)


def test_the_best_is_kept(tmp_path):
    engine = Engine()
    saver = snapshot.Saver(tmp_path, CheckpointConfig(keep_last=1, keep_best=2))
    for step, r1 in enumerate((10, 50, 20, 40, 30, 30), 1):
        saver.save(engine, step)
        saver.wait()
        with open(tmp_path / "eval.jsonl", "a") as file:
            name = "val/t2v_R1" if step < 3 else "val/t2v_R1_pct"  # a run that began before names had units
            file.write(json.dumps({"step": step, name: r1}) + "\n")
    assert tags(tmp_path) == ["step00000002", "step00000004", "step00000006"]
    assert checkpoint.best(tmp_path) == "step00000002"


def test_the_best_is_one_that_was_validated_or_there_is_none(tmp_path):
    run_of(tmp_path, 5, 10, 15)
    assert checkpoint.resolve(tmp_path, None) == "step00000015"
    line = refused(checkpoint.resolve, tmp_path, "best")
    assert line == (
        f"no checkpoint that {tmp_path} keeps was validated, so that none is the best: leave the tag away, which takes the latest, "
        "or name one of step00000005, step00000010, step00000015"
    )
    with open(tmp_path / "eval.jsonl", "w") as file:
        for step, r1 in ((3, 30.0), (5, 20.0), (10, 10.0)):
            file.write(json.dumps({"step": step, "val/t2v_R1_pct": r1}) + "\n")
    assert checkpoint.resolve(tmp_path, "best") == "step00000005"
    assert checkpoint.better_gone(tmp_path, "best") == (
        f"step00000005 is the best of the checkpoints that {tmp_path} keeps (R@1 20.0 in its validation); step00000003 was better "
        "(30.0) and is gone (checkpoint.keep_best)"
    )
    assert checkpoint.better_gone(tmp_path, None) == checkpoint.better_gone(tmp_path, "step00000010") == ""
    run_of(tmp_path, 3)
    assert checkpoint.better_gone(tmp_path, "best") == ""


def test_when_one_is_due(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: clock[0])
    by_steps = snapshot.Saver(Path(), CheckpointConfig(every_steps=3))
    assert [by_steps.due(step) for step in range(1, 7)] == [False, False, True, False, False, True]
    by_minutes = snapshot.Saver(Path(), CheckpointConfig(every_minutes=2))
    assert not by_minutes.due(1)
    clock[0] += 121
    assert by_minutes.due(2)
    assert not snapshot.Saver(Path(), CheckpointConfig()).due(1)


def test_a_half_written_later_checkpoint_displaces_none(tmp_path):
    (tmp_path / "checkpoints" / "step00000020").mkdir(parents=True)
    save(Engine(), tmp_path, 15, keep_last=1)
    assert latest(tmp_path) == "step00000015"


def test_only_rank_0_writes(tmp_path):
    save(Engine(), tmp_path, 5, keep_last=1)
    save(Engine(rank=1), tmp_path, 10, keep_last=1)
    assert tags(tmp_path) == ["step00000005"]
    assert latest(tmp_path) == "step00000005"


def test_at_least_one_is_kept():
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=0"):
        CheckpointConfig(keep_last=0)


def test_what_is_missing_is_named(tmp_path):
    assert refused(latest, tmp_path / "gone") == f"there is no run folder {tmp_path / 'gone'}"
    assert refused(load_weights, tmp_path / "gone") == f"there is no run folder {tmp_path / 'gone'}"
    assert "holds no checkpoint (no checkpoints/latest)" in refused(latest, tmp_path)
    save(Engine(), tmp_path, 5, keep_last=2)
    assert "has no checkpoint step7; it has step00000005" in refused(load_weights, tmp_path, "step7")
    (tmp_path / "checkpoints" / "step00000005" / "state.json").unlink()
    (tmp_path / "checkpoints" / "latest").unlink()
    assert "state.json is missing. Choose another run.dir" in refused(latest, tmp_path)


# ---- reading ----


def test_weights_of_a_stage_0_checkpoint(tmp_path):
    model = build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 12)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["model.clip.logit_scale"] = state["model.clip.logit_scale"].reshape(1)  # as c4c.training.step.Learner has it
    write(tmp_path, {"mp_rank_00_model_states.pt": {"module": state}})
    loaded = load_weights(tmp_path)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert load_weights(tmp_path, "step00000003").keys() == loaded.keys()
    (tmp_path / "config.yaml").write_text(
        "{model: {backbone: ViT-demo-16, head: meanP, linear_patch: 2d}, data: {num_frames: 12}}"
    )
    again = build(ModelConfig(backbone="ViT-demo-16", init_from=str(tmp_path)), 12)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    "names",
    [["mp_rank_00_model_states.pt"], ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"],
     ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"]],
    ids=["stage 0", "stages 1 and 2", "stage 3"],
)  # fmt: skip
def test_no_code_in_a_checkpoint_runs(names, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    ran = tmp_path / "ran"
    folder = write(tmp_path, {name: {"module": Bomb(ran), "optimizer_state_dict": Bomb(ran)} for name in names})
    assert f"{folder} cannot be read (UnpicklingError" in refused(load_weights, tmp_path)
    assert not ran.exists()
    torch.load(folder / names[0], weights_only=False)  # the bomb is a live one
    assert ran.exists()


def test_no_code_runs_when_a_run_is_resumed(tmp_path):
    folder = write(tmp_path, {name: Bomb(tmp_path / "ran") for name in ("model.safetensors", "optimizer.safetensors")})
    (folder / "state.json").write_text('{"step": 3, "updates": 3, "loss_scaler": {}}')
    assert f"{folder} is damaged: model.safetensors: " in refused(restore, Engine(), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_runs_neither(tmp_path):
    folder = write(tmp_path, {})
    (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"module": Bomb(tmp_path / "ran")}))
    refused(load_weights, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = write(tmp_path, {"mp_rank_00_model_states.pt": {"module": {"model.a": torch.ones(1000)}}})
    file = folder / "mp_rank_00_model_states.pt"
    assert "KeyError: 'clip.logit_scale'" in refused(load_weights, tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    message = refused(load_weights, tmp_path)
    assert message.startswith(f"{folder} cannot be read (")
    assert message.endswith("the run has step00000003")
    file.unlink()
    assert "state.json is missing" in refused(load_weights, tmp_path)


@pytest.mark.parametrize("before", [None, "0"])
def test_safe_loading_leaves_the_environment_as_it_was(before, monkeypatch):
    monkeypatch.delenv(FLAG, raising=False)
    if before is not None:
        monkeypatch.setenv(FLAG, before)
    with patches.safe_loading():
        assert os.environ[FLAG] == "1"
    assert os.environ.get(FLAG) == before

"""Which checkpoints there are, and reading them safely. Real ZeRO checkpoints are read in tests/launch."""

import errno
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from c4c.models.clip4clip import build
from c4c.settings import CheckpointConfig, ModelConfig
from c4c.zero import checkpoint, patches, snapshot
from c4c.zero.checkpoint import CheckpointError, latest, load_weights, tags
from c4c.zero.snapshot import restore, save

FLAG = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Engine:
    """As DeepSpeed's without ZeRO: a module and its optimizer."""

    world_size = 1

    def __init__(self, rank: int = 0):
        torch.manual_seed(0)
        self.global_rank, self.module = rank, torch.nn.Linear(3, 2)
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def zero_optimization_stage(self) -> int:
        return 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.module(torch.randn(4, 3)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def refused(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    (text,) = said
    assert "the checkpoint after step 6 could not be written" in text
    assert "the last good one is step00000005" in text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step00000005"]
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


# ---- damage ----


def run_of(path: Path, *steps: int) -> list[dict]:
    """Checkpoints after these steps; the weights and moments of each."""
    engine, states = Engine(), []
    for step in steps:
        engine.train(2)
        save(engine, path, step, keep_last=len(steps))
        states.append({k: v.clone() for k, v in engine.module.state_dict().items()})
    return states


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_pointer_that_is_gone_or_wrong_costs_nothing(tmp_path):
    *_, last = run_of(tmp_path, 5, 10, 15)
    pointer = tmp_path / "checkpoints" / "latest"
    for text, said in ((None, "is missing"), ("", "names nothing, which does not exist"),
                       ("step00000006", "names step00000006, which does not exist"), ("../checkpoints", "does not exist")):  # fmt: skip
        pointer.unlink() if text is None else pointer.write_text(text)
        assert checkpoint.exist(tmp_path)
        tag, (note,) = checkpoint.newest_whole(tmp_path)
        assert tag == latest(tmp_path) == "step00000015"
        assert f"{pointer} {said}" in note or said in note
        assert "continuing from step00000015, the newest intact checkpoint" in note
        assert all(torch.equal(v, last[k]) for k, v in load_weights(tmp_path).items())
        pointer.touch()


def test_every_file_has_a_checksum_and_any_flipped_bit_is_noticed(tmp_path):
    run_of(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step00000005"
    files = [p for p in folder.iterdir() if p.name != "state.json"]
    assert json.loads((folder / "state.json").read_text())["files"].keys() == {p.name for p in files}
    assert checkpoint.damage(folder) == ""
    for file in folder.iterdir():
        size = file.stat().st_size
        before = checkpoint.read_state(folder)
        for at in range(0, size, max(1, size // 40)):
            flip(file, at)
            found = checkpoint.damage(folder)
            if file.name == "state.json":  # white space is no part of what it says
                assert found or checkpoint.read_state(folder) == before
            else:
                assert found == f"{file.name} does not match its checksum in state.json"
            flip(file, at)
    assert checkpoint.damage(folder) == ""


def test_a_changed_number_in_the_state_is_noticed(tmp_path):
    run_of(tmp_path, 5)
    file = tmp_path / "checkpoints" / "step00000005" / "state.json"
    text = file.read_text()
    for old, new in (('"step": 5', '"step": 4'), ('"files"', '"filez"'), ('"crc32c": "', '"crc32d": "'), ('"ranks": 1', '"ranks": 3')):  # fmt: skip
        file.write_text(text.replace(old, new))
        assert "does not match its checksum" in checkpoint.damage(file.parent), (old, new)


DAMAGES = {
    "one bit of the weights": (lambda f: flip(f / "model.safetensors", -3), "model.safetensors does not match its checksum"),
    "one bit of the moments": (lambda f: flip(f / "optimizer.safetensors", -3), "optimizer.safetensors does not match"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]), "were written"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors has 0 bytes; "),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "an empty state": (lambda f: (f / "state.json").write_text(""), "state.json cannot be read"),
    "another state": (lambda f: (f / "state.json").write_text("[1]"), "state.json cannot be read"),
    "half a state": (lambda f: (f / "state.json").write_bytes((f / "state.json").read_bytes()[:40]), "state.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(name, tmp_path):
    do, said = DAMAGES[name]
    first, _ = run_of(tmp_path, 5, 10)
    folder = tmp_path / "checkpoints" / "step00000010"
    do(folder)
    tag, (note,) = checkpoint.newest_whole(tmp_path)
    assert tag == "step00000005"
    assert note.startswith(f"warning: {folder} is damaged: ")
    assert said in note
    assert note.endswith("; continuing from step00000005, the newest intact checkpoint")
    assert said in (message := refused(restore, Engine(), tmp_path))
    assert message.endswith("step00000005 is intact: use --tag step00000005")
    if "moments" not in name:
        assert said in refused(load_weights, tmp_path)
    engine = Engine()
    restore(engine, tmp_path, tag)
    assert all(torch.equal(v, first[k]) for k, v in engine.module.state_dict().items())
    do(folder.with_name("step00000005"))
    assert "has no intact checkpoint to continue from: " in refused(checkpoint.newest_whole, tmp_path)


def test_a_checkpoint_from_before_there_were_checksums(tmp_path):
    _, last = run_of(tmp_path, 5, 10)
    for step in (5, 10):
        file = tmp_path / "checkpoints" / checkpoint.tag_of(step) / "state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("files", "crc32c")}))
    assert checkpoint.newest_whole(tmp_path) == ("step00000010", [])
    engine = Engine()
    assert restore(engine, tmp_path)["step"] == 10
    assert all(torch.equal(v, last[k]) for k, v in engine.module.state_dict().items())
    DAMAGES["truncated"][0](tmp_path / "checkpoints" / "step00000010")
    assert checkpoint.newest_whole(tmp_path)[0] == "step00000005"


def test_the_same_step_again_replaces_the_old_one(tmp_path):
    run_of(tmp_path, 5)
    engine = Engine()
    engine.train(7)
    save(engine, tmp_path, 5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step00000005"]
    assert torch.equal(load_weights(tmp_path)["weight"], engine.module.weight)


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

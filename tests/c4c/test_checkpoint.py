"""Which checkpoints there are, and reading them safely. Real ZeRO checkpoints are read in tests/launch."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from c4c import checkpoint
from c4c.checkpoint import CheckpointConfig, CheckpointError, latest, load_weights, restore, save, tags
from c4c.model import ModelConfig, build

FLAG = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Engine:
    """Writes and reads one file, as DeepSpeed's engine does."""

    def __init__(self, rank: int = 0):
        self.global_rank = rank
        self.pointed_at: list[str | None] = []

    def save_checkpoint(self, folder: str, tag: str, client_state: dict, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        torch.save(client_state, Path(folder) / tag / "mp_rank_00_model_states.pt")
        pointer = Path(folder) / "latest"
        self.pointed_at.append(pointer.read_text() if pointer.exists() else None)
        assert not save_latest

    def load_checkpoint(self, folder: str, tag: str):
        path = Path(folder) / tag / "mp_rank_00_model_states.pt"
        return str(path), torch.load(path, weights_only=False)


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


def test_saving_keeps_the_newest_and_points_at_it_last(tmp_path):
    engine = Engine()
    for step in (5, 10, 15, 100_000_000):
        save(engine, tmp_path, step, keep_last=2)
        assert latest(tmp_path) == checkpoint.tag_of(step)
    assert tags(tmp_path) == ["step00000015", "step100000000"]
    # the engine's own files were all there before the pointer moved
    assert engine.pointed_at == [None, "step00000005", "step00000010", "step00000015"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", *tags(tmp_path)]


def test_a_half_written_later_checkpoint_displaces_none(tmp_path):
    (tmp_path / "checkpoints" / "step00000020").mkdir(parents=True)
    save(Engine(), tmp_path, 15, keep_last=1)
    assert latest(tmp_path) == "step00000015"


def test_only_rank_0_deletes_and_points(tmp_path):
    save(Engine(), tmp_path, 5, keep_last=1)
    save(Engine(rank=1), tmp_path, 10, keep_last=1)
    assert tags(tmp_path) == ["step00000005", "step00000010"]
    assert latest(tmp_path) == "step00000005"


def test_at_least_one_is_kept():
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=0"):
        CheckpointConfig(keep_last=0)


def test_what_is_missing_is_named(tmp_path):
    assert refused(latest, tmp_path / "gone") == f"there is no run folder {tmp_path / 'gone'}"
    assert refused(load_weights, tmp_path / "gone") == f"there is no run folder {tmp_path / 'gone'}"
    assert "holds no checkpoint (no checkpoints/latest)" in refused(latest, tmp_path)
    save(Engine(), tmp_path, 5, keep_last=2)
    for text, said in (("step00000006", "step00000006"), ("", "nothing"), ("../checkpoints", "../checkpoints")):
        (tmp_path / "checkpoints" / "latest").write_text(text)
        assert f"names {said}, which is not there; there are step00000005" in refused(latest, tmp_path)
    assert "has no checkpoint step7; there are step00000005" in refused(load_weights, tmp_path, "step7")


# ---- reading ----


def test_weights_of_a_stage_0_checkpoint(tmp_path):
    model = build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 12)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["model.clip.logit_scale"] = state["model.clip.logit_scale"].reshape(1)  # as c4c.engine.Learner has it
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


def test_restoring_returns_the_steps_done(tmp_path):
    save(Engine(), tmp_path, 5, keep_last=2)
    save(Engine(), tmp_path, 10, keep_last=2)
    assert restore(Engine(), tmp_path) == 10


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
    write(tmp_path, {"mp_rank_00_model_states.pt": Bomb(tmp_path / "ran")})
    assert "cannot be read (UnpicklingError" in refused(restore, Engine(), tmp_path)
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
    assert f"{folder} cannot be read (" in refused(restore, Engine(), tmp_path)
    file.unlink()
    assert "FileNotFoundError" in refused(load_weights, tmp_path)


@pytest.mark.parametrize("before", [None, "0"])
def test_safe_loading_leaves_the_environment_as_it_was(before, monkeypatch):
    monkeypatch.delenv(FLAG, raising=False)
    if before is not None:
        monkeypatch.setenv(FLAG, before)
    with checkpoint.safe_loading():
        assert os.environ[FLAG] == "1"
    assert os.environ.get(FLAG) == before

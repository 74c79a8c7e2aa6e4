"""Checkpoints without the weights that stayed frozen: read again from where they came from, and only if they are still the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from c4c.models import origin
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.export import openclip
from c4c.settings import ModelConfig
from c4c.training.param_groups import choose_trained
from c4c.zero import checkpoint
from c4c.zero.checkpoint import FROZEN, MODEL
from tests.c4c.models.partial_runs import config_of, trained, write_weights
from tests.c4c.models.small import scores

pytestmark = pytest.mark.slow  # imports open_clip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file of weights, as c4c.export writes one."""
    return write_weights(tmp_path / "base.safetensors", 0)


def refused(run: Path) -> str:
    with pytest.raises(ValueError, match="frozen weights") as caught:
        CLIP4Clip.from_checkpoint(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "size"),
    [({"lora": 4, "lora_on": "all"}, 64), ({"freeze": "text"}, 64), ({"freeze": ("text", "video.blocks.0-1")}, 64),
     ({"lora": 4}, 96)],
    ids=["LoRA", "text", "blocks", "LoRA, larger pictures"],
)  # fmt: skip
def test_a_run_scores_as_the_model_did(train, size, tmp_path, base):
    model = trained(tmp_path / "run", config_of(base, size, **train))
    again = CLIP4Clip.from_checkpoint(tmp_path / "run")
    assert again.state_dict().keys() == {name for name in model.state_dict() if "lora" not in name}  # a plain model
    torch.testing.assert_close(scores(again), scores(model), rtol=0, atol=1e-4)
    with safe_open(tmp_path / "run" / "checkpoints" / "step00000001" / MODEL, "pt") as file:
        names = set(file.keys())
    assert (
        "clip.token_embedding.weight" not in names and "clip.transformer.resblocks.0.attn.in_proj_weight" not in names
    )
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.visual.positional_embedding"} <= names


def test_what_is_stored_whole(tmp_path, base):
    model = build(config_of(base).model, 4)
    for config in (config_of("scratch", lora=4), config_of(base, freeze_layers=1), config_of(base)):
        choose_trained(model, replace(config.train, lora=0))
        assert not origin.left_out(model, config)


def test_a_source_that_is_gone_is_named(tmp_path, base):
    run = tmp_path / "run"
    model = trained(run, config_of(base, lora=4))
    base.rename(tmp_path / "moved.safetensors")
    said = refused(run)
    assert said.startswith(
        f"{run} holds only what was trained; its frozen weights come from model.init_from={base}, which cannot be read"
    )
    assert said.endswith(f"Put it back, or set model.init_from in {run / 'config.yaml'} to where it is now")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace(str(base), str(tmp_path / "moved.safetensors")))
    torch.testing.assert_close(scores(CLIP4Clip.from_checkpoint(run)), scores(model), rtol=0, atol=1e-4)


def test_a_source_that_has_changed_is_refused(tmp_path, base):
    trained(tmp_path / "run", config_of(base, lora=4))
    state = load_file(base)
    with safe_open(base, "pt") as file:
        metadata = file.metadata()
    state["clip.ln_final.weight"][3] += 1e-6
    save_file(state, base, metadata=metadata)
    said = refused(tmp_path / "run")
    assert f"model.init_from={base} gives other frozen weights than the run was trained with (digest " in said


def test_a_relative_path_is_found_from_elsewhere(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(tmp_path / "run", config_of("base.safetensors", freeze="text"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(scores(CLIP4Clip.from_checkpoint(tmp_path / "run")), scores(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", ["init_from", "backbone"])
def test_a_relative_folder_is_found_from_elsewhere(key, tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    openclip.write(build(config_of(base).model, 4), None, tmp_path / "folder")
    config = config_of("local-dir:folder", freeze="text")
    if key == "backbone":
        config = replace(config, model=ModelConfig(backbone="local-dir:folder"))
    model = trained(tmp_path / "run", config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(scores(CLIP4Clip.from_checkpoint(tmp_path / "run")), scores(model), rtol=0, atol=1e-4)
    about = checkpoint.newest_state(tmp_path / "run")[FROZEN]
    same = origin.same_source(config.model, about)
    assert getattr(same, key) == f"local-dir:{tmp_path / 'folder'}"
    again = origin.describe(model, origin.left_out(model, config), same, about)
    assert again == about  # so that after a resume from there config.yaml, which is relative, still names this source
    assert origin.same_source(same, about) == same


def test_checkpoints_that_are_each_others_source_are_refused(tmp_path, base):
    first, second = tmp_path / "first", tmp_path / "second"
    trained(first, config_of(base, lora=4))
    trained(second, config_of(first, freeze="text"))
    trained(tmp_path / "again", config_of(second, freeze="text"))
    first.rename(tmp_path / "first.old1")
    (tmp_path / "again").rename(first)
    said = refused(second)
    assert (
        f"{second}, checkpoint step00000001, would be the source of its own frozen weights" in said and len(said) < 1500
    )
    file = second / "config.yaml"
    file.write_text(file.read_text().replace(str(first), str(tmp_path / "first.old1")))
    CLIP4Clip.from_checkpoint(second)


def test_a_run_that_started_from_a_run(tmp_path, base):
    """Which is itself not whole, and has gone on since: its checkpoint from then counts."""
    first, second = tmp_path / "first", tmp_path / "second"
    trained(first, config_of(base, lora=4))
    model = trained(second, config_of(first, freeze="text"))
    trained(first, config_of(base, lora=4), step=2)
    before = torch.get_rng_state()
    torch.testing.assert_close(scores(CLIP4Clip.from_checkpoint(second)), scores(model), rtol=0, atol=1e-4)
    config = config_of(first).model
    same = origin.same_source(config, checkpoint.newest_state(second)[FROZEN])
    assert (same.init_from, same.init_tag) == (str(first), "step00000001")
    torch.set_rng_state(before)


def test_the_digest_is_of_names_shapes_and_values():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor(3)}
    digests = [origin.digest(state, "abc"), origin.digest(state, "ab"), origin.digest(state | {"a": state["a"].view(3, 2)}, "abc"),
               origin.digest(state | {"a": state["a"] + 1e-6}, "abc")]  # fmt: skip
    assert len(set(digests)) == 4
    assert digests[0] == origin.digest({k: v.double() for k, v in state.items()}, "cba")

"""Averages of checkpoints are those of float64, of whole models; what does not fit together is refused before anything is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from c4c import average as command
from c4c.config import dump
from c4c.models.averaging import CheckpointChoice, average
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.training.run_folder import save_description
from c4c.zero import checkpoint
from c4c.zero.checkpoint import EMA, MODEL, OPTIMIZER
from tests.c4c.models.partial_runs import config_of, trained, write_weights
from tests.c4c.models.small import scores

pytestmark = pytest.mark.slow  # imports open_clip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "base.safetensors", 0)


def direct(models: list[CLIP4Clip], shares: list[float]) -> dict[str, torch.Tensor]:
    """Of models that are in memory, in float64."""
    states = [model.state_dict() for model in models]
    return {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True)).float()
        for name in states[0]
    }


def assert_same(model: CLIP4Clip, expected: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=1e-9, msg=name)  # half a bit of fp32


def of(*runs: Path, **how) -> CheckpointChoice:
    return CheckpointChoice(tuple(map(str, runs)), **how)


def said_of(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WAYS = pytest.mark.parametrize(
    "train",
    [{}, {"lora": 4, "lora_on": "all", "lora_alpha": 8.0}, {"freeze": "text"}],
    ids=["full", "LoRA", "text frozen"],
)


@WAYS
@pytest.mark.parametrize("target", ["average", "average.safetensors"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0]])
def test_it_is_the_average_of_whole_models(train, target, weights, tmp_path, base):
    run, tags = tmp_path / "run", ("step00000001", "step00000002", "step00000003")
    for step in (1, 2, 3):
        trained(run, config_of(base, **train), step)
    lines = average(of(run, tags=tags), weights, tmp_path / target)
    shares = [0.25, 0.75, 0.0] if weights else [1 / 3] * 3
    expected = direct([CLIP4Clip.from_checkpoint(run, tag=tag) for tag in tags], shares)
    base.unlink()  # the result needs nothing else
    model, data = open_checkpoint(str(tmp_path / target))
    assert_same(model, expected)
    assert (data.num_frames, data.image_size) == (4, 64)
    assert (
        lines[0]
        == f"{tmp_path / target}: the average of 3 checkpoints, {sum(t.numel() for t in expected.values()) / 1e6:.1f} M weights"
    )
    assert lines[1:] == [f"  {share:.3f}  {run}/checkpoints/{tag}" for share, tag in zip(shares, tags, strict=True)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_average_of_one_model_twice_is_that_model(tmp_path, base):
    model = trained(tmp_path / "a", config_of(base), 1)
    trained(tmp_path / "b", config_of(base), 1)
    average(of(tmp_path / "a", tmp_path / "b"), [0.3, 0.4], tmp_path / "out")
    again = CLIP4Clip.from_checkpoint(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(scores(again), scores(model))


def test_several_runs(tmp_path, base):
    """Each with its own frozen weights."""
    other = write_weights(tmp_path / "other.safetensors", 1)
    models = []
    for name, source in (("a", base), ("b", other)):
        for step in (1, 2):
            trained(tmp_path / name, config_of(source, lora=4), step)
        models += [CLIP4Clip.from_checkpoint(tmp_path / name, tag=f"step0000000{step}") for step in (1, 2)]
    average(of(tmp_path / "a", tmp_path / "b"), None, tmp_path / "latest")
    assert_same(CLIP4Clip.from_checkpoint(tmp_path / "latest"), direct([models[1], models[3]], [0.5, 0.5]))
    average(of(tmp_path / "a", tmp_path / "b", last=2), [1, 2, 3, 4], tmp_path / "all")
    assert_same(CLIP4Clip.from_checkpoint(tmp_path / "all"), direct(models, [0.1, 0.2, 0.3, 0.4]))
    one = tmp_path / "a" / "checkpoints" / "step00000001" / MODEL
    average(of(one, tmp_path / "b"), None, tmp_path / "file")
    assert_same(CLIP4Clip.from_checkpoint(tmp_path / "file"), direct([models[0], models[3]], [0.5, 0.5]))
    about = checkpoint.read_state(tmp_path / "file" / "checkpoints" / "step00000002")["average"]
    assert [(Path(row["run"]).name, row["tag"], row["share"]) for row in about] == [
        ("a", "step00000001", 0.5),
        ("b", "step00000002", 0.5),
    ]


def test_averaged_weights_are_taken_unless_not_wanted(tmp_path, base):
    run, config = tmp_path / "run", config_of(base)
    for step in (1, 2):
        model = trained(run, config, step)
        state, moved = model.state_dict(), {name: tensor + 1 for name, tensor in model.state_dict().items()}
        about = {"step": step, "updates": step, "loss_scaler": {}}
        checkpoint.write(run, step, {MODEL: state, OPTIMIZER: {"random.0.cpu": torch.zeros(1)}, EMA: moved}, about)
    last = [load_file(run / "checkpoints" / f"step0000000{step}" / MODEL) for step in (1, 2)]
    for averaged in (True, False):
        lines = average(of(run, last=2, ema=averaged), None, tmp_path / str(averaged))
        kind = "averaged weights" if averaged else "last weights (not averaged)"
        assert all(line.endswith(f", {kind}") for line in lines[1:])
        found = CLIP4Clip.from_checkpoint(tmp_path / str(averaged)).clip.visual.proj
        torch.testing.assert_close(found, (last[0]["clip.visual.proj"] + last[1]["clip.visual.proj"]) / 2 + averaged)


def test_its_run_folder_starts_a_run_and_says_what_differs(tmp_path, base):
    trained(tmp_path / "a", config_of(base, freeze="text"), 1)
    other = config_of(base, freeze="text")
    trained(tmp_path / "b", replace(other, data=replace(other.data, sampling="head")), 1)
    lines = average(of(tmp_path / "a", tmp_path / "b"), None, tmp_path / "out")
    assert (
        lines[-1]
        == f"note: in {tmp_path / 'b'}, data.sampling is head; the average keeps the settings of {tmp_path / 'a'}"
    )
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (
        config["train"]["freeze"] == []
        and config["checkpoint"]["whole"]
        and config["run"]["dir"] == str(tmp_path / "out")
    )
    again = trained(tmp_path / "next", config_of(tmp_path / "out", lora=4), 1)  # its frozen weights are the average
    torch.testing.assert_close(scores(CLIP4Clip.from_checkpoint(tmp_path / "next")), scores(again), rtol=0, atol=1e-4)


# ---- what is refused ----


@pytest.fixture
def pair(tmp_path, base) -> tuple[Path, Path]:
    trained(tmp_path / "a", config_of(base), 1)
    trained(tmp_path / "b", config_of(base), 2)
    return tmp_path / "a", tmp_path / "b"


def refused(runs: tuple[Path, ...], weights: list[float] | None = None, **how) -> str:
    out = runs[0].parent / "out"
    said = said_of(average, of(*runs, **how), weights, out)
    assert not out.exists() and not list(out.parent.glob(".*"))
    return said


def described(run: Path, **changes) -> None:
    """Give a run another model.*."""
    config = config_of("scratch")
    save_description(
        run,
        dump(replace(config, model=replace(config.model, **changes))),
        json.loads((run / "towers.json").read_text()),
    )


def test_other_heads_and_towers(pair):
    described(pair[1], head="seqTransf")
    assert (
        f"{pair[0]}/checkpoints/step00000001 and {pair[1]}/checkpoints/step00000002 have other heads: model.head is meanP and seqTransf"
        in refused(pair)
    )
    described(pair[1], linear_patch="3d")
    assert "model.linear_patch is 2d and 3d" in refused(pair)
    towers = json.loads((pair[1] / "towers.json").read_text())
    (pair[1] / "towers.json").write_text(json.dumps(towers | {"quick_gelu": not towers["quick_gelu"]}))
    assert "have other towers (quick_gelu differ)" in refused(pair)


def test_loras_of_different_rank(tmp_path, base):
    for name, rank in (("a", 4), ("b", 8), ("c", 0)):
        trained(tmp_path / name, config_of(base, lora=rank), 1)
    assert "train.lora=4 and 8. Average checkpoints with LoRA of one rank" in refused((tmp_path / "a", tmp_path / "b"))
    assert "train.lora=4 and 0" in refused((tmp_path / "a", tmp_path / "c"))


def rewritten(run: Path, step: int, change) -> None:
    state = load_file(run / "checkpoints" / f"step{step:08d}" / MODEL)
    change(state)
    checkpoint.write(run, step, {MODEL: state}, {"step": step, "updates": step, "loss_scaler": {}})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number, pair):
    rewritten(pair[1], 2, lambda state: state["clip.ln_final.bias"].view(-1)[1:2].fill_(number))
    said = refused(pair)
    assert (
        said
        == f"{pair[1]}/checkpoints/step00000002: clip.ln_final.bias holds numbers that are not finite: leave that checkpoint out"
    )


def test_weights_of_other_names_or_shapes(pair):
    rewritten(pair[1], 2, lambda state: state.update({"clip.logit_bias": torch.zeros(())}))
    assert "hold different weights: clip.logit_bias is in one of them only" in refused(pair)
    rewritten(
        pair[1], 2, lambda state: (state.pop("clip.logit_bias"), state.update({"clip.ln_final.bias": torch.zeros(3)}))
    )
    assert "clip.ln_final.bias has the shapes [64] and [3]" in refused(pair)


def test_checkpoints_that_are_not_there(pair, tmp_path):
    assert f"{pair[0]} has no checkpoint step00000007; it has step00000001" in refused(pair, tags=("step00000007",))
    assert f"--last 2: {pair[0]} has 1 checkpoints: step00000001" in refused(pair, last=2)
    assert f"{pair[0]}/checkpoints/step00000001 alone has no average" in refused(pair[:1])
    assert "step00000001, is named twice" in refused((pair[0], pair[0]))
    assert "--weights has 3 numbers for 2 checkpoints" in refused(pair, [1, 2, 3])
    assert "is not a run folder: it has no config.yaml" in refused((pair[0], tmp_path))
    trained(pair[0], config_of("scratch"), 3)
    checkpoint.point(pair[0], "step00000001")  # the later one is what a killed run left
    assert f"--last 2: {pair[0]} has 1 checkpoints: step00000001" in refused(pair, last=2)
    file = pair[1] / "checkpoints" / "step00000002" / MODEL
    save_file({"a": torch.zeros(1)}, file)
    assert "model.safetensors has" in refused(pair)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--weights", "0", "0", "--out", "new"], "--weights are all 0"),
     (["--weights", "1e308", "1e308", "--out", "new"], "too large"), (["--weights", "-1", "2", "--out", "new"], "--weights -1"),
     (["--weights", "nan", "2", "--out", "new"], "--weights nan"), (["--last", "0", "--out", "new"], "--last 0: must be at least 1"),
     (["--out", "full"], "is a folder with files in it"), (["--out", "full/a"], "cannot be written: it is no folder"),
     (["--out", "gone/new.safetensors"], "--out gone/new.safetensors: there is no folder gone")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_mistakes_on_the_command_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    monkeypatch.setattr("sys.argv", ["average", "runs/a", "runs/b", *words])
    assert command.main() == 1
    assert said in capsys.readouterr().err


def test_a_checkpoint_is_not_replaced(pair):
    file = pair[0] / "checkpoints" / "step00000001" / MODEL
    assert "lies in a run's checkpoint, which it would damage" in said_of(command.check_out, file)

"""A run with train.ema: what it says, stores, validates, and hands on to evaluation, export, index, resuming and averaging."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from c4c import average, export
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.encoder import Encoder
from c4c.retriever import Retriever
from tests.launch.evaluations import metrics_of, refused, validated
from tests.launch.kills import validations
from tests.launch.runs import STEPS_PER_EPOCH, lines, losses

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
TOTAL = 2 * STEPS_PER_EPOCH
WORDS = ["train.ema=0.7", "engine.zero_stage=2"]


@pytest.fixture(scope="module")
def trained(forks, launcher, shared) -> Path:
    """On two ranks, as the run "2 ranks, ZeRO 2" but for the average."""

    def make(folder: Path) -> None:
        code, out, err = forks.run(["launch/train.py", *launcher.words(f"run.dir={folder / 'run'}", *WORDS)], 2)
        assert code == 0, out + err
        (folder / "said").write_text(out + err)

    return shared("ema", make)


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained / "run"


@pytest.fixture
def stopped(run, tmp_path) -> Path:
    """As it was after the first epoch."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step00000010")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step00000005")
    (tmp_path / "run" / "done.json").unlink()
    return tmp_path / "run"


def files(run: Path, step: int = TOTAL) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"step{step:08d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema")}


def test_steps_and_last_weights_are_those_of_a_run_without(run, runs):
    assert losses(run) == losses(runs["2 ranks, ZeRO 2"])
    stored, plain = (
        files(run),
        load_file(runs["2 ranks, ZeRO 2"] / "checkpoints" / "step00000010" / "model.safetensors"),
    )
    assert all(torch.equal(stored["model"][name], tensor) for name, tensor in plain.items())
    assert stored["ema"].keys() == stored["model"].keys()  # all is trained
    assert all(
        stored["ema"][name].dtype == torch.float32 and stored["ema"][name].shape == plain[name].shape for name in plain
    )
    assert not torch.equal(stored["ema"]["clip.visual.proj"], plain["clip.visual.proj"])


def test_it_is_said(trained):
    said = (trained / "said").read_text()
    assert "validation takes the average of the trained weights (train.ema=0.7)" in said
    assert "validation after step 10, averaged weights: t2v R@1" in said
    assert [row["val/ema_decay"] for row in lines(trained / "run" / "eval.jsonl")] == [0.7, 0.7]


def test_evaluation_takes_the_average_as_validation_did(run, runs, evaluate, tmp_path):
    own = validated(run, TOTAL)
    code, out, _ = evaluate("--ckpt", run, "--json", tmp_path / "averaged.json")
    assert code == 0 and "step00000010, averaged weights" in out
    assert metrics_of(tmp_path / "averaged.json") == own
    assert json.loads((tmp_path / "averaged.json").read_text())["weights"] == "averaged weights"
    code, out, _ = evaluate("--ckpt", run, "--no-ema", "--json", tmp_path / "last.json")
    assert code == 0 and "step00000010, last weights (not averaged)" in out
    assert metrics_of(tmp_path / "last.json") == validated(runs["2 ranks, ZeRO 2"], TOTAL)
    assert metrics_of(tmp_path / "last.json") != metrics_of(tmp_path / "averaged.json")


@pytest.mark.parametrize(("file", "kind"), [("ema", "averaged weights"), ("model", "last weights (not averaged)")])
def test_a_file_of_a_checkpoint_is_what_it_holds(file, kind, run, evaluate):
    path = run / "checkpoints" / "step00000005" / f"{file}.safetensors"
    code, out, _ = evaluate("--ckpt", path)
    assert code == 0 and f"step00000005, {kind}" in out
    expected = files(run, 5)[file]["clip.visual.proj"]
    assert torch.equal(CLIP4Clip.from_checkpoint(path).clip.visual.proj, expected)


def test_contradictions_are_refused(run, evaluate, runs):
    ema = run / "checkpoints" / "step00000005" / "ema.safetensors"
    assert f"--no-ema, but {ema} holds averaged weights" in refused(evaluate("--ckpt", ema, "--no-ema"))
    code, out, _ = evaluate("--ckpt", runs["1 rank"], "--no-ema")  # it has only one kind
    assert code == 0 and "averaged" not in out


@pytest.mark.parametrize("averaged", [True, False])
def test_an_export_holds_the_same(averaged, run, tmp_path):
    _, about, _ = export.run(str(run), None, tmp_path / "m.safetensors", ema=averaged)
    assert about.endswith("averaged weights" if averaged else "last weights (not averaged)")
    exported, stored = load_file(tmp_path / "m.safetensors"), files(run)["ema" if averaged else "model"]
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_a_run_starts_from_the_average_or_not(run, forks, launcher, tmp_path):
    for word, name, kind in (
        ("", "ema", ", averaged weights"),
        ("model.init_ema=false", "model", ", last weights (not averaged)"),
    ):
        words = [
            f"run.dir={tmp_path / name}",
            f"model.init_from={run}",
            "train.max_steps=1",
            "train.lr=0",
            "train.eval_every=0",
            word,
        ]
        code, out, err = forks.run(["launch/train.py", *launcher.words(*filter(None, words))])
        assert code == 0, out + err
        assert f"weights: {run}/checkpoints/step00000010{kind}" in out + err
        (file,) = (tmp_path / name / "checkpoints").glob("step*/model.safetensors")
        expected = files(run)[name]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(file).items())


@pytest.mark.nightly
def test_going_on_is_bit_for_bit(stopped, run, forks, launcher):
    words = launcher.words(f"run.dir={stopped}", *WORDS, "run.resume=auto")
    code, out, err = forks.run(["launch/train.py", *words], 2)
    assert code == 0, out + err
    for name, tensors in files(run).items():
        assert all(torch.equal(files(stopped)[name][key], tensor) for key, tensor in tensors.items())
    assert validations(stopped) == validations(run)


@pytest.mark.nightly
def test_going_on_with_another_number_of_ranks_and_stage(stopped, run, forks, launcher):
    words = launcher.words(f"run.dir={stopped}", "train.ema=0.7", "engine.zero_stage=3", "run.resume=auto")
    code, out, err = forks.run(["launch/train.py", *words], 1)
    assert code == 0, out + err
    again, expected = files(stopped)["ema"], files(run)["ema"]
    for key, tensor in expected.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-3, atol=2e-4)


def test_zero_3_validates_the_average_and_trains_on_with_the_last_weights(run, forks, launcher, tmp_path):
    """On several ranks it keeps weights whole after a pass, which then are to change with their parts."""
    words = launcher.words(f"run.dir={tmp_path / 'run'}", "train.ema=0.7", "engine.zero_stage=3")
    code, out, err = forks.run(["launch/train.py", *words], 2)
    assert code == 0, out + err
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-4)
    assert validations(tmp_path / "run") == validations(run)


def test_another_decay_is_no_continuation(stopped, forks, launcher):
    for word, said in (("train.ema=0.9", "train.ema was 0.7, is 0.9"), ("train.ema=0", "train.ema was 0.7, is 0.0")):
        code, out, err = forks.run(
            ["launch/train.py", *launcher.words(f"run.dir={stopped}", "engine.zero_stage=2", word, "run.resume=auto")]
        )
        assert code == 1 and said in err, out + err


def test_checkpoints_are_averaged_and_evaluated_as_a_run(run, evaluate, monkeypatch, capsys, tmp_path, launcher, forks):
    out = tmp_path / "average"
    monkeypatch.setattr(sys, "argv", ["average", str(run), "--last", "2", "--weights", "1", "3", "--out", str(out)])
    assert average.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{out}: the average of 2 checkpoints, 7.7 M weights",
        f"  0.250  {run}/checkpoints/step00000005, averaged weights",
        f"  0.750  {run}/checkpoints/step00000010, averaged weights",
    ]
    first, second = files(run, 5)["ema"], files(run)["ema"]
    model, data = open_checkpoint(str(out))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (0.25 * first[name].double() + 0.75 * second[name].double()).float()), name
    assert data == open_checkpoint(str(run))[1]
    code, text, _ = evaluate("--ckpt", out)  # on the run's own data.test
    assert code == 0 and "step00000010, the average of 2 checkpoints" in text
    code, _, err = forks.run(["launch/train.py", *launcher.words(f"run.dir={out}", *WORDS, "run.resume=auto")])
    assert (
        code == 1
        and f"run.resume=auto: {out} is an average of checkpoints, without the state that a run goes on from" in err
    )


def test_an_index_remembers_which_weights_made_it(run, launcher, forks, tmp_path):
    index, words = (
        tmp_path / "last.index",
        ["--no-ema", "--segment", "0", "--runtime", "torch", "--device", launcher.device],
    )
    code, out, err = forks.run(
        ["c4c/index.py", "--ckpt", str(run), "--videos", str(launcher.test), "--out", str(index), *words]
    )
    assert code == 0, out + err
    assert f"checkpoint  {run}/checkpoints/step00000010, last weights (not averaged)" in out
    last, averaged = (Encoder.load(str(run), device="cpu", ema=ema).identity for ema in (False, True))
    assert last.digest != averaged.digest and (last.ema, averaged.ema) == (False, True)
    by_example = Retriever.load(index=index, device="cpu").searcher.full_encoder
    assert by_example.identity == last
    with pytest.raises(ValueError, match="is not the model that made"):
        Retriever.load(run, index, device="cpu", ema=True)

"""LoRA from another run's weights: its checkpoints hold what was trained, and go on, are evaluated and exported as whole ones are."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.launch.kills import curve, validations
from tests.launch.runs import losses

pytestmark = [pytest.mark.launch, pytest.mark.nightly, pytest.mark.timeout(1200)]
LORA = ["train.lora=4", "train.lora_on=all", "train.layer_decay=0.9", "train.lr=3e-3", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def start(forks, launcher, runs):
    def start(run: Path, *words: str, ranks: int = 1) -> tuple[int, str]:
        words = (f"run.dir={run}", f"model.init_from={runs['1 rank']}", "train.warmup_epochs=0.1", *LORA, *words)
        code, out, err = forks.run(["launch/train.py", *launcher.words(*words)], ranks)
        return code, out + err

    return start


@pytest.fixture(scope="module")
def unbroken(start, shared) -> Path:
    def make(folder: Path) -> None:
        code, said = start(folder / "run")
        assert code == 0, said
        (folder / "said").write_text(said)

    return shared("cheap", make)


@pytest.fixture
def stopped(unbroken, tmp_path) -> Path:
    """As it was after the first epoch."""
    run = tmp_path / "run"
    shutil.copytree(unbroken / "run", run)
    shutil.rmtree(run / "checkpoints" / "step00000010")
    (run / "checkpoints" / "latest").write_text("step00000005")
    (run / "done.json").unlink()
    return run


def test_what_was_trained_is_said_and_nothing_else_stored(unbroken, runs):
    said = (unbroken / "said").read_text()
    assert "ViT-demo-16 + meanP, 7.7 M weights, 0.05 M trained; " in said
    assert f"frozen weights, and read them from model.init_from={runs['1 rank']} again: keep it" in said
    whole, stored = (run / "checkpoints" / "step00000010" for run in (runs["1 rank"], unbroken / "run"))
    assert sum(f.stat().st_size for f in stored.iterdir()) < 0.05 * sum(f.stat().st_size for f in whole.iterdir())
    with safe_open(stored / "model.safetensors", "pt") as file:
        assert all("lora" in name or "positional" in name or "scale" in name for name in file.keys())  # noqa: SIM118 no mapping
    frozen = json.loads((stored / "state.json").read_text())["frozen"]
    assert (frozen["backbone"], frozen["init_tag"]) == ("ViT-demo-16", "step00000010")
    found = losses(unbroken / "run")
    assert found[0] == pytest.approx(losses(runs["1 rank"])[-1], rel=0.2) and found[-1] < found[0]


def test_it_goes_on_bit_for_bit(stopped, start, unbroken):
    code, said = start(stopped, "run.resume=auto")
    assert code == 0, said
    assert curve(stopped) == curve(unbroken / "run") and validations(stopped) == validations(unbroken / "run")


def test_it_goes_on_with_other_ranks_and_another_stage_and_whole_checkpoints(stopped, start, unbroken):
    code, said = start(stopped, "run.resume=auto", "engine.zero_stage=3", "checkpoint.whole=true", ranks=2)
    assert code == 0, said
    assert losses(stopped) == pytest.approx(losses(unbroken / "run"), rel=1e-5)
    with safe_open(stopped / "checkpoints" / "step00000010" / "model.safetensors", "pt") as file:
        assert "clip.token_embedding.weight" in set(file.keys())
    assert "frozen" not in json.loads((stopped / "checkpoints" / "step00000010" / "state.json").read_text())


def test_it_is_evaluated_and_exported_as_a_plain_model(unbroken, evaluate, forks, launcher, tmp_path):
    run, target = unbroken / "run", tmp_path / "model.safetensors"
    code, out, err = forks.run(["c4c/export.py", "--ckpt", str(run), "--to", str(target)])
    assert code == 0, out + err
    with safe_open(target, "pt") as file:
        assert not any("lora" in name for name in file.keys())  # noqa: SIM118 no mapping
    found = {}
    for name, source in {"run": run, "file": target}.items():
        code, out, err = evaluate(
            "--ckpt", source, "--data", launcher.test, "--json", tmp_path / f"{name}.json", "data.num_frames=4"
        )
        assert code == 0, out + err
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["run"]["t2v"] == found["file"]["t2v"]
    assert found["run"]["t2v"]["R1"] == pytest.approx(validations(run)[-1]["val/t2v_R1_pct"])


def test_a_source_that_has_changed_is_refused(stopped, start, runs, tmp_path):
    code, said = start(stopped, f"model.init_from={runs['2 ranks, ZeRO 2']}", "run.resume=auto")
    assert code == 1 and "gives other frozen weights than the run was trained with (digest " in said
    code, said = start(stopped, f"model.init_from={tmp_path / 'gone'}", "run.resume=auto")
    assert code == 1 and "no such file" in said


def test_the_check_says_what_is_left_out_and_what_fits(start, runs, tmp_path):
    code, said = start(tmp_path / "run", "--check")
    assert code == 0, said
    assert (
        f"it leaves out 7.6 M frozen weights: keep model.init_from={runs['1 rank']}, from which they are read again"
        in said
    )
    assert "what fits a card of 24 GB (20.9 GiB for a program) in bf16" in said and "\n  LoRA, rank 4 * " in said
    assert "everything works" in said and not (tmp_path / "run").exists()

"""Files of stages: what they come to, and what is refused before anything runs."""

import argparse
import json
import runpy
from pathlib import Path

import pytest

from c4c.config import dump, load
from c4c.models.backbone import settled
from c4c.training import stages
from c4c.training.run_folder import mark_done
from c4c.training.stages import StageError, read

CFG = Path(__file__).parents[3] / "launch/cfg"
TWO = """
launcher: torchrun --nproc_per_node 2
stages:
  - {name: one, cfg: demo.yaml, set: {run.dir: RUNS/one, train.lr: 1.0e-4, train.betas: [0.9, 0.98]}}
  - {name: look, eval: one, data: data/x}
  - {name: two, cfg: demo.yaml, from: one, set: {run.dir: RUNS/two}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "stages.yaml").write_text(text.replace("RUNS", str(tmp_path)))
        return tmp_path / "stages.yaml"

    return write


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Commands, instead of running them; a training run is done at once, but for one of train.lr=7, which fails."""
    found = []

    def call(command, say) -> int:
        found.append(command)
        run = next((Path(w.partition("=")[2]) for w in command if w.startswith("run.dir=")), None)
        if "eval.py" in "".join(command):
            Path(command[command.index("--json") + 1]).write_text(
                json.dumps({"t2v": dict.fromkeys(("R1", "R5", "R10", "MdR"), 1)})
            )
        elif "train.lr=7" not in command:
            run.mkdir(exist_ok=True)
            words = [w for w in command if "=" in w]
            (run / "config.yaml").write_text(dump(settled(load("demo.yaml", words, [CFG]))))
            mark_done(run, 5, "step00000005")
        else:
            return 3
        return 0

    monkeypatch.setattr(stages, "_call", call)
    return found


def go(path: Path, *words: str) -> list[str]:
    said: list[str] = []
    stages.run(read(path, list(words), [CFG]), Path("launch"), said.append)
    return said


def test_stages_of_the_configurations_there_are():
    for name, ends in (
        ("two_stage.yaml", ["pretrain", "zero-shot", "finetune", "fine-tuned"]),
        ("demo_two_stage.yaml", None),
    ):
        found = read(Path(name), [], [CFG])
        assert found.launcher == ("deepspeed",)
        assert ends in (None, [stage.name for stage in found.stages])


def test_what_a_file_comes_to(write):
    one, look, two = read(write(TWO), ["two.train.epochs=2"], [CFG]).stages
    assert one.config.train.lr == 1e-4 and one.config.train.betas == (0.9, 0.98) and one.config.run.resume == "auto"
    assert (look.of, look.run, look.result.name) == (one, one.run, "look.json")
    assert two.source is one and two.config.train.epochs == 2
    assert (two.config.model.init_from, two.config.model.init_tag) == (str(one.run), "best")


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("stages: 3", [], "a pipeline has a list `stages`"),
        ("stages: [{name: a}]", [], "is not a stage: a stage has the keys"),
        ("stages: [{name: a, cfg: demo.yaml, sett: 3}]", [], "is not a stage: a stage has the keys"),
        ("stages: [{name: a, cfg: demoo.yaml}]", [], "did you mean demo.yaml"),
        ("stages: [{name: a, cfg: demo.yaml, set: {train.lrr: 1}}]", [], "did you mean train.lr?"),
        ("stages: [{name: a, cfg: demo.yaml}]", ["a.train.lr=nan"], "stage a: train.lr=nan: must be a finite number"),
        ("stages: [{name: a b, cfg: demo.yaml}]", [], "its name must be unique and consist of letters"),
        ("stages: [{name: a, cfg: demo.yaml}, {name: b, cfg: demo.yaml}]", [], "both have run.dir="),
        ("stages: [{name: a, cfg: demo.yaml, from: b}]", [], "the training stages before it are: none"),
        ("stages: [{name: a, cfg: demo.yaml}, {name: b, eval: c}]", [], "the training stages before it are: a"),
        (
            "stages: [{name: a, cfg: demo.yaml}]",
            ["b.train.lr=3"],
            "write it as STAGE.key=value, where STAGE is one of a",
        ),
    ],
)
def test_mistakes(write, text, words, said):
    with pytest.raises(ValueError, match=r".") as refused:
        read(write(text), words, [CFG])
    assert said in str(refused.value)


def test_data_of_a_later_stage_are_missed_before_the_first_one_runs(write, called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(TWO)
    for split in ("data/demo/train", "data/demo/test"):
        (tmp_path / split).mkdir(parents=True)
    with pytest.raises(StageError, match=r"stage look: there is no folder data/x"):
        stages.require_data_of(read(path, [], [CFG]))
    (tmp_path / "data/x").mkdir()
    stages.require_data_of(read(path, [], [CFG]))
    go(path)
    (tmp_path / "data/x").rmdir()  # what is done needs it no more
    stages.require_data_of(read(path, [], [CFG]))


def test_an_evaluation_of_a_mixtures_run_has_one_split(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = "set: {run.dir: runs/a, data.train: [data/a, data/b], data.weights: [2, 1], data.test: data/a}"
    path = write(f"stages: [{{name: a, cfg: demo.yaml, {sets}}}, {{name: look, eval: a, data: data/x}}]")
    for split in ("data/a", "data/b"):
        (tmp_path / split).mkdir(parents=True)
    with pytest.raises(StageError, match=r"stage look: there is no folder data/x"):
        stages.require_data_of(read(path, [], [CFG]))
    (tmp_path / "data/x").mkdir()
    stages.require_data_of(read(path, [], [CFG]))


def test_what_is_done_is_skipped(write, called):
    path = write(TWO)
    go(path)
    scripts = [next(Path(w).name for w in command if w.endswith(".py")) for command in called]
    assert scripts == ["train.py", "eval.py", "train.py"] and called[0][:3] == ["torchrun", "--nproc_per_node", "2"]
    assert called[1][called[1].index("--tag") + 1] == "step00000005" and "data/x" in called[1]
    assert [line.rpartition(" is ")[2] for line in go(path)] == ["done", "up to date", "done"]
    assert len(called) == 3


def test_a_stage_that_does_not_end_ends_all(write, called, tmp_path):
    with pytest.raises(StageError, match=r"stage one ended with code 3, .* The same command continues it"):
        go(write(TWO), "one.train.lr=7")
    assert len(called) == 1 and not (tmp_path / "two").exists()


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_end_is_told(write, called, capsys, monkeypatch, evaluates):
    monkeypatch.setattr(stages, "require_data_of", lambda pipeline: None)
    text = TWO if evaluates else "\n".join(line for line in TWO.splitlines() if "eval:" not in line)
    launched = runpy.run_path(str(CFG.parent / "stages.py"))
    launched["run"](argparse.Namespace(cfg=write(text), overrides=[], launcher=""), CFG.parent)
    told = capsys.readouterr()
    assert ("text to video" in told.out and "look" in told.out) if evaluates else told.out == ""
    assert told.err.endswith("all stages are done\n") != evaluates


def test_other_settings_are_refused(write, called):
    path = write(TWO)
    go(path)
    with pytest.raises(StageError, match=r"stage two: .*train.epochs was 3.0, is 4.0"):
        go(path, "two.train.epochs=4")


def test_a_stage_knows_what_it_started_from(write, called, tmp_path):
    path = write(TWO)
    go(path)
    (tmp_path / "one/done.json").unlink()  # as if stage one had been trained anew
    with pytest.raises(StageError, match=r"started from another state of .*one than it has now. Move it aside"):
        go(path)

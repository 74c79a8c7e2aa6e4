"""`launch/stages.py`: two stages, killed in the one and in the other, come to the very result of the unbroken two."""

import json
import os
import runpy
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from c4c.training import stages
from c4c.training.run_folder import read_done
from c4c.zero import checkpoint
from shards.demo import narrated
from shards.packing.pack import pack
from shards.video.profiles import Profile
from tests.launch.forks import Forks
from tests.launch.runs import ROOT, lines

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]
STEPS, KILLED_AT = 12, 6
FILE = """
launcher: python
stages:
  - name: pretrain
    cfg: demo_narrated.yaml
    set: &set
      run.dir: FOLDER/one
      data.train: DATA/narrated
      data.test: DATA/test
      train.batch_size: 8
      train.max_steps: 12
      train.eval_every_steps: 8
      train.freeze_text_epochs: 0.65
      train.lr_text: 0.5
      checkpoint.every_steps: 4
      checkpoint.keep_last: 9
      data.threads: 1
      run.deterministic: true
  - {name: zero-shot, eval: pretrain}
  - name: finetune
    cfg: demo_small.yaml
    from: pretrain
    set: {<<: *set, run.dir: FOLDER/two, data.train: DATA/train, train.patience: 9}
"""


EARLY = """
  - name: early
    cfg: demo_small.yaml
    from: pretrain
    set: {<<: *set, run.dir: FOLDER/early, data.train: DATA/train, train.lr: 0, train.eval_every_steps: 2, train.patience: 2}
"""


class Scripts:
    """Runs the commands of a pipeline as forks, and kills one if asked to."""

    def __init__(self, forks: Forks):
        self._forks = forks
        self.kill: Path | None = None  # the run to kill once it has taken some steps
        self.called: list[list[str]] = []

    def call(self, command: list[str], say) -> int:
        self.called.append(command)
        # half the cores: beside other tests, threads that wait for each other are slow
        script, ended = self._forks.start(command[1:], LOCAL_WORLD_SIZE="2"), threading.Event()
        if self.kill:
            watching = (script.pids[0], self.kill / "metrics.jsonl", ended)
            threading.Thread(target=self._watch, args=watching, daemon=True).start()
        code, out, err = script.finish()
        ended.set()
        print(out, err)
        return code

    def _watch(self, pid: int, metrics: Path, ended: threading.Event) -> None:
        while not ended.is_set():
            if metrics.exists() and metrics.read_text().count("\n") >= KILLED_AT:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.005)


@pytest.fixture(scope="module")
def pipeline(forks):
    """Runs launch/stages.py in this process: folder -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        scripts = Scripts(forks)
        patch.setattr(stages, "_call", scripts.call)
        patch.chdir(ROOT)

        def run(folder: Path, kill: Path | None = None) -> int:
            scripts.kill = kill
            patch.setattr("sys.argv", ["launch/stages.py", "--cfg", str(folder / "stages.yaml")])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path("launch/stages.py", run_name="__main__")
            return ended.value.code

        run.scripts = scripts
        yield run


@pytest.fixture(scope="module")
def folders(launcher, pipeline, tmp_path_factory) -> dict[str, Path]:
    """Of an unbroken pipeline and of one killed twice."""
    data = launcher.folder
    videos = narrated.generate(data / "source/narrated", videos=10, workers=2)
    pack(videos, data / "narrated", dataset="demo", split="narrated", profile=Profile(short_side=64), workers=2)
    out = {name: tmp_path_factory.mktemp(name) for name in ("unbroken", "killed")}
    for name, folder in out.items():
        text = FILE + (EARLY if name == "unbroken" else "")
        (folder / "stages.yaml").write_text(text.replace("FOLDER", str(folder)).replace("DATA", str(data)))
    assert pipeline(out["unbroken"]) == 0
    for run in ("one", "two"):
        assert pipeline(out["killed"], kill=out["killed"] / run) == 1
        assert KILLED_AT <= len(lines(out["killed"] / run / "metrics.jsonl")) < STEPS
    assert pipeline(out["killed"]) == 0
    return out


@pytest.mark.parametrize("run", ["one", "two"])
def test_either_stage_killed_and_continued_is_the_unbroken_one(folders, run):
    unbroken, killed = (folders[name] / run for name in ("unbroken", "killed"))
    for name in ("train/loss", "train/grad_norm"):
        columns = [[line[name] for line in lines(folder / "metrics.jsonl")] for folder in (unbroken, killed)]
        assert len(columns[0]) == STEPS and columns[0] == columns[1]
    found = [[(v["step"], v["val/t2v_R1_pct"]) for v in lines(folder / "eval.jsonl")] for folder in (unbroken, killed)]
    assert found[0] == found[1] and {8, STEPS} <= {step for step, _ in found[0]}
    ends = [{k: v for k, v in read_done(folder).items() if k != "time_unix_s"} for folder in (unbroken, killed)]
    assert ends[0] == ends[1] and ends[0]["step"] == STEPS
    weights = [
        load_file(f / checkpoint.FOLDER / checkpoint.tag_of(STEPS) / "model.safetensors") for f in (unbroken, killed)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_stage_two_starts_from_the_best_of_stage_one(folders):
    run = folders["unbroken"]
    note = json.loads((run / "two/started_from.json").read_text())
    assert note == {"run": str(run / "one"), **read_done(run / "one")}
    assert note["best"] in ("step00000008", "step00000012")


def test_a_frozen_tower_stands_still_until_its_epoch(folders):
    run = folders["unbroken"] / "one"  # 0.65 epochs of 13 steps are 8.45
    states = [load_file(run / checkpoint.FOLDER / checkpoint.tag_of(step) / "model.safetensors") for step in (4, 8, 12)]
    text, video = "clip.token_embedding.weight", "clip.visual.conv1.weight"
    assert (states[0][text] == states[1][text]).all() and (states[1][text] != states[2][text]).any()
    assert (states[0][video] != states[1][video]).any()


def test_a_run_that_gets_no_better_ends(folders, pipeline):
    """At a learning rate of 0 the second and third validation are no better than the first."""
    run = folders["unbroken"] / "early"
    assert [line["step"] for line in lines(run / "eval.jsonl")] == [2, 4, 6]
    assert len({line["val/t2v_R1_pct"] for line in lines(run / "eval.jsonl")}) == 1
    assert read_done(run)["step"] == checkpoint.step_of(checkpoint.latest(run)) == 6


def test_what_is_done_is_not_done_again(folders, pipeline, capsys):
    calls = len(pipeline.scripts.called)
    assert pipeline(folders["killed"]) == 0
    assert len(pipeline.scripts.called) == calls
    out, err = capsys.readouterr()
    assert [line.rpartition("/")[2] for line in err.splitlines()] == [
        "one is done",
        "zero-shot.json is up to date",
        "two is done",
    ]
    assert "zero-shot" in out and "R@10 %" in out

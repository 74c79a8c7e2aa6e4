"""Training in this process, on one rank: what it says, what it continues, what it repeats."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from c4c import features
from c4c.config import Config, load
from c4c.models import backbone, towers
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.export import files
from c4c.models.pretrained import open_checkpoint
from c4c.settings import ModelConfig
from c4c.training.continuation import require_continues
from c4c.training.replay import replay
from c4c.training.run_folder import read_done
from c4c.training.teacher import load_teacher
from c4c.training.trainer import Trainer, train
from c4c.zero import checkpoint
from tests.launch.runs import ROOT, Launcher, lines, losses, make_splits

pytestmark = pytest.mark.slow  # imports DALI

STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def one_group():
    """DeepSpeed keeps the process group that it first sees, so all runs of this process have to share one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("c4c.training.trainer", "c4c.training.replay"):
            patch.setattr(f"{module}.stop_distributed", lambda: None)
        yield


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("train")
    make_splits(folder)
    return Launcher(folder)


@pytest.fixture(scope="module")
def settings(launcher):
    """settings(*words) -> the configuration of a run of one epoch."""

    def made(*words: str) -> Config:
        short = ["train.epochs=1", "data.num_frames=2", "checkpoint.every_steps=3", "data.eval_batch_size=32"]
        return load("demo.yaml", launcher.words(*short, *words)[2:], [ROOT / "launch" / "cfg"])

    return made


@pytest.fixture(scope="module")
def run(launcher, settings) -> Path:
    """A finished run with checkpoints after step 3 and 5."""
    folder = launcher.folder / "run"
    train(settings(f"run.dir={folder}"))
    assert checkpoint.tags(folder) == ["step00000003", "step00000005"]
    return folder


@pytest.fixture
def stopped(run, tmp_path) -> Path:
    """A copy of the run as it was after step 3."""
    folder = shutil.copytree(run, tmp_path / "stopped")
    shutil.rmtree(folder / "checkpoints" / "step00000005")
    (folder / "done.json").unlink()
    checkpoint.point(folder, "step00000003")
    return folder


def test_the_same_data_at_another_path_is_continued(stopped, run, launcher, settings, tmp_path, capsys):
    moved = shutil.copytree(launcher.train, tmp_path / "moved")
    train(settings(f"run.dir={stopped}", f"data.train={moved}", "run.resume=auto"))
    assert losses(stopped) == losses(run)
    tag = stopped / "checkpoints" / "step00000003"
    assert f"weights: {tag}, continuing after step 3\n" in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_says_that_it_starts_from_the_first_step(stopped, settings, capsys):
    shutil.rmtree(stopped / "checkpoints")
    train(settings(f"run.dir={stopped}", "run.resume=auto", "train.max_steps=1"))
    said = "has metrics up to step 5, but no checkpoint to continue from: this run starts from the first step"
    assert said in " ".join(capsys.readouterr().err.split())
    assert [row["step"] for row in lines(stopped / "metrics.jsonl")] == [1]
    train(
        settings(f"run.dir={stopped}", "train.max_steps=1")
    )  # run.resume=never: there are no metrics in the new folder
    assert "no checkpoint to continue from" not in capsys.readouterr().err


def test_lines_that_are_written_a_step_late_are_the_same(run, settings, tmp_path, monkeypatch):
    """As on a GPU: line N comes after the launch of step N + 1, but before a checkpoint and the end."""
    events, made = [], Trainer.__init__

    def late(self, *args):
        made(self, *args)
        self.reads_late = True
        monkeypatch.setattr(self.metrics, "step", _noted(self.metrics.step, events, "line"))
        monkeypatch.setattr(self.saver, "save", _noted(self.saver.save, events, "save"))
        monkeypatch.setattr(self.session, "step", _noted(self.session.step, events, "step"))

    monkeypatch.setattr(Trainer, "__init__", late)
    train(settings(f"run.dir={tmp_path / 'late'}"))
    assert events == ["step", "step", "line", "step", "line", "line", "save", "step", "step", "line", "line", "save"]
    known = ("step", "epoch", "train/loss", "train/lr", "train/logit_scale", "train/grad_norm", "train/skipped_steps")
    rows = [[[row[k] for k in known] for row in lines(folder / "metrics.jsonl")] for folder in (run, tmp_path / "late")]
    assert rows[0] == rows[1]
    for tag in checkpoint.tags(run):
        one, two = (folder / "checkpoints" / tag / "model.safetensors" for folder in (run, tmp_path / "late"))
        assert one.read_bytes() == two.read_bytes()


def _noted(call, events: list[str], name: str):
    def noted(*args):
        events.append(name)
        return call(*args)

    return noted


def test_bad_steps_end_a_run_at_the_same_step_when_lines_are_late(settings, tmp_path, monkeypatch):
    for late in (False, True):
        made = Trainer.__init__

        def build(self, *args, late=late, made=made):
            made(self, *args)
            self.reads_late = late
            self.session.model.clip.logit_scale.data.fill_(float("nan"))

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "__init__", build)
            folder = tmp_path / str(late)
            with pytest.raises(ValueError, match="makes 2 in a row"):
                train(settings(f"run.dir={folder}", "train.max_bad_steps=2"))
        assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1]
        assert [row["step"] for row in lines(folder / "bad_steps.jsonl")] == [1, 2]


def test_other_data_is_refused(stopped, launcher, settings):
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match=f"data.train was {launcher.train}, is {launcher.test}"):
        train(settings(f"run.dir={stopped}", f"data.train={launcher.test}", "run.resume=auto"))
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_run_that_goes_on_with_more_patience_is_done_when_it_ends(settings, tmp_path):
    short = (f"run.dir={tmp_path / 'run'}", "train.lr=0", "train.eval_every_steps=1")
    train(settings(*short, "train.patience=1"))
    assert read_done(tmp_path / "run")["step"] == 2
    train(settings(*short, "train.patience=0", "run.resume=auto", "checkpoint.keep_last=1"))
    done = read_done(tmp_path / "run")
    assert done["step"] == STEPS and done["best"] in checkpoint.tags(tmp_path / "run")


def test_more_epochs_are_a_new_run_from_the_weights(run, settings):
    with pytest.raises(ValueError, match=r"train\.epochs was 1\.0, is 2\.0") as caught:
        train(settings(f"run.dir={run}", "run.resume=auto", "train.epochs=2"))
    words = [word for word in str(caught.value).split() if word.startswith(("model.init_from=", "run.dir="))]
    assert words == [f"model.init_from={run}", f"run.dir={run}-1"]
    config = settings(*words, "train.epochs=2", "train.max_steps=1")
    train(config)
    first = json.loads((Path(config.run.dir) / "metrics.jsonl").read_text())
    assert first["train/loss"] < losses(run)[0]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_step_is_repeated_bit_for_bit(step, run, settings, capsys):
    """The first two from the seed, since no earlier checkpoint is kept; the last from the one after step 3."""
    assert replay(settings(f"run.dir={run}", "run.resume=auto"), step)
    err = capsys.readouterr().err
    start = "the start of the run" if step < 4 else "step00000003"
    assert err.startswith(f"replaying step {step} from {start}\n")
    assert "the same, bit for bit\n" in err


def test_a_replay_from_the_start_wants_the_frozen_weights_of_then(settings, tmp_path):
    base, run = tmp_path / "base.safetensors", tmp_path / "run"
    model = build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 2)
    files.write(model, None, base, official=False)
    config = settings(f"model.init_from={base}", "train.lora=4", f"run.dir={run}", "train.max_steps=2")
    train(config)
    assert replay(config, 1)
    model.clip.ln_final.weight.data[3] += 1e-6
    files.write(model, None, base, official=False)
    with pytest.raises(
        ValueError, match=r"model\.init_from=.* gives other frozen weights than the run was trained with"
    ):
        replay(config, 1)


def test_the_sigmoid_loss_trains_stops_and_goes_on_with_its_bias(settings, tmp_path, capsys):
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    train(settings("train.loss=sigmoid", "train.logit_bias=-5", f"run.dir={whole}"))
    note = "the weights have no logit_bias: train.loss=sigmoid starts it at -5 (train.logit_bias)"
    assert note in capsys.readouterr().err
    biases = [row["train/logit_bias"] for row in lines(whole / "metrics.jsonl")]
    assert len(set(biases)) == STEPS and all(-6 < bias < -4 for bias in biases)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step00000005")
    (stopped / "done.json").unlink()
    checkpoint.point(stopped, "step00000003")
    config = settings("train.loss=sigmoid", "train.logit_bias=-5", f"run.dir={stopped}", "run.resume=auto")
    train(config)
    assert note not in capsys.readouterr().err
    assert lines(stopped / "metrics.jsonl")[-1]["train/logit_bias"] == biases[-1]
    assert losses(stopped) == losses(whole)
    assert replay(config, 4)
    model = CLIP4Clip.from_checkpoint(whole)
    assert model.bias().item() == pytest.approx(biases[-1]) and model.spec["init_logit_bias"] == -5
    after = settings(f"model.init_from={whole}", f"run.dir={tmp_path / 'after'}", "train.max_steps=1")
    train(after)  # by another loss, which keeps it
    assert CLIP4Clip.from_checkpoint(tmp_path / "after").bias().item() == model.bias().item()


@pytest.fixture(scope="module")
def teacher(launcher, settings) -> Path:
    """A run of two steps with the head wti."""
    folder = launcher.folder / "teacher"
    train(settings("model.head=wti", "train.max_steps=2", f"run.dir={folder}"))
    return folder


def taught_digest(folder: Path, tag: str = "step00000005") -> str | None:
    return checkpoint.read_state(folder / "checkpoints" / tag).get("teacher")


def test_a_teacher_is_learned_from_and_left_out_of_the_run(teacher, run, settings, tmp_path, capsys):
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    words = [f"train.teacher={teacher}", "train.teacher_temperature=2", "train.ema=0.9"]
    train(settings(*words, f"run.dir={whole}"))
    said = capsys.readouterr().err
    assert f"train.teacher={teacher}: wti, " in said and "which are not trained and take" in said
    assert losses(whole)[0] > losses(run)[0]  # by the term that is added to the loss
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step00000005")
    (stopped / "done.json").unlink()
    checkpoint.point(stopped, "step00000003")
    config = settings(*words, f"run.dir={stopped}", "run.resume=auto")
    train(config)
    assert losses(stopped) == losses(whole)
    assert replay(config, 4)
    files = [folder / "checkpoints" / "step00000005" / "model.safetensors" for folder in (stopped, whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert [load_file(file).keys() for file in files[:2]] == [load_file(files[2]).keys()] * 2
    assert taught_digest(whole) and taught_digest(run) is None
    train(settings(f"train.teacher={teacher}", "train.teacher_weight=0", f"run.dir={alone}"))
    assert losses(alone) == losses(run) and taught_digest(alone) is None
    moved = shutil.move(teacher, tmp_path / "elsewhere")  # only training needs it
    try:
        assert CLIP4Clip.from_checkpoint(whole).head.name == "meanP"
    finally:
        shutil.move(moved, teacher)


def test_a_run_goes_on_with_the_teacher_that_it_began_with_only(teacher, settings, tmp_path):
    own, folder = tmp_path / "teacher.safetensors", tmp_path / "run"
    model, data = open_checkpoint(str(teacher))
    files.write(model, data, own, official=False)
    train(settings(f"train.teacher={own}", f"run.dir={folder}", "train.max_steps=1"))
    (folder / "done.json").unlink()
    again = ["train.max_steps=1", f"run.dir={folder}", "run.resume=auto"]
    with pytest.raises(ValueError, match=r"train\.teacher_weight was 1\.0, is 0\.5"):
        train(settings(f"train.teacher={teacher}", "train.teacher_weight=0.5", *again))
    with pytest.raises(ValueError, match=rf"train\.teacher was {own}, is \)"):
        train(settings(*again))
    other = settings(f"train.teacher={tmp_path / 'another'}", *again)
    # where nobody compares digests, as for a stage that is done
    with pytest.raises(ValueError, match=r"train\.teacher was "):
        require_continues(folder, other)
    require_continues(folder, other, "a digest")
    moved = own.rename(tmp_path / "moved.safetensors")
    train(settings(f"train.teacher={moved}", *again))
    (folder / "done.json").unlink()
    model.clip.ln_final.weight.data[3] += 1e-3
    files.write(model, data, own, official=False)
    with pytest.raises(ValueError, match=r"is not what the run has learned from \(its digest is \w+, was \w+\)"):
        train(settings(f"train.teacher={own}", *again))
    own.unlink()
    with pytest.raises(ValueError, match=r"train\.teacher=.* cannot be read"):
        train(settings(f"train.teacher={own}", *again))


def test_a_teacher_of_other_pictures_or_captions_is_refused(teacher, settings, tmp_path):
    nowhere = f"run.dir={tmp_path / 'nowhere'}"
    with pytest.raises(
        ValueError, match=r"other ones than data\.num_frames=3: set data\.num_frames=2, or take a teacher"
    ):
        train(settings(f"train.teacher={teacher}", "data.num_frames=3", nowhere))
    with pytest.raises(ValueError, match=r"data\.max_words=20: set data\.max_words=24"):
        train(settings(f"train.teacher={teacher}", "data.max_words=20", nowhere))
    with pytest.raises(ValueError, match=r"other ones than data\.frame_order=reverse: set data\.frame_order=forward"):
        train(settings(f"train.teacher={teacher}", "data.frame_order=reverse", nowhere))
    with pytest.raises(ValueError, match="a run cannot be its own teacher"):
        train(settings(f"train.teacher={teacher}", f"run.dir={teacher}", "run.resume=auto"))
    asked = backbone.settled(settings(f"train.teacher={teacher}"))
    about = {
        "kind": "hf",
        "name": "other/words",
        "kwargs": {},
        "mode": None,
        "context_length": 77,
        "fixed_length": False,
    }
    with pytest.raises(
        ValueError,
        match=r"another tokenizer than model\.backbone \(kind is 'clip', here 'hf', name is '', here 'other/words'\)",
    ):
        load_teacher(asked.train, asked.data, {"tokenizer": about}, torch.device("cpu"), "fp32")
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def stored(launcher, teacher):
    """stored(split, file, *words) -> file, with what the teacher makes of that split."""

    def made(split: Path, file: Path, *words: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            named = ["--ckpt", teacher, "--data", split, *words, "--out", file, "--device", launcher.device]
            patch.setattr("sys.argv", ["c4c.features", *map(str, named)])
            assert features.main() == 0
        return file

    return made


def test_a_teacher_in_a_file_teaches_as_one_that_runs(teacher, stored, launcher, settings, tmp_path, capsys):
    """Validation's frames are training's: data.sampling=uniform draws nothing."""
    file = stored(launcher.train, tmp_path / "teacher.safetensors")
    assert f"{file}: features of 40 videos and 200 captions by {teacher}" in capsys.readouterr().out
    running, whole, stopped = (tmp_path / name for name in ("running", "whole", "stopped"))
    words = [
        "train.captions_per_video=2",
        "train.batch_size=20",
        "train.micro_batch_size=8",
        "checkpoint.every_steps=3",
    ]
    for teaching, run in ((teacher, running), (file, whole)):
        train(settings(*words, f"train.teacher={teaching}", f"run.dir={run}", "train.max_steps=4"))
    assert f"train.teacher={file}: features of 40 videos" in capsys.readouterr().err
    assert losses(whole) == pytest.approx(losses(running), rel=1e-5)
    assert taught_digest(whole, "step00000004") not in (None, taught_digest(running, "step00000004"))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step00000004")
    (stopped / "done.json").unlink()
    checkpoint.point(stopped, "step00000003")
    again = settings(*words, f"train.teacher={file}", f"run.dir={stopped}", "train.max_steps=4", "run.resume=auto")
    file = file.rename(tmp_path / "kept")
    stored(launcher.train, tmp_path / "teacher.safetensors", "--float16")
    with pytest.raises(ValueError, match=r"is not what the run has learned from \(its digest is \w+, was \w+\)"):
        train(again)
    file.rename(tmp_path / "teacher.safetensors")
    train(again)
    assert losses(stopped) == losses(whole)


def test_a_file_of_other_videos_is_refused_before_the_first_step(stored, launcher, settings, tmp_path):
    file = stored(launcher.test, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"train\.teacher={file} has no features of the video '.*' and 39 others of"):
        train(settings(f"train.teacher={file}", f"run.dir={tmp_path / 'nowhere'}"))
    with pytest.raises(ValueError, match=r"data\.flip changes those of the run: set data\.flip=0"):
        train(settings(f"train.teacher={file}", f"run.dir={tmp_path / 'nowhere'}", "data.flip=0.5"))
    assert not (tmp_path / "nowhere").exists()


def test_the_start_line_says_where_the_weights_come_from(run, tmp_path):
    (tmp_path / "w.pt").touch()
    origins = {
        "scratch": "random (model.init_from=scratch, run.seed=42)",
        "openai": "open_clip's openai of ViT-B-32",
        str(tmp_path / "w.pt"): str(tmp_path / "w.pt"),
        str(run): str(run / "checkpoints" / "step00000005"),
    }
    for source, said in origins.items():
        model = SimpleNamespace(init_from=source, init_tag="", init_ema=True, backbone="ViT-B-32")
        config = SimpleNamespace(model=model, run=SimpleNamespace(seed=42))
        trainer = SimpleNamespace(config=config, session=SimpleNamespace(tag=None), folder=tmp_path)
        assert Trainer._origin(trainer) == said


def test_weights_of_another_size_name_the_backbone_to_set(launcher, settings):
    file = launcher.folder / "small.pt"
    torch.save(towers.build(backbone.named("ViT-S-16")).state_dict(), file)
    with pytest.raises(ValueError) as caught:
        train(settings(f"model.init_from={file}", "run.dir=nowhere", "model.backbone=ViT-B-32"))
    assert str(caught.value) == (
        f"model.init_from={file} has patch size 16, width 384, text width 384, feature size 384; model.backbone=ViT-B-32 has "
        "patch size 32, width 768, text width 512, feature size 512: set model.backbone=ViT-S-16, or take other weights"
    )
    assert not Path("nowhere").exists()

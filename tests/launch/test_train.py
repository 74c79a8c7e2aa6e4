"""`deepspeed launch/train.py`: the same curve on any number of ranks, at any ZeRO stage, and after a kill."""

import os
import runpy
import shutil
import sys

import pytest
import torch

from c4c.config import dump, load
from c4c.models.backbone import settled
from c4c.training.run_folder import read_config
from c4c.zero import checkpoint
from c4c.zero.checkpoint import latest, tags
from tests.buckets import object_store
from tests.launch.kills import curve, kill_and_go_on, validations
from tests.launch.runs import ROOT, STEPS_PER_EPOCH, lines, losses

# the first launch in a new environment compiles DeepSpeed's optimizer
pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
TOTAL = 2 * STEPS_PER_EPOCH
ROUNDING = 1e-5  # relative, after ten steps in fp32


def column(run, name: str) -> list:
    return [line[name] for line in lines(run / "metrics.jsonl")]


def test_every_step_is_in_the_metrics(runs):
    for run in runs.values():
        assert column(run, "step") == list(range(1, TOTAL + 1))
        assert column(run, "epoch") == [0] * STEPS_PER_EPOCH + [1] * STEPS_PER_EPOCH
        assert min(column(run, "data/wait_s")) >= 0
        assert min(column(run, "step_s")) > 0
        assert losses(run)[-1] < 0.9 * losses(run)[0]


def test_padding_is_not_counted(runs):
    for run in runs.values():
        for line in lines(run / "metrics.jsonl"):
            assert line["clips_per_s"] * line["step_s"] == pytest.approx(40)  # of 48 places in a batch
            assert line["frames_per_s"] * line["step_s"] == pytest.approx(40 * 4)


def test_the_learning_rate_follows_the_schedule(runs):
    rates = column(runs["1 rank"], "train/lr")
    assert rates[0] == pytest.approx(0.05 * 1e-3)
    assert rates[STEPS_PER_EPOCH] == max(rates) == pytest.approx(1e-3)  # the warm-up is one epoch
    assert rates[STEPS_PER_EPOCH:] == sorted(rates[STEPS_PER_EPOCH:], reverse=True)


@pytest.mark.parametrize("way", ["2 ranks", "2 ranks, ZeRO 2", "2 ranks, ZeRO 3"])
def test_two_ranks_learn_what_one_does_at_every_stage(way, runs):
    for name, tolerance in (
        ("train/loss", ROUNDING),
        ("train/logit_scale", ROUNDING),
        ("train/grad_norm", 10 * ROUNDING),
    ):
        assert column(runs[way], name) == pytest.approx(column(runs["1 rank"], name), rel=tolerance), name


def test_two_ranks_validate_as_one_does(runs):
    one = validations(runs["1 rank"])
    assert [line["step"] for line in one] == [STEPS_PER_EPOCH, TOTAL]
    assert one[0]["val/n_videos"] == one[0]["val/n_texts"] == 17
    for run in runs.values():
        assert validations(run) == one


def test_a_run_folder_holds_all_that_is_needed_later(runs, launcher):
    run = runs["2 ranks"]
    config = read_config(run)
    assert config["data"]["train"] == str(launcher.train)  # from the command line
    assert config["train"]["lr"] == 1e-3  # from the file
    assert config["model"]["head"] == "meanP"  # from nowhere but the defaults
    assert (run / "versions.json").is_file()
    assert list((run / "tensorboard").iterdir())
    assert tags(run) == ["step00000005", "step00000010"]
    assert latest(run) == "step00000010"


@pytest.mark.nightly
@pytest.mark.network
def test_ranks_train_from_an_object_store_through_one_folder(launcher, forks, runs):
    run, local = launcher.folder / "remote", launcher.folder / "local"
    words = ["data.train=s3://bucket/train", f"data.local_dir={local}", "data.local_gb=0.1", f"run.dir={run}"]
    with object_store() as (_, variables):
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.mkdir("bucket")
        store.put(f"{launcher.train}/", "bucket/train/", recursive=True)
        code, out, err = forks.run(["launch/train.py", *launcher.words(*words, "train.epochs=2")], 2, **variables)
    assert code == 0, out + err
    assert losses(run) == losses(runs["2 ranks"])
    assert 0 < sum(p.stat().st_size for p in local.glob("*/*")) < 0.1e9


ALL, ONE = (3, False, 0.0), (STEPS_PER_EPOCH + 1, True, 0.0)  # after so many steps, all of it at once, or one rank


@pytest.mark.nightly  # tests/launch/test_stages.py kills runs too
@pytest.mark.parametrize("kills", [[ONE], [ALL, ONE]], ids=["one rank", "all, one rank"])
def test_a_run_that_was_killed_is_the_unbroken_one(kills, launcher, runs, tmp_path):
    """`python tests/launch/kills.py` does this twenty times."""
    run = tmp_path / "killed"
    words = ["checkpoint.every_steps=2"]
    seen = kill_and_go_on(launcher, run, 2, kills, *words)
    unbroken = curve(runs["2 ranks"])
    for part in (*seen, curve(run)):
        assert part == unbroken[: len(part)]
    assert [len(part) < TOTAL for part in seen] == [True] * len(kills), "the kills were to come before the end"
    assert len(curve(run)) == TOTAL
    assert validations(run) == validations(runs["2 ranks"])
    assert not run.with_name("killed.old1").exists()


SEVERAL = [
    "train.captions_per_video=2", "train.label_smoothing=0.1", "train.mask_equal_captions=true", "train.decorrelation=0.001",
    "data.drop_duplicate_captions=true", "model.head=wti", "train.batch_size=24", "checkpoint.every_steps=4", "checkpoint.keep_last=9",
]  # fmt: skip


@pytest.mark.nightly
def test_several_captions_a_video_on_any_ranks_and_after_a_stop(launcher, forks):
    """Groups of two of five captions: three rows a video, and 120 in an epoch."""
    found = {}
    for ranks in (0, 2):
        run = launcher.folder / f"several{ranks}"
        code, out, err = forks.run(["launch/train.py", *launcher.words(f"run.dir={run}", *SEVERAL)], ranks)
        assert code == 0, out + err
        assert "40 videos, 120 rows of a video and up to 2 captions; 10 steps of 24" in err
        assert f"data.drop_duplicate_captions: 0 of 200 captions in {launcher.train} repeat" in err
        found[ranks] = run
    assert losses(found[2]) == pytest.approx(losses(found[0]), rel=5e-5)
    whole, run = curve(found[0]), found[0]
    assert len(whole) == 10 and losses(run)[-1] < losses(run)[0]
    for path in (run / "done.json", run / "checkpoints" / "latest"):
        path.unlink()
    for tag in tags(run)[1:]:
        shutil.rmtree(run / "checkpoints" / tag)
    words = launcher.words(f"run.dir={run}", "run.resume=auto", *SEVERAL)
    code, out, err = forks.run(["launch/train.py", *words])
    assert code == 0, out + err
    assert "continuing from step00000004" in err
    assert curve(run) == whole
    code, out, err = forks.run(["launch/train.py", *words, "train.captions_per_video=3"])
    assert code == 1 and "made with other settings (train.captions_per_video was 2, is 3)" in err


# ---- what cannot be done ----


def _incomplete_split(launcher) -> list[str]:
    shutil.copytree(launcher.train, launcher.folder / "incomplete")
    (launcher.folder / "incomplete" / "000000.parquet").unlink()
    return [f"data.train={launcher.folder / 'incomplete'}"]


def _other_settings(launcher) -> list[str]:
    run = launcher.folder / "other"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step00000001")
    before = load("demo.yaml", launcher.words("train.lr=0.5")[2:], [ROOT / "launch" / "cfg"])
    (run / "config.yaml").write_text(dump(settled(before)))
    return [f"run.dir={run}", "run.resume=auto"]


MISTAKES = {
    "an unknown key": (["train.batchsize=3"], "unknown key train.batchsize in the command line: did you mean train.batch_size?"),
    "no such folder": (["data.train=nowhere"], f"there is no folder nowhere (looked in {ROOT}). Pack one with"),
    "no folder": (["data.test=''"], "data.test is not set: name the folder of a packed split"),
    "an incomplete split": (_incomplete_split, "is incomplete: 000000.parquet is missing"),
    "another picture size": (["data.image_size=60"], "data.image_size=60 does not suit ViT-demo-16: its image tower cuts pictures into patches of 16 pixels"),
    "too long captions": (["data.max_words=99"], "data.max_words=99 is longer than the 77 tokens"),
    "a contradiction": (["deepspeed.gradient_clipping=2"], "gradient_clipping=2 contradicts engine.clip_grad_norm"),
    "no weights": (["model.init_from=''"], "model.init_from is not set"),
    "a deepspeed key that is ignored": (["deepspeed.gradient_cliping=2"], "did you mean deepspeed.gradient_clipping?"),
    "no epochs": (["train.epochs=0"], "train.epochs=0 trains nothing"),
    "no learning rate": (["train.lr=.nan"], "train.lr=nan: must be a finite number"),
    "more frames than positions": (["model.head=seqTransf", "data.num_frames=78"], "data.num_frames=78 is more than the 77 frames"),
    "a file for a run": (["run.dir=/dev/null/x"], "run.dir=/dev/null/x cannot be written: /dev/null is not a folder"),
    "no place for a run": (["run.dir=/proc/x"], "run.dir=/proc/x cannot be written: No such file or directory in /proc"),
    "a run of other settings": (_other_settings, "made with other settings (train.lr was 0.5, is 0.001)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_clear_line(name, launcher, monkeypatch, capsys):
    """In this process, which must not join a process group: what is refused is refused before ranks have to meet."""
    monkeypatch.setattr("c4c.training.trainer.start_distributed", lambda *_: (0, 1, torch.device("cpu")))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words, said = MISTAKES[name]
    words = words(launcher) if callable(words) else words
    run = launcher.folder / "mistake"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["launch/train.py", *launcher.words(f"run.dir={run}", *words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("launch/train.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not run.exists()


def test_a_run_in_use_is_refused_and_left_alone(launcher, runs, monkeypatch, capsys):
    monkeypatch.setattr("c4c.training.trainer.start_distributed", lambda *_: (0, 1, torch.device("cpu")))
    monkeypatch.chdir(ROOT)
    run = shutil.copytree(runs["1 rank"], launcher.folder / "a run in use")
    code = "import sys, time; from pathlib import Path; from c4c.training.lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(600)"
    first = launcher.start([sys.executable, "-c", code, str(run)])
    assert first.stdout.readline() == "taken\n"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for resume in ("never", "auto"):
        monkeypatch.setattr("sys.argv", ["launch/train.py", *launcher.words(f"run.dir={run}", f"run.resume={resume}")])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("launch/train.py", run_name="__main__")
        assert ended.value.code == 1
        said = f"error: {run} is in use: process {first.pid} on {os.uname().nodename} (since "
        assert capsys.readouterr().err.startswith(said)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert not run.with_name(f"{run.name}.old1").exists()
    first.kill()
    first.communicate()


@pytest.mark.parametrize("fault", ["latest is gone", "the newest is damaged"])
def test_a_run_goes_on_after_a_fault_in_its_checkpoints(fault, launcher, forks, runs):
    run = shutil.copytree(runs["1 rank"], launcher.folder / fault)
    (run / "done.json").unlink()
    newest = run / "checkpoints" / "step00000010"
    if fault == "latest is gone":
        (run / "checkpoints" / "latest").unlink()
        said = f"warning: {run / 'checkpoints' / 'latest'} is missing; continuing from step00000010, the newest intact checkpoint"
    else:
        (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:1000])
        said = f"warning: {newest} is damaged: optimizer.safetensors has 1000 bytes; "
    code, out, err = forks.run(["launch/train.py", *launcher.words(f"run.dir={run}", "run.resume=auto")])
    assert code == 0, out + err
    assert sum(line.startswith(said) for line in err.splitlines()) == 1, err
    assert curve(run) == curve(runs["1 rank"])
    assert validations(run) == validations(runs["1 rank"])
    assert (tags(run), latest(run)) == (["step00000005", "step00000010"], "step00000010")
    assert checkpoint.damage(newest) == ""
    assert f"python launch/eval.py --ckpt '{run}'" in err  # its name has spaces


OTHER_MACHINE = """
import os, runpy
from c4c.training import trainer
from c4c.zero import checkpoint
if os.environ["RANK"] == "1":
    {}
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_ranks_that_see_other_states_of_the_run_folder(launcher, forks, tmp_path):
    """One machine without the folder is refused; one that a shared folder has not reached yet does as the first rank does."""
    words = launcher.words(f"run.dir={tmp_path / 'run'}", "train.max_steps=1", "run.resume=auto", "engine.timeout_s=60")
    code, out, err = forks.run(["launch/train.py", *words], 2)
    assert code == 0, out + err
    script = tmp_path / "other.py"
    script.write_text(OTHER_MACHINE.format("trainer.scores = lambda run: {}"))
    code, out, err = forks.run([str(script), *words], 2)
    assert code == 0, out + err
    script.write_text(OTHER_MACHINE.format("checkpoint.exist = lambda run: False"))
    code, _, err = forks.run([str(script), *words], 2)
    said = f"a checkpoint to continue from in {tmp_path / 'run'} is there on rank 0 and missing on rank 1"
    assert code == 1 and said in err, err


def test_a_mistake_without_the_launcher(launcher):
    code, _, err = launcher.finish(launcher.without_deepspeed("data.train=nowhere"))
    assert (code, err) == (
        1,
        f"error: there is no folder nowhere (looked in {ROOT}). Pack one with: python -m c4c.shard --help\n",
    )


def test_a_batch_that_two_ranks_cannot_share(launcher, forks):
    run = launcher.folder / "earlier"
    run.mkdir()
    (run / "config.yaml").write_text("")
    code, out, err = forks.run(["launch/train.py", *launcher.words(f"run.dir={run}", "train.batch_size=15")], 2)
    assert code == 1
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == "error: train.batch_size=15 does not divide by 2 ranks: use 14 or 16"
    assert (run / "config.yaml").exists(), "an earlier run was moved aside for a run that never was"

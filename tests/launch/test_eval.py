"""`launch/eval.py`: the metrics of a run, from its ZeRO checkpoint of any stage and number of ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from c4c.training.run_folder import read_config
from c4c.training.screen import EvalReport
from pipelines.config import EVALUATION_SETTINGS, DataConfig
from pipelines.loader import Loader
from shards.demo import shapes
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests.launch.evaluations import metrics_of, validated, without_progress
from tests.launch.runs import ROOT, lines

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
WAYS = ["1 rank", "2 ranks", "2 ranks, ZeRO 2", "2 ranks, ZeRO 3"]


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_and_number_of_ranks_gives_the_runs_own_metrics(way, runs, evaluate, launcher, tmp_path):
    file = tmp_path / "out.json"
    code, out, err = evaluate("--ckpt", runs[way], "--json", file)
    assert (code, err) == (0, "")
    result, run = json.loads(file.read_text()), runs[way]
    assert metrics_of(file) == validated(run, 10)
    assert list(result) == ["t2v", "v2t", "n_texts", "n_videos", "pairs", "checkpoint", "split", "split_digest", "data"]
    assert result["data"] == {name: read_config(run)["data"][name] for name in EVALUATION_SETTINGS}
    last = next(line for line in lines(run / "eval.jsonl") if line["step"] == 10)
    names = {"R1": "R1_pct", "own_first": "own_first_pct", "n_texts": "n_texts", "n_pairs": "n_pairs"}
    assert result["pairs"] == {name: last[f"val/pairs_{key}"] for name, key in names.items()}
    assert (result["checkpoint"], result["split"]) == (str(run / "checkpoints" / "step00000010"), str(launcher.test))
    assert result["split_digest"] == Split(launcher.test).digest
    assert f"checkpoint  {run / 'checkpoints' / 'step00000010'}" in out and f"split       {launcher.test}" in out
    assert "encoded     17 videos in " in out and " clips/s, " in out
    assert list(result["t2v"]) == list(result["v2t"]) == ["R1", "R5", "R10", "MdR", "MnR"]
    assert "17 texts, 17 videos" in out
    assert "text to video" in out
    assert "video to text" in out
    assert f"{result['t2v']['R10']:.1f}" in out


def test_ranks_share_the_work(runs, launcher, forks, tmp_path):
    """17 videos on 3 ranks in batches of 2: the last of one rank is empty. Rank 0 alone prints and writes."""
    run, out, found = runs["1 rank"], tmp_path / "out.json", tmp_path / "ranks.jsonl"
    words = ["--ckpt", run, "--json", out, "--ranks", found, "data.eval_batch_size=2"]
    code, said, err = forks.run(["launch/eval.py", *map(str, words)], 3)
    assert code == 0, err
    assert metrics_of(out) == validated(run, 10)
    assert said.count("text to video") == 1 and f"3 x {launcher.device}" in said
    assert [row["video"] for row in lines(found)] == [Split(launcher.test).video(i).id for i in range(17)]


def test_ids_are_written_as_the_user_wrote_them(runs, evaluate, tmp_path):
    items = shapes.generate(tmp_path / "source", seed=1, train=0, test=3, workers=1)["test"]
    odd = [replace(item, id=f"my phone/{item.id}") for item in items]
    pack(odd, tmp_path / "odd", dataset="demo", split="test", profile=Profile(short_side=64), workers=1)
    found = tmp_path / "ranks.jsonl"
    assert evaluate("--ckpt", runs["1 rank"], "--data", tmp_path / "odd", "--ranks", found)[0] == 0
    assert [row["video"] for row in lines(found)] == [item.id for item in odd]
    data = DataConfig(image_size=64, num_frames=2, threads=1)
    with Loader(Split(tmp_path / "odd"), data, batch_size=3, seed=0, device="cpu") as loader:
        (batch,) = loader.batches(count=1)
    assert sorted(batch.keys) == sorted(item.id for item in odd)


def test_an_evaluation_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("c4c.training.screen._LINE_EVERY_S", 0)
    with EvalReport(on=True) as progress:
        progress.tell("videos", 5, 20)
        progress.tell("videos", 20, 20)
        progress.tell("captions", 7, 7)
        progress.tell("texts", 7, 7)
        progress.tell("pictures", 3, 3)
    first, *_, captions, texts, last = capsys.readouterr().err.splitlines()
    assert first.startswith("5 of 20 videos encoded, ") and captions.startswith("7 of 7 captions encoded, ")
    assert texts.startswith("7 of 7 texts ranked, ") and last.startswith("3 of 3 pictures made, ")
    assert progress.pace.startswith("20 videos in ") and progress.pace.endswith(" clips/s")
    with EvalReport(on=False) as progress:
        progress.tell("videos", 5, 20)
    assert capsys.readouterr().err == ""


def test_an_earlier_checkpoint(runs, evaluate, tmp_path):
    run = runs["2 ranks, ZeRO 2"]
    assert evaluate("--ckpt", run, "--tag", "step00000005", "--json", tmp_path / "out.json")[0] == 0
    assert metrics_of(tmp_path / "out.json") == validated(run, 5) != validated(run, 10)


def test_another_split(runs, evaluate, launcher, tmp_path):
    assert evaluate("--ckpt", runs["1 rank"], "--data", launcher.train, "--json", tmp_path / "out.json")[0] == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["n_texts"], result["n_videos"]) == (200, 40)
    assert result["t2v"]["R10"] > 35  # it was trained on these; chance is 25


def test_as_a_command(runs, tmp_path):
    command = [sys.executable, "launch/eval.py", "--ckpt", str(runs["1 rank"]), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    assert "17 texts, 17 videos" in done.stdout
    assert metrics_of(tmp_path / "out.json") == validated(runs["1 rank"], 10)


def test_help_and_refusals_import_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: print(ended.code, [m for m in ('torch', 'deepspeed', 'open_clip', 'rich') if m in sys.modules])"
    )
    for words, status in (
        (["launch/train.py", "--help"], 0),
        (["launch/eval.py", "--help"], 0),
        (["launch/train.py", "--cfg", "demo.yaml", "train.batchsize=3"], 1),
        (["launch/train.py", "--cfg", "demo.yaml", "deepspeed.gradient_cliping=3"], 1),
        (["launch/train.py", "--cfg", "demo.yaml", "model.backbone=ViT-B-33"], 1),
        (["launch/train.py", "--cfg", "demo.yaml", "data.test="], 1),
        (["launch/eval.py", "--ckpt", "openai:ViT-B-32", "data.num_frame=8"], 1),
        (["launch/eval.py", "--ckpt", "runs/nothing"], 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == f"{status} []", (words, done.stdout, done.stderr)


@pytest.mark.nightly
def test_a_reader_that_leaves_before_the_end_of_what_was_found(runs, tmp_path):
    """`--topk 5 | head -1`: the files are written, and the table is shown."""
    reader, writer = os.pipe()
    os.close(reader)
    files = ["--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "report.html")]
    command = [sys.executable, "launch/eval.py", "--ckpt", str(runs["1 rank"]), "--topk", "5", *files]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 0 and "text to video" in done.stderr and "error" not in done.stderr, done.stderr
    assert (tmp_path / "report.html").is_file() and metrics_of(tmp_path / "out.json") == validated(runs["1 rank"], 10)


def test_standard_output_that_cannot_be_written(runs, tmp_path):
    """The files are written all the same, and the error says what is wrong."""
    out = tmp_path / "out.json"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "launch/eval.py", "--ckpt", str(runs["1 rank"]), "--json", str(out)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert "error: the metrics cannot be printed (No space left on device); --json FILE writes them" in done.stderr
    assert metrics_of(out) == validated(runs["1 rank"], 10)

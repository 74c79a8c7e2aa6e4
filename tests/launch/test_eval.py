"""`launch/eval.py`: the metrics of a run, from its ZeRO checkpoint of any stage and number of ranks."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from c4c.export import export, main
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.evaluate import evaluate as metrics
from c4c.training.screen import EvalReport
from pipelines.config import DataConfig
from pipelines.loader import Loader
from shards.demo import shapes
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests.launch.runs import ROOT, lines

pytestmark = pytest.mark.timeout(1200)  # the first launch in a new environment compiles DeepSpeed's optimizer
WAYS = ["1 rank", "2 ranks", "2 ranks, ZeRO 2", "2 ranks, ZeRO 3"]


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the script in this process, which has imported everything. Returns (exit code, stdout, stderr)."""

    def evaluate(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["launch/eval.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launch" / "eval.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return evaluate


def validated(run, step: int) -> dict:
    """What the run itself wrote after `step`, in the shape that eval.py writes."""
    (line,) = (line for line in lines(run / "eval.jsonl") if line["step"] == step)
    units = {"R1": "pct", "R5": "pct", "R10": "pct", "MdR": "rank", "MnR": "rank"}
    result = {way: {k: line[f"val/{way}_{k}_{unit}"] for k, unit in units.items()} for way in ("t2v", "v2t")}
    return result | {"n_texts": line["val/n_texts"], "n_videos": line["val/n_videos"]}


def metrics_of(file) -> dict:
    """Of what eval.py wrote: without what was evaluated."""
    result = json.loads(file.read_text())
    return {key: result[key] for key in ("t2v", "v2t", "n_texts", "n_videos")}


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_and_number_of_ranks_gives_the_runs_own_metrics(way, runs, evaluate, launcher, tmp_path):
    file = tmp_path / "out.json"
    code, out, err = evaluate("--ckpt", runs[way], "--json", file)
    assert (code, err) == (0, "")
    result, run = json.loads(file.read_text()), runs[way]
    assert metrics_of(file) == validated(run, 10)
    assert list(result) == ["t2v", "v2t", "n_texts", "n_videos", "checkpoint", "split", "split_digest"]
    assert (result["checkpoint"], result["split"]) == (str(run / "checkpoints" / "step00000010"), str(launcher.test))
    assert result["split_digest"] == Split(launcher.test).digest
    assert f"checkpoint  {run / 'checkpoints' / 'step00000010'}" in out and f"split       {launcher.test}" in out
    assert "encoded     17 videos in " in out and " clips/s, " in out
    assert list(result["t2v"]) == list(result["v2t"]) == ["R1", "R5", "R10", "MdR", "MnR"]
    assert "17 texts, 17 videos" in out
    assert "text to video" in out
    assert "video to text" in out
    assert f"{result['t2v']['R10']:.1f}" in out


def test_ranks_of_a_launcher_share_the_work(runs, launcher, tmp_path):
    """17 videos on 3 ranks in batches of 2: the last of one rank is empty. Rank 0 alone prints and writes."""
    run, out, found = runs["1 rank"], tmp_path / "out.json", tmp_path / "ranks.jsonl"
    words = ["--ckpt", run, "--json", out, "--ranks", found, "data.eval_batch_size=2"]
    code, said, err = launcher.finish(launcher.launch(3, "launch/eval.py", *map(str, words)))
    assert code == 0, err
    assert metrics_of(out) == validated(run, 10)
    assert said.count("text to video") == 1 and "3 x cpu" in said
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
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("5 of 20 videos encoded, ") and last.startswith("7 of 7 captions encoded, ")
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
    assert (done.returncode, done.stderr) == (0, "")
    assert "17 texts, 17 videos" in done.stdout
    assert metrics_of(tmp_path / "out.json") == validated(runs["1 rank"], 10)


# ---- what cannot be done ----


def refused(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_folder_that_is_no_run(evaluate, tmp_path):
    assert "is not a run folder: it has no config.yaml" in refused(evaluate("--ckpt", tmp_path))
    assert f"there is no run folder {tmp_path / 'gone'} (looked in " in refused(evaluate("--ckpt", tmp_path / "gone"))


UNREASONABLE = {
    "a folder as a file": (["--json", "/tmp"], "--json /tmp cannot be written: it is a folder"),
    "no such place": (["--json", "/proc/out.json"], "--json /proc/out.json cannot be written: "),
    "ranks to no such place": (["--ranks", "/proc/out.jsonl"], "--ranks /proc/out.jsonl cannot be written: "),
    "ranks of a remote split": (["--ranks", "r.jsonl", "--data", "s3://a/b"], "s3://a/b is remote; copy the split to a disk"),
    "an unknown device": (["--device", "gpu"], "--device gpu: must be cpu, cuda or cuda:N"),
    "a device that is not here": (["--device", "cuda:99"], "--device cuda:99: this machine has "),
    "a typo": (["data.num_frame=8"], "unknown key data.num_frame in the command line: did you mean data.num_frames?"),
    "no such split": (["--data", "nowhere"], "there is no folder nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREASONABLE)
def test_what_cannot_be_done_is_refused_before_the_weights_are_read(name, evaluate, launcher, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("c4c.retrieval.evaluate.open_checkpoint", read)
    words, said = UNREASONABLE[name]
    data = [] if "--data" in words else ["--data", launcher.test]
    assert said in refused(evaluate("--ckpt", "openai:ViT-B-32", *data, *words))


def test_settings_that_do_not_fit_are_refused_before_a_video_is_decoded(
    model, evaluate, launcher, tmp_path, monkeypatch
):
    def decode(*_, **__):
        raise AssertionError("a video was decoded")

    monkeypatch.setattr("c4c.retrieval.evaluate.VideoReader", decode)
    sequence = CLIP4Clip(model.spec, "seqTransf", segments=5)
    export(sequence, tmp_path / "m.safetensors", official=False)
    words = ["--ckpt", tmp_path / "m.safetensors", "--data", launcher.test]
    assert "data.num_frames=78 is more than the 77 frames that the head seqTransf has positions for" in refused(
        evaluate(*words, "data.num_frames=78")
    )
    assert "takes pictures of 64: set data.image_size=64" in refused(
        evaluate(*words, "data.image_size=32", "data.resize=0")
    )
    assert "data.max_words=78 is longer than the 77 tokens" in refused(evaluate(*words, "data.max_words=78"))


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


def test_a_damaged_checkpoint_is_not_evaluated(runs, evaluate, tmp_path):
    run = shutil.copytree(runs["1 rank"], tmp_path / "run")
    file = run / "checkpoints" / "step00000010" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 8
    file.write_bytes(content)
    line = refused(evaluate("--ckpt", run))
    assert f"{file.parent} is damaged: model.safetensors does not match its checksum in state.json" in line
    assert line.endswith("step00000005 is intact: use --tag step00000005")
    assert evaluate("--ckpt", run, "--tag", "step00000005")[0] == 0


def test_an_earlier_checkpoint_is_exported(runs, evaluate, tmp_path, monkeypatch, capsys):
    def exported(*words) -> int:
        monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
        return main()

    run, to = runs["1 rank"], tmp_path / "m.safetensors"
    assert exported("--ckpt", run, "--tag", "step00000005", "--to", to) == 0
    weights, kept = load_file(to), load_file(run / "checkpoints" / "step00000005" / "model.safetensors")
    assert weights.keys() == kept.keys() and all(torch.equal(weights[k], kept[k]) for k in kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    capsys.readouterr()
    for words, said in ((("--ckpt", run, "--tag", "step7", "--to", to), "has no checkpoint step7"),
                        (("--ckpt", to, "--tag", "best", "--to", tmp_path / "n.safetensors"), "is no run folder"),
                        (("--ckpt", run, "--to", "/proc/n.safetensors"), "--to /proc/n.safetensors cannot be written"),
                        (("--ckpt", run, "--to", tmp_path / "n.bin"), "this layout takes the ending .safetensors")):  # fmt: skip
        assert exported(*words) == 1
        assert said in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_an_export_that_does_not_fit_the_disk(runs, tmp_path, monkeypatch, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for words in (["--to", tmp_path / "m.safetensors"], ["--to", tmp_path / "m.bin", "--official"]):
            monkeypatch.setattr("sys.argv", ["export", "--ckpt", str(runs["1 rank"]), *map(str, words)])
            assert main() == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {words[1]} could not be written (") and "is there room on the disk?" in line
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "m.json").write_text('{"R1": 1}')
        monkeypatch.setattr(
            "sys.argv", ["export", "--ckpt", str(runs["1 rank"]), "--to", str(tmp_path / "m.safetensors")]
        )
        assert main() == 1
        assert "m.json, which would replace a file of another kind" in capsys.readouterr().err
        assert (tmp_path / "m.json").read_text() == '{"R1": 1}'
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_run_without_a_checkpoint(evaluate, runs, tmp_path):
    (tmp_path / "config.yaml").write_text((runs["1 rank"] / "config.yaml").read_text())
    assert "holds no checkpoint (no checkpoints/latest): train it first, or for longer" in refused(
        evaluate("--ckpt", tmp_path)
    )


def test_a_checkpoint_that_is_not_there(evaluate, runs):
    line = refused(evaluate("--ckpt", runs["1 rank"], "--tag", "step00000007"))
    assert "has no checkpoint step00000007; it has step00000005, step00000010" in line


def test_a_config_that_does_not_fit_the_weights(evaluate, runs, tmp_path):
    (tmp_path / "checkpoints").symlink_to(runs["1 rank"] / "checkpoints")
    config = (runs["1 rank"] / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("ViT-demo-16", "ViT-S-32-alt"))
    assert "do not fit the model: " in refused(evaluate("--ckpt", tmp_path))


@pytest.mark.parametrize(("text", "said"), [("run: [", "is damaged"), ("train: {speed: 3}", "unknown key train.speed")])
def test_a_config_that_cannot_be_read(text, said, evaluate, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert said in refused(evaluate("--ckpt", tmp_path))


def test_no_such_split(evaluate, runs):
    assert "there is no folder nowhere" in refused(evaluate("--ckpt", runs["1 rank"], "--data", "nowhere"))


# ---- checkpoints that are no run ----


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    spec = {"embed_dim": 64, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text}
    return CLIP4Clip(spec, segments=5).eval()


def test_any_file_of_weights(model, evaluate, launcher, tmp_path):
    """They score as the model they were made of does with the settings that go with them."""
    official = {f"clip.{name}": tensor for name, tensor in model.clip.state_dict().items()}
    torch.save(official, tmp_path / "pytorch_model.bin.4")
    torch.save({"meta": {}, "state_dict": official}, tmp_path / "epoch_5.pth")
    metadata = {
        "c4c": json.dumps({"spec": model.spec, "head": "meanP", "linear_patch": "2d", "blocks": 4, "segments": 5})
    }
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", metadata)
    ways = {
        "pytorch_model.bin.4": DataConfig(num_frames=12, image_size=64, max_words=32),
        "epoch_5.pth": DataConfig(num_frames=12, image_size=64, resize=73, max_words=77, sampling="segment"),
        "model.safetensors": DataConfig(num_frames=5, image_size=64, max_words=77, sampling="segment"),
    }
    quick = model.spec | {"quick_gelu": True}  # what the names of both layouts stand for
    heads = {"pytorch_model.bin.4": "meanP", "epoch_5.pth": "SimpleMeanAdapter"}
    for name, data in ways.items():
        assert open_checkpoint(str(tmp_path / name))[1] == data
        code, _, err = evaluate("--ckpt", tmp_path / name, "--data", launcher.test, "--json", tmp_path / "out.json")
        enlarged = "was packed with a short side of 64 pixels, and data.resize=73 scales it up" if data.resize else ""
        assert code == 0 and enlarged in err and err.count("\n") == bool(enlarged)
        one = CLIP4Clip(quick, heads[name]).eval() if name in heads else model
        one.load_state_dict(model.state_dict())
        expected, _ = metrics(one, one, Split(launcher.test), data, torch.device("cpu"))
        assert metrics_of(tmp_path / "out.json") == expected


def test_a_checkpoint_that_open_clip_names(model, evaluate, launcher, tmp_path, monkeypatch):
    torch.save(model.clip.state_dict(), tmp_path / "fetched.pt")
    monkeypatch.setattr("open_clip.list_pretrained_tags_by_model", lambda backbone: ["small"])
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda backbone, tag: {"quick_gelu": False})
    monkeypatch.setattr("open_clip.download_pretrained", lambda about: str(tmp_path / "fetched.pt"))
    words = ["--ckpt", "small:ViT-demo-16", "--data", launcher.test, "--json", tmp_path / "out.json"]
    assert evaluate(*words, "data.num_frames=5")[0] == 0
    data = DataConfig(num_frames=5, image_size=64)
    expected, _ = metrics(model, model, Split(launcher.test), data, torch.device("cpu"))
    assert metrics_of(tmp_path / "out.json") == expected


def test_checkpoints_that_cannot_be_had(evaluate, launcher, monkeypatch, tmp_path):
    def offline(about):
        raise OSError("no network")

    monkeypatch.setattr("open_clip.download_pretrained", offline)
    line = refused(evaluate("--ckpt", "openai:ViT-B-32", "--data", launcher.test))
    assert "the weights of ViT-B-32 are not here and could not be fetched" in line and "https://" in line
    assert "no such file, folder, or open_clip tag of ViT-B-32; its tags are openai" in refused(
        evaluate("--ckpt", "opennai:ViT-B-32", "--data", launcher.test)
    )
    assert "open_clip knows no such model" in refused(evaluate("--ckpt", "openai:ViT-B-33", "--data", launcher.test))
    assert "gone.bin: there is no such file" in refused(
        evaluate("--ckpt", tmp_path / "gone.bin", "--data", launcher.test)
    )


def test_a_file_needs_to_be_told_the_data(model, evaluate, launcher, tmp_path):
    torch.save({f"clip.{k}": v for k, v in model.clip.state_dict().items()}, tmp_path / "a.bin")
    assert "--data is not given" in refused(evaluate("--ckpt", tmp_path / "a.bin"))
    assert "names a run's checkpoint" in refused(
        evaluate("--ckpt", tmp_path / "a.bin", "--tag", "best", "--data", launcher.test)
    )


def test_nothing_of_another_kind_is_written_over(model, evaluate, launcher, runs, tmp_path):
    torch.save({f"clip.{k}": v for k, v in model.clip.state_dict().items()}, tmp_path / "a.bin")
    before = (tmp_path / "a.bin").read_bytes()
    words = ["--ckpt", tmp_path / "a.bin", "--data", launcher.test]
    for option in ("--json", "--ranks"):
        assert "would replace a file of another kind" in refused(evaluate(*words, option, tmp_path / "a.bin"))
    assert "both name" in refused(
        evaluate(*words, "--json", tmp_path / "b", "--ranks", f"{tmp_path}/../{tmp_path.name}/b")
    )
    assert (tmp_path / "a.bin").read_bytes() == before
    assert "--data is empty" in refused(evaluate("--ckpt", runs["1 rank"], "--data", ""))
    assert "only data.key=value words count here" in refused(evaluate(*words, "train.lr=3"))


def test_standard_output_that_cannot_be_written(runs, tmp_path):
    """The files are written all the same, and the error says what is wrong."""
    out = tmp_path / "out.json"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "launch/eval.py", "--ckpt", str(runs["1 rank"]), "--json", str(out)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert "error: the metrics cannot be printed (No space left on device); --json FILE writes them" in done.stderr
    assert metrics_of(out) == validated(runs["1 rank"], 10)

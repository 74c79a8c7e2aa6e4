"""`launch/eval.py`: checkpoints that are no run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from c4c.export import export
from c4c.merging import NO_MERGING, Merging
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.evaluate import evaluate as evaluated
from c4c.retrieval.work import EvalWork
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer
from shards.split import Split
from tests.c4c.models.small import register
from tests.launch.evaluations import metrics_of, refused

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


def metrics(model: CLIP4Clip, launcher, data: DataConfig) -> dict:
    """Of the test split, by the model that is in memory."""
    work = EvalWork(torch.device(launcher.device))
    found = evaluated(model, model, Split(launcher.test), data, work, tokenizer=Tokenizer()).metrics
    return {key: found[key] for key in ("t2v", "v2t", "n_texts", "n_videos")}


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
        assert open_checkpoint(str(tmp_path / name))[1] == data.filled()
        code, _, err = evaluate("--ckpt", tmp_path / name, "--data", launcher.test, "--json", tmp_path / "out.json")
        enlarged = "was packed with a short side of 64 pixels, and data.resize=73 scales it up" if data.resize else ""
        assert code == 0 and enlarged in err and err.count("\n") == bool(enlarged)
        one = CLIP4Clip(quick, heads[name]).eval() if name in heads else model
        one.load_state_dict(model.state_dict())
        expected = metrics(one, launcher, data)
        assert metrics_of(tmp_path / "out.json") == expected


def test_merging_is_the_checkpoints_or_what_is_asked_for(model, evaluate, launcher, tmp_path):
    data = DataConfig(num_frames=5, image_size=64, max_words=77)
    ways = {"plain": NO_MERGING, "merging": Merging(tokens=3, joins=(1,))}
    expected = {}
    for name, merging in ways.items():
        one = CLIP4Clip(model.spec, segments=5, merging=merging).eval()
        one.load_state_dict(model.state_dict())
        export(one, tmp_path / f"{name}.safetensors", "c4c", data)
        expected[name] = metrics(one, launcher, data)
    assert expected["plain"] != expected["merging"]
    to = tmp_path / "out.json"
    for name, words, same, line in (
        ("merging", [], "merging", "tokens of a frame; clips joined by twos before blocks 1, as the checkpoint says"),
        (
            "plain",
            ["--merge", "3", "--merge-frames", "1"],
            "merging",
            "each block merges 3 tokens of a frame; clips joined",
        ),
        ("merging", ["--merge", "0"], "plain", "merging     none, by --merge, whatever the checkpoint says"),
    ):
        code, out, err = evaluate(
            "--ckpt", tmp_path / f"{name}.safetensors", "--data", launcher.test, "--json", to, *words
        )
        assert (code, err) == (0, "") and line in out
        assert metrics_of(to) == expected[same]
        assert json.loads(to.read_text())["merge"] == ways[same].tokens


def test_a_checkpoint_that_open_clip_names(model, evaluate, launcher, tmp_path, monkeypatch):
    torch.save(model.clip.state_dict(), tmp_path / "fetched.pt")
    monkeypatch.setattr("open_clip.list_pretrained_tags_by_model", lambda backbone: ["small"])
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda backbone, tag: {"quick_gelu": False})
    register(monkeypatch, "small-64", model.spec)
    monkeypatch.setattr("open_clip.download_pretrained", lambda about: str(tmp_path / "fetched.pt"))
    words = ["--ckpt", "small:small-64", "--data", launcher.test, "--json", tmp_path / "out.json"]
    assert evaluate(*words, "data.num_frames=5")[0] == 0
    data = DataConfig(num_frames=5, image_size=64, max_words=32)
    expected = metrics(model, launcher, data)
    assert metrics_of(tmp_path / "out.json") == expected


def test_bare_weights_need_a_backbone(model, evaluate, launcher, tmp_path, monkeypatch):
    """Those of a GELU model in open_clip's names: the named backbone's activation, heads and pixels; and the same from its folder."""
    register(monkeypatch, "small-64", model.spec)
    save_file({k: v.contiguous() for k, v in model.clip.state_dict().items()}, tmp_path / "hub.safetensors")
    words = ["--ckpt", tmp_path / "hub.safetensors", "--data", launcher.test, "--json", tmp_path / "out.json"]
    line = refused(evaluate(*words))
    assert "Name the backbone they were trained as: --backbone NAME" in line and "small-64" in line
    assert evaluate(*words, "--backbone", "small-64", "data.num_frames=5")[0] == 0
    data = DataConfig(num_frames=5, image_size=64, max_words=32)
    expected = metrics(model, launcher, data)
    assert metrics_of(tmp_path / "out.json") == expected
    export(model, tmp_path / "folder", "open_clip")
    words[1] = f"local-dir:{tmp_path / 'folder'}"
    assert evaluate(*words, "data.num_frames=5")[0] == 0
    assert metrics_of(tmp_path / "out.json") == expected
    assert "names its backbone itself" in refused(evaluate(*words, "--backbone", "small-64"))


def test_a_checkpoints_own_file_scores_as_the_run_does(runs, evaluate, launcher, tmp_path):
    """It does not say what it is of; the run folder around it does. Outside of it, it is refused."""
    run = runs["1 rank"]
    file = run / "checkpoints" / "step00000005" / "model.safetensors"
    assert evaluate("--ckpt", run, "--tag", "step00000005", "--json", tmp_path / "a.json")[0] == 0
    assert evaluate("--ckpt", file, "--json", tmp_path / "b.json")[0] == 0
    assert metrics_of(tmp_path / "a.json") == metrics_of(tmp_path / "b.json")
    assert "leave one of them away" in refused(evaluate("--ckpt", file, "--tag", "step00000010"))
    shutil.copy(file, tmp_path / "model.safetensors")
    line = refused(evaluate("--ckpt", tmp_path / "model.safetensors", "--data", launcher.test))
    assert "was taken out of its run folder. Give the run folder" in line


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

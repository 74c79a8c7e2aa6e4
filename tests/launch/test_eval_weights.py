"""`launch/eval.py`: checkpoints that are no run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.evaluate import evaluate as metrics
from pipelines.config import DataConfig
from shards.split import Split
from tests.launch.evaluations import metrics_of, refused

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


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
        expected, _ = metrics(one, one, Split(launcher.test), data, torch.device(launcher.device))
        assert metrics_of(tmp_path / "out.json") == expected


def test_a_checkpoint_that_open_clip_names(model, evaluate, launcher, tmp_path, monkeypatch):
    torch.save(model.clip.state_dict(), tmp_path / "fetched.pt")
    monkeypatch.setattr("open_clip.list_pretrained_tags_by_model", lambda backbone: ["small"])
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda backbone, tag: {"quick_gelu": False})
    monkeypatch.setattr("open_clip.download_pretrained", lambda about: str(tmp_path / "fetched.pt"))
    words = ["--ckpt", "small:ViT-demo-16", "--data", launcher.test, "--json", tmp_path / "out.json"]
    assert evaluate(*words, "data.num_frames=5")[0] == 0
    data = DataConfig(num_frames=5, image_size=64)
    expected, _ = metrics(model, model, Split(launcher.test), data, torch.device(launcher.device))
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

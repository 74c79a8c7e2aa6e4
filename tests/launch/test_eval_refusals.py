"""`launch/eval.py` and `python -m c4c.export`: what cannot be done is refused in one sentence."""

import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from c4c.export import export, main
from c4c.models.clip4clip import CLIP4Clip
from tests.launch.evaluations import refused

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


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
    "merging of a negative number": (["--merge", "-1"], "--merge -1: must be 0, which merges nothing, or more"),
    "joins without merging": (["--merge-frames", "1"], "give --merge too"),
    "joins that are no numbers": (["--merge", "1", "--merge-frames", "a"], "--merge-frames a: must be numbers of blocks"),
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

    monkeypatch.setattr("c4c.retrieval.features.EvalLoader", decode)
    sequence = CLIP4Clip(model.spec, "seqTransf", segments=5)
    export(sequence, tmp_path / "m.safetensors")
    words = ["--ckpt", tmp_path / "m.safetensors", "--data", launcher.test]
    assert "data.num_frames=78 is more than the 77 frames that the head seqTransf has positions for" in refused(
        evaluate(*words, "data.num_frames=78")
    )
    assert "patches of 16 pixels, and 40 is no multiple of that" in refused(
        evaluate(*words, "data.image_size=40", "data.resize=0")
    )
    assert "data.max_words=78 is longer than the 77 tokens" in refused(evaluate(*words, "data.max_words=78"))


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
def test_an_export_that_does_not_fit_the_disk(runs, model, tmp_path, monkeypatch, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        to = tmp_path / "m.safetensors"
        monkeypatch.setattr("sys.argv", ["export", "--ckpt", str(runs["1 rank"]), "--to", str(to)])
        assert main() == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {to} could not be written (") and "is there room on the disk?" in line
        with pytest.raises(OSError, match=r"m\.bin could not be written .*is there room on the disk\?"):
            export(CLIP4Clip(model.spec | {"quick_gelu": True}, segments=5), tmp_path / "m.bin", "official")
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


def test_a_run_whose_data_lie_elsewhere(evaluate, runs, tmp_path):
    config = (runs["1 rank"] / "config.yaml").read_text()
    before = next(line for line in config.splitlines() if line.strip().startswith("test:"))
    (tmp_path / "config.yaml").write_text(config.replace(before, "  test: data/none/test"))
    line = refused(evaluate("--ckpt", tmp_path))
    assert f"data.test of {tmp_path}: there is no folder data/none/test" in line
    assert line.endswith("If it lies elsewhere, name it with --data")
    assert "name it with --data" not in refused(evaluate("--ckpt", tmp_path, "--data", tmp_path / "none"))


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

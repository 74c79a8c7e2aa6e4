"""What `python -m c4c.export` writes, read back by the library that it is for."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from c4c import backbones
from c4c.export import export, main, run
from c4c.models import backbone
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.models.pretrained import open_checkpoint
from pipelines.config import DataConfig
from tests import tiny_backbones
from tests.c4c.models.small import FAMILIES, SPEC, clips, register, scores, spec, tiny
from tests.c4c.retrieval.test_encoder import as_run

pytestmark = pytest.mark.slow

DATA = DataConfig(num_frames=3, sampling="tail", image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear",
                  resize_mode="squash", max_words=9)  # fmt: skip
UNOFFICIAL = ("TransformerAdapter", "SimpleMeanAdapter")  # which the official code does not know


@pytest.mark.parametrize("head", sorted(HEADS))
def test_one_file_and_back(head, tmp_path):
    model = tiny(head)
    export(model, tmp_path / "m.safetensors")
    notes = export(model, tmp_path / "m.bin", "official")
    assert any(f"no head {head}:" in note for note in notes) == (head in (*UNOFFICIAL, "wti", "seqWTI"))
    assert any("--agg_module seqTransf --interaction wti" in note for note in notes) == (head == "seqWTI")
    assert json.loads((tmp_path / "m.json").read_text())["head"] == head
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "m.safetensors")), scores(model))
    if head not in UNOFFICIAL:
        assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "m.bin")), scores(model))


def test_it_says_which_checkpoint_it_wrote(tmp_path, monkeypatch, capsys):
    run, to = tmp_path / "run", tmp_path / "m.safetensors"
    tiny_backbones.register()
    export(tiny(spec=backbone.named("tiny-vit")), tmp_path / "tiny.safetensors", data=DataConfig(image_size=64))
    as_run(tmp_path / "tiny.safetensors", run)
    words = ["export", "--ckpt", str(run), "--to", str(to)]
    monkeypatch.setattr("sys.argv", [*words, "--tag", "best"])
    assert main() == 1
    line = capsys.readouterr().err
    assert "leave the tag away, which takes the latest, or name one of step00000007" in line and not to.exists()
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    assert "meanP, 2d, step00000007, " in capsys.readouterr().out
    rows = [{"step": step, "val/t2v_R1_pct": r1} for step, r1 in ((3, 30.0), (7, 20.0))]
    (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", [*words, "--tag", "best"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "meanP, 2d, step00000007, " in said and "step00000003 was better (30.0) and is gone" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_any_towers_and_back(family, tmp_path):
    """With the settings that it was trained with, but for where the data lies."""
    model = tiny("seqTransf", spec=FAMILIES[family])
    data = DATA.filled() if model.image_size == 32 else DataConfig(image_size=64, num_frames=3).filled()
    export(model, tmp_path / "m.safetensors", data=data)
    again, read = open_checkpoint(str(tmp_path / "m.safetensors"))
    assert torch.equal(scores(again), scores(model))
    assert read == data


def test_the_command_says_what_a_layout_of_another_program_leaves_out(tmp_path):
    data = DataConfig(num_frames=4, sampling="tail", frame_order="reverse", max_words=12, paragraph=True)
    export(tiny(), tmp_path / "m.safetensors", "c4c", data)
    for name in ("official", "open_clip"):
        notes = run(str(tmp_path / "m.safetensors"), None, tmp_path / name, name)[2]
        assert notes[-1].endswith(
            "evaluate it with data.num_frames=4 data.max_words=12 data.sampling=tail data.frame_order=reverse data.paragraph=true"
        )
    assert not any(
        "evaluate it with" in note for note in run(str(tmp_path / "m.safetensors"), None, tmp_path / "n.safetensors")[2]
    )


def folder_and_back(model: CLIP4Clip, folder):
    """(image features, text features) by open_clip's own loading, and by c4c."""
    export(model, folder, "open_clip")
    own = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False).eval()
    frames, mask, tokens = clips(model)
    with torch.no_grad():
        padded = torch.nn.functional.pad(tokens, (0, model.context_length - tokens.shape[1]))
        return [(own.encode_image(frames[:, 0]), model.encode_video(frames[:, :1], mask[:, :1])[:, 0]),
                (own.encode_text(padded), model.encode_text(tokens))]  # fmt: skip


@pytest.mark.parametrize("name", tiny_backbones.NAMES)
def test_a_folder_that_open_clip_loads(name, tmp_path):
    """Of every family; the same weights without the folder's config, and in one file of c4c's, give the same scores."""
    tiny_backbones.register()
    model = tiny(spec=backbone.named(name))
    for theirs, ours in folder_and_back(model, tmp_path / "out"):
        assert ours.std() > 1e-3
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    again, data = open_checkpoint(str(tmp_path / "out"))
    assert torch.equal(scores(again), scores(model))
    assert data.image_size == tiny_backbones.SIZE
    again, _ = open_checkpoint(str(tmp_path / "out" / "open_clip_model.safetensors"), backbone=name)
    assert torch.equal(scores(again), scores(model))
    export(model, tmp_path / "m.safetensors", data=data)
    again, told = open_checkpoint(str(tmp_path / "m.safetensors"))
    assert torch.equal(scores(again), scores(model)) and told == data


def test_the_folder_says_how_pictures_are_made(tmp_path):
    notes = export(tiny(), tmp_path / "out", "open_clip", DATA)
    assert notes == ["meanP: a video is the normalised mean of its frames' normalised features"]
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    about = transform.transforms
    assert (about[-1].mean, about[-1].std) == ([0.5] * 3, [0.25] * 3)
    assert about[0].size == (32, 32) and about[0].interpolation.value == "bilinear"
    larger = DataConfig(image_size=32, resize=40)
    assert "scaled to 40 before the crop of 32" in export(tiny(), tmp_path / "larger", "open_clip", larger)[1]


def test_pictures_of_another_size_in_the_folder(tmp_path):
    model = tiny(spec=FAMILIES["ViT"])
    model.resize_pictures(48)
    for theirs, ours in folder_and_back(model, tmp_path / "out"):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_what_those_folders_cannot_hold_is_refused(layout, tmp_path):
    for head in sorted(HEADS.keys() - {"meanP", "SimpleMeanAdapter"}):
        with pytest.raises(ValueError, match=f"the weights of the head {head} would be lost: use --format c4c"):
            export(tiny(head), tmp_path / "out", layout)
    with pytest.raises(ValueError, match=r"no place for patches that span three frames \(model.linear_patch=3d\)"):
        export(tiny(patch="3d"), tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quick_gelu": False}, "the activation GELU:"),
        ({"vision_cfg": SPEC["vision_cfg"] | {"head_width": 32}}, "image attention heads of width 32:"),
        ({"text_cfg": SPEC["text_cfg"] | {"heads": 2}}, "text attention heads of width 32:"),
        ({"text_cfg": SPEC["text_cfg"] | {"pool_type": "eos", "eos_id": 7}}, "pool_type=eos of its text tower"),
        ({"text_cfg": SPEC["text_cfg"] | {"no_causal_mask": True}}, "no_causal_mask=True of its text tower"),
        ({"vision_cfg": SPEC["vision_cfg"] | {"norm_kwargs": {"eps": 1e-3}}}, "norm_kwargs=.* of its image tower"),
        ({"vision_cfg": SPEC["vision_cfg"] | {"no_ln_pre": True}}, "no_ln_pre=True of its image tower"),
        ({"tokenizer": {"kind": "clip", "kwargs": {"clean": "canonicalize"}}}, "another tokenizer than CLIP's"),
        (FAMILIES["ConvNeXt"], "towers that are not a plain ViT"),
        (FAMILIES["ResNet"], "towers that are not a plain ViT"),
        (FAMILIES["custom text"], "towers that are not a plain ViT"),
    ],
)
def test_a_model_that_the_official_layout_would_change_is_refused(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export(CLIP4Clip(spec(**change), segments=4), tmp_path / "m.bin", "official")
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_the_official_layout_does_not_say_are_noted(tmp_path):
    assert export(tiny(), tmp_path / "m.bin", "official") == []
    (note,) = export(tiny(), tmp_path / "m.bin", "official", DATA)
    assert "mean=(0.5, 0.5, 0.5)" in note and "resize_mode=squash" in note


def test_a_bias_that_a_layout_does_not_have_is_left_out(tmp_path):
    """A model of CLIP's that was trained with the sigmoid loss."""
    model = tiny()
    model.add_bias(-3.0)
    export(model, tmp_path / "m.bin", "official")
    assert torch.allclose(scores(CLIP4Clip.from_checkpoint(tmp_path / "m.bin")), scores(model))
    assert "has no logit_bias, which is left out" in export(model, tmp_path / "transformers", "transformers")[1]
    assert torch.allclose(scores(CLIP4Clip.from_checkpoint(tmp_path / "transformers")), scores(model))
    export(model, tmp_path / "open_clip", "open_clip")
    assert CLIP4Clip.from_checkpoint(tmp_path / "open_clip").bias() == -3.0
    export(model, tmp_path / "m.safetensors")
    assert CLIP4Clip.from_checkpoint(tmp_path / "m.safetensors").bias() == -3.0


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_exported_files_have_the_usual_mode(umask, tmp_path):
    before = os.umask(umask)
    try:
        export(tiny(), tmp_path / "m.safetensors")
        export(tiny(), tmp_path / "m.bin", "official")
        export(tiny(), tmp_path / "out", "open_clip")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs it; returns (exit code, what it printed)."""

    def command(*words):
        monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
        code = main()
        out = capsys.readouterr()
        return code, out.out + out.err

    return command


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("c4c.models.pretrained.open_checkpoint", read)


def test_what_cannot_be_written_is_refused_before_weights_are_read(command, no_weights, tmp_path):
    there = tmp_path / "m.safetensors"
    export(tiny(), there)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, said in (
        (["--to", tmp_path / "new" / "m.safetensors"], f"there is no folder {tmp_path / 'new'}"),
        (["--to", tmp_path / "new" / "out", "--format", "open_clip"], f"there is no folder {tmp_path / 'new'}"),
        (
            ["--to", tmp_path / "m.bin"],
            "this layout takes the ending .safetensors; for another layout name --format: official",
        ),
        (["--to", tmp_path / "n.safetensors", "--official"], "the official layout takes any ending but .safetensors"),
        (
            ["--to", tmp_path / "m.onnx", "--format", "onnx"],
            "--format onnx writes a folder; name one, without an ending",
        ),
        (["--to", there / "out", "--format", "onnx"], f"{there} is not a folder"),
        (["--to", tmp_path / "full", "--format", "transformers"], "is a folder with other files in it"),
        (["--to", tmp_path / "n.safetensors", "--half"], "--half is for --format onnx"),
        (["--to", tmp_path / "out", "--official", "--format", "onnx"], "name two layouts"),
    ):
        code, text = command("--ckpt", there, *words)
        assert code == 1 and said in text and text.startswith("error: ") and text.count("\n") == 1, words
    assert command("--ckpt", tmp_path / "gone.pt", "--to", tmp_path / "n.safetensors")[1].startswith("error: --ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "m.json", "m.safetensors"]


def test_the_command_names_the_backbone_of_a_bare_file(command, tmp_path, monkeypatch):
    register(monkeypatch, "tiny", spec(quick_gelu=False))
    torch.save(tiny().clip.state_dict(), tmp_path / "bare.pt")
    words = ["--ckpt", tmp_path / "bare.pt", "--to", tmp_path / "out", "--format", "open_clip"]
    code, text = command(*words)
    assert code == 1 and "Name the backbone they were trained as: --backbone NAME" in text and "tiny" in text
    code, text = command(*words, "--backbone", "tiny")
    assert code == 0 and text.startswith(f"{tmp_path / 'out'}: meanP, 2d, ")
    assert not backbone.named(f"local-dir:{tmp_path / 'out'}")["quick_gelu"]
    kept = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in tiny().clip.state_dict().items())
    code, _ = command(*words, "--backbone", "tiny")  # once more, over its own files
    assert code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["bare.pt", "out"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (ModuleNotFoundError(name="onnx"), 1, "error: the package onnx is not installed"),
    ],
)
def test_ctrl_c_and_a_missing_package_are_told_in_a_line(error, code, said, tmp_path, monkeypatch, capsys):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("c4c.models.pretrained.open_checkpoint", failing)
    (tmp_path / "a.bin").write_text("")
    monkeypatch.setattr(
        "sys.argv", ["export", "--ckpt", str(tmp_path / "a.bin"), "--to", str(tmp_path / "m.safetensors")]
    )
    assert main() == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    monkeypatch.setattr("c4c.backbones.chosen", failing)
    assert backbones.main(["ViT-B-32"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)

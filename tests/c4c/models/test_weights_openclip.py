"""open_clip's weights: what their names do not tell comes from the backbone that is named, or from the folder's config."""

import json
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from c4c.config import Config
from c4c.export import export
from c4c.models import backbone
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.pretrained import open_checkpoint
from c4c.models.weights import read, read_backbone
from c4c.models.weights.base import Unsaid
from c4c.settings import ModelConfig
from tests.c4c.models.small import FAMILIES, SPEC, clip_state, register, scores, spec, tiny

pytestmark = pytest.mark.slow

GELU = spec(quick_gelu=False)
CUSTOM = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


@pytest.fixture
def files(tmp_path):
    """The same weights as open_clip's users have them."""
    state = clip_state()
    save_file(state, tmp_path / "hub.safetensors")
    torch.save(state, tmp_path / "hub.bin")
    torch.save(
        {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_3.pt"
    )
    torch.save(
        {"state_dict": {f"text.{k}" if k.startswith(CUSTOM) else k: v for k, v in state.items()}}, tmp_path / "text.pt"
    )
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("quick", [True, False])
def test_the_named_backbone_decides_the_activation(quick, files, monkeypatch):
    register(monkeypatch, "tiny", spec(quick_gelu=quick))
    expected = scores(tiny(spec=spec(quick_gelu=quick)))
    assert not torch.equal(expected, scores(tiny(spec=spec(quick_gelu=not quick))))
    assert len(files) == 4
    for file in files:
        assert torch.equal(scores(CLIP4Clip.from_checkpoint(file, backbone="tiny")), expected), file.name
        assert torch.equal(scores(open_checkpoint(str(file), backbone="tiny")[0]), expected), file.name
        config = ModelConfig(backbone="tiny", init_from=str(file))
        assert torch.equal(scores(build(config, 4, 32).eval()), expected), file.name


def test_without_a_backbone_the_question_goes_back_and_names_those_of_the_size(files, monkeypatch):
    register(monkeypatch, "tiny", SPEC)
    register(monkeypatch, "tiny-gelu", GELU)
    register(monkeypatch, "larger", spec(embed_dim=32))
    for file in files:
        with pytest.raises(
            Unsaid, match=r"--backbone NAME, in training model\.backbone=NAME\. Of this size are tiny, tiny-gelu$"
        ):
            read(file)
    monkeypatch.undo()
    with pytest.raises(Unsaid, match="No backbone that open_clip knows has this size"):
        read(files[0])


@pytest.mark.parametrize("family", ["ResNet", "custom text", "CoCa", "ConvNeXt"])
def test_the_question_names_backbones_of_every_family(family, tmp_path, monkeypatch):
    register(monkeypatch, "mine", FAMILIES[family])
    torch.save(tiny(spec=FAMILIES[family]).clip.state_dict(), tmp_path / "a.pt")
    with pytest.raises(Unsaid, match=r"Of this size are mine$"):
        read(tmp_path / "a.pt")


def test_heads_come_from_the_backbone(tmp_path, monkeypatch):
    """Two models of the same tensors, one with heads as wide as OpenAI's and one with others, as ViT-H-14 has."""
    narrow = spec(vision_cfg=SPEC["vision_cfg"] | {"head_width": 32}, text_cfg=SPEC["text_cfg"] | {"heads": 4})
    register(monkeypatch, "narrow", narrow)
    torch.save(clip_state(), tmp_path / "a.pt")
    expected = scores(tiny(spec=narrow))
    assert not torch.allclose(expected, scores(tiny()), atol=1e-4)
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "a.pt", backbone="narrow")), expected)
    official = {f"clip.{k}": v for k, v in clip_state().items()}
    torch.save(official, tmp_path / "pytorch_model.bin.0")
    with pytest.raises(Unsaid, match="as large as those of narrow, whose attention heads are not 64 wide"):
        read(tmp_path / "pytorch_model.bin.0")
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "pytorch_model.bin.0", backbone="narrow")), expected)


def test_another_backbone_than_the_weights_are_of_is_refused(files, monkeypatch):
    """Both in open_clip's names and in the official ones: nothing is guessed from the shapes."""
    register(monkeypatch, "other", spec(embed_dim=32))
    torch.save({f"clip.{k}": v for k, v in clip_state().items()}, files[0].with_name("pytorch_model.bin.0"))
    for file in (*files, files[0].with_name("pytorch_model.bin.0")):
        with pytest.raises(ValueError, match=r"has feature size 64; other has feature size 32: name the backbone that"):
            read(file, "other")
        with pytest.raises(ValueError, match=r"has feature size 64; model\.backbone=other has feature size 32"):
            build(ModelConfig(backbone="other", init_from=str(file)), 4, 32)


def test_weights_for_pictures_of_another_size_keep_the_heads_that_are_named(tmp_path, monkeypatch):
    narrow = spec(
        quick_gelu=False, vision_cfg=SPEC["vision_cfg"] | {"head_width": 16}, text_cfg=SPEC["text_cfg"] | {"heads": 4}
    )
    register(monkeypatch, "narrow", narrow)
    large = tiny(spec=narrow | {"vision_cfg": narrow["vision_cfg"] | {"image_size": 48}})
    torch.save(large.clip.state_dict(), tmp_path / "large.pt")
    again, data = open_checkpoint(str(tmp_path / "large.pt"), backbone="narrow")
    assert torch.equal(scores(again), scores(large)) and (again.image_size, data.image_size) == (48, 48)
    assert torch.equal(
        scores(build(ModelConfig(backbone="narrow", init_from=str(tmp_path / "large.pt")), 4).eval()), scores(large)
    )


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14"])
def test_the_huge_ones_are_known_by_their_heads(name):
    known = backbone.named(name)
    assert known["vision_cfg"]["head_width"] != 64


def test_a_gelu_backbone_for_weights_that_are_quickgelu_is_pointed_out(tmp_path, monkeypatch):
    register(monkeypatch, "tiny", GELU)
    torch.save({f"clip.{k}": v for k, v in clip_state().items()}, tmp_path / "pytorch_model.bin.0")
    with pytest.warns(
        UserWarning, match=r"weights of the official CLIP4Clip have QuickGELU, which is used: .* ends in -quickgelu"
    ):
        model = CLIP4Clip.from_checkpoint(tmp_path / "pytorch_model.bin.0", backbone="tiny")
    assert torch.equal(scores(model), scores(tiny()))


def test_layouts_of_open_clips_earlier_days(tmp_path, monkeypatch):
    """Text towers that became a module of their own, shapes of numbers, leftovers: as open_clip's load_checkpoint takes them."""
    family = FAMILIES["custom text"] | {"init_logit_bias": -10.0}
    register(monkeypatch, "custom", family)
    model = tiny(spec=family)
    state = model.clip.state_dict()
    old = {k.removeprefix("text."): v for k, v in state.items()}
    old |= {
        "logit_scale": state["logit_scale"].reshape(1),
        "logit_bias": state["logit_bias"].reshape(1),
    }
    torch.save(old, tmp_path / "old.pt")
    again = CLIP4Clip.from_checkpoint(tmp_path / "old.pt", backbone="custom")
    assert torch.equal(scores(again), scores(model)) and torch.equal(again.clip.logit_bias, state["logit_bias"])
    own = open_clip.CustomTextCLIP(**{k: v for k, v in family.items() if k != "custom_text"})
    open_clip.load_checkpoint(own, str(tmp_path / "old.pt"))
    assert all(torch.equal(v, again.clip.state_dict()[k]) for k, v in own.state_dict().items())
    torch.save(old | {"attn_mask": torch.ones(16, 16)}, tmp_path / "older.pt")
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "older.pt", backbone="custom")), scores(model))
    torch.save({k: v for k, v in state.items() if k != "logit_bias"}, tmp_path / "clip.pt")
    assert CLIP4Clip.from_checkpoint(tmp_path / "clip.pt", backbone="custom").clip.logit_bias == 0


def test_cocas_decoder_is_left_out_with_a_word(tmp_path, monkeypatch):
    register(monkeypatch, "coca", FAMILIES["CoCa"])
    model = tiny(spec=FAMILIES["CoCa"])
    torch.save(model.clip.state_dict() | {"text_decoder.ln_final.weight": torch.ones(3)}, tmp_path / "coca.pt")
    with pytest.warns(UserWarning, match="CoCa's text decoder is left out"):
        again = CLIP4Clip.from_checkpoint(tmp_path / "coca.pt", backbone="coca")
    assert torch.equal(scores(again), scores(model))


def folder_of(model, folder, **pictures):
    """As open_clip's push_to_hf_hub writes it."""
    folder.mkdir()
    save_file(
        {k: v.clone().contiguous() for k, v in model.clip.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model.spec, "preprocess_cfg": pictures}))
    return folder


def test_a_folder_of_open_clips_needs_no_name(tmp_path, monkeypatch):
    """Activation, heads and pixels are those of its config, in evaluation and in training."""
    model = tiny(spec=GELU)
    pictures = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    folder = folder_of(model, tmp_path / "mine", **pictures)
    for name in (str(folder), f"local-dir:{folder}"):
        again, data = open_checkpoint(name)
        assert torch.equal(scores(again), scores(model))
        assert (data.mean, data.std, data.interpolation, data.resize_mode) == (
            (0.5,) * 3,
            (0.25,) * 3,
            "bilinear",
            "squash",
        )
        assert (data.image_size, data.max_words) == (32, 32)
        config = ModelConfig(backbone=f"local-dir:{folder}", init_from="" if "local" in name else name)
        trained = build(config, 4, 32).eval()
        assert torch.equal(scores(trained), scores(model))
        register(monkeypatch, "mine", GELU)
        for model_config in (config, ModelConfig(backbone="mine", init_from=str(folder))):
            settled = backbone.settled(Config(model=model_config)).data
            assert (settled.mean, settled.resize_mode, settled.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    export(model, tmp_path / "m.safetensors", data=settled)
    told = backbone.settled(Config(model=ModelConfig(backbone="mine", init_from=str(tmp_path / "m.safetensors")))).data
    assert (told.mean, told.resize_mode, told.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    register(monkeypatch, "other", spec(embed_dim=32))
    with pytest.raises(
        ValueError, match=r"has feature size 64; model\.backbone=other has feature size 32: set model\.backbone=mine"
    ):
        build(ModelConfig(backbone="other", init_from=str(folder)), 4, 32)
    with pytest.raises(ValueError, match="names its backbone itself"):
        open_checkpoint(f"local-dir:{folder}", backbone="ViT-B-32")
    alone, _ = open_checkpoint(str(folder / "open_clip_model.safetensors"))  # its config is beside it
    assert torch.equal(scores(alone), scores(model))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="but no weights"):
        open_checkpoint(str(folder))


def test_a_folder_whose_config_is_of_other_weights_is_refused(tmp_path):
    """Else its heads, activation and pixels would be guessed from the tensors."""
    model = tiny(spec=GELU)
    folder = folder_of(model, tmp_path / "mine")
    about = spec(quick_gelu=False, text_cfg=SPEC["text_cfg"] | {"context_length": 32})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    for name in (str(folder), f"local-dir:{folder}", str(folder / "open_clip_model.safetensors")):
        with pytest.raises(ValueError, match=r"has words 77; local-dir:.* has words 32: that open_clip_config\.json"):
            open_checkpoint(name)


def test_tags_keep_their_activation_and_pixels(tmp_path, monkeypatch):
    torch.save(clip_state(), tmp_path / "fetched.pt")
    register(monkeypatch, "tiny", GELU)
    about = {"url": "x", "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash", "quick_gelu": True}
    monkeypatch.setattr("open_clip.list_pretrained_tags_by_model", lambda name: ["mine"])
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda name, tag: about)
    monkeypatch.setattr("open_clip.download_pretrained", lambda about: str(tmp_path / "fetched.pt"))
    model, data = open_checkpoint("mine:tiny")
    assert torch.equal(scores(model), scores(tiny()))
    assert (data.mean, data.std, data.resize_mode) == ((0.5,) * 3, (0.5,) * 3, "squash")
    assert read_backbone("tiny", "mine").spec["preprocess_cfg"]["resize_mode"] == "squash"
    with pytest.raises(ValueError, match="names its backbone itself"):
        open_checkpoint("mine:tiny", backbone="tiny")
    # the file alone may be of that tag, or of none
    for opened in (
        lambda file: open_checkpoint(str(file), backbone="tiny"),
        lambda file: read_backbone("tiny", str(file)),
    ):
        with pytest.warns(UserWarning, match=r"fetched\.pt does not say .* used with GELU.* \(mine: QuickGELU.*squash"):
            opened(tmp_path / "fetched.pt")


def test_a_file_beside_a_config_is_of_it_whatever_is_named(tmp_path, monkeypatch):
    register(monkeypatch, "tiny", SPEC)
    about = {"model_cfg": GELU, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    torch.save(clip_state(), tmp_path / "mine.pt")
    config = ModelConfig(backbone="tiny", init_from=str(tmp_path / "mine.pt"))
    data = backbone.settled(Config(model=config)).data
    assert (data.mean, data.resize_mode) == ((0.5,) * 3, "squash")
    expected = scores(tiny(spec=GELU))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = build(config, 4, 32).eval()
        model, data = open_checkpoint(config.init_from, backbone="tiny")
    assert torch.equal(scores(trained), expected) and torch.equal(scores(model), expected)
    assert (data.mean, data.resize_mode) == ((0.5,) * 3, "squash")
    export(tiny(), tmp_path / "own.safetensors")  # which says what it is itself
    assert torch.equal(scores(open_checkpoint(str(tmp_path / "own.safetensors"))[0]), scores(tiny()))


def test_what_cannot_be_fetched_names_the_way():
    with pytest.raises(ValueError, match=r"could not be fetched .* local-dir:"):
        open_checkpoint("hf-hub:nobody/nothing")


def test_big_visions_arrays_need_a_backbone(tmp_path, monkeypatch):
    import numpy as np

    np.savez(tmp_path / "a.npz", a=np.zeros(1))
    register(monkeypatch, "tiny", SPEC)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no weights of big_vision for these towers"):
        read(tmp_path / "a.npz", "tiny")

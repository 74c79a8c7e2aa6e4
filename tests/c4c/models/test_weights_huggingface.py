"""transformers' CLIP and SigLIP, loaded and written: both libraries compute the same features."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import _create_vision_transformer
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

from c4c.export import export
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.pretrained import open_checkpoint
from c4c.models.weights import read
from c4c.models.weights.base import Unsaid
from c4c.models.weights.huggingface import spec_of, stated, timm_name
from c4c.settings import ModelConfig
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer, clips_tokenizer
from tests import vocabularies
from tests.c4c.models.small import SPEC, register, spec, tiny

pytestmark = pytest.mark.slow

WORDS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                         "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99}  # fmt: skip
PICTURES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
                            "image_size": 32, "patch_size": 16}  # fmt: skip
TIMMS = "vit_tiny_patch16_siglip_32"


@timm.models.register_model
def vit_tiny_patch16_siglip_32(pretrained=False, **others):
    sizes = {"patch_size": 16, "img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False,
             "global_pool": "map"}  # fmt: skip
    return _create_vision_transformer(TIMMS, pretrained=pretrained, **{**sizes, **others})


def clip(**changes):
    """changes: to the settings of both towers."""
    return CLIPModel(CLIPConfig(text_config=WORDS | changes, vision_config=PICTURES | changes, projection_dim=48))


def siglip(**changes):
    words = WORDS | {"projection_size": 64} | changes
    return SiglipModel(SiglipConfig(text_config=words, vision_config=PICTURES | changes))


def saved(model, folder):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(model):
    pixels, ids = inputs()
    image, text = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)
    return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)


@torch.no_grad()
def ours(model: CLIP4Clip):
    pixels, ids = inputs()
    return model.encode_video(pixels[:, None], torch.ones(3, 1).bool())[:, 0], model.encode_text(ids)


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 16), generator=generator)
    ids[:, -1] = ids[0, 5] = 99
    ids[1, 3] = 50
    return torch.randn(3, 3, 32, 32, generator=generator), ids


MODELS = {
    "CLIP": lambda: clip(),
    "CLIP with GELU": lambda: clip(hidden_act="gelu"),
    "CLIP, tanh, another epsilon": lambda: clip(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3),
    "CLIP, another end": lambda: clip(eos_token_id=50),
    "CLIP of old configs": lambda: clip(eos_token_id=2),
    "SigLIP": lambda: siglip(),
    "SigLIP with exact GELU": lambda: siglip(hidden_act="gelu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(name, tmp_path):
    model = MODELS[name]()
    again = CLIP4Clip.from_checkpoint(saved(model, tmp_path / "model"))
    for expected, got in zip(theirs(model), ours(again), strict=True):
        assert expected.std() > 0.01
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.allclose(again.clip.logit_scale, model.logit_scale.squeeze())
    if "SigLIP" in name:
        assert again.clip.logit_bias == model.logit_bias.squeeze()


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_back_by_transformers(name, tmp_path):
    model = MODELS[name]()
    again = CLIP4Clip.from_checkpoint(saved(model, tmp_path / "model"))
    export(again, tmp_path / "written", "transformers")
    written, report = type(model).from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for expected, got in zip(theirs(model), theirs(written.eval()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(written.state_dict()[key], value), key


def test_its_tokenizer_gives_the_same_ids(tmp_path):
    words = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = tiny(spec={"embed_dim": 64, "quick_gelu": True, "text_cfg": words, "vision_cfg": {
        "image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64}})  # fmt: skip
    data = DataConfig(num_frames=4, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", resize_mode="squash")
    head, repairs = export(model, tmp_path / "written", "transformers", data)
    assert head.startswith("meanP:") and "open_clip.tokenizer.get_clean_fn('lower')" in repairs
    texts = ["A dog catches a Frisbee!", "a man's 2 naïve cats — and 3,000 dogs", "…"]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "written")
    for text, row in zip(texts, clips_tokenizer()(texts, 77), strict=True):
        assert tokenizer(text)["input_ids"] == row[: int(row.argmax()) + 1].tolist()
    for text in ("a “good” dog", "salt &amp; pepper", "lÃ©gende"):  # as the note says
        own = clips_tokenizer()([text], 77)[0]
        own = own[: int(own.argmax()) + 1].tolist()
        assert tokenizer(text)["input_ids"] != own == tokenizer(get_clean_fn("lower")(text))["input_ids"]
    _, again = open_checkpoint(str(tmp_path / "written"))
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert getattr(again, key) == getattr(data, key)


def test_it_says_how_siglips_texts_are_cleaned(tmp_path):
    saved(siglip(vocab_size=160), tmp_path / "model")
    vocabularies.sentencepiece(tmp_path / "model", pads_with_end=True)
    model, data = open_checkpoint(str(tmp_path / "model"))
    note = export(model, tmp_path / "written", "transformers", data)[-1]
    assert note.endswith("open_clip.tokenizer.get_clean_fn('canonicalize') makes of a text, padded to 16 tokens")
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "written"), "A Dog, a cat!"
    own = Tokenizer(model.spec["tokenizer"])([text], 16)[0].tolist()
    given, cleaned = (
        tokenizer(one, padding="max_length", max_length=16)["input_ids"]
        for one in (text, get_clean_fn("canonicalize")(text))
    )
    assert given != own == cleaned


def test_a_file_alone_needs_its_config_or_a_backbone(tmp_path, monkeypatch):
    model = clip(hidden_act="gelu")
    folder = saved(model, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "model.safetensors")
    assert read(folder / "model.safetensors").spec["quick_gelu"] is False
    with pytest.raises(Unsaid, match=r"no config\.json of transformers beside the weights.*--backbone NAME"):
        read(tmp_path / "model.safetensors")
    register(monkeypatch, "mine", spec_of(json.loads((folder / "config.json").read_text()), folder))
    again = CLIP4Clip.from_checkpoint(tmp_path / "model.safetensors", backbone="mine")
    torch.testing.assert_close(ours(again)[0], theirs(model)[0], rtol=0, atol=1e-5)
    config = ModelConfig(backbone="mine", init_from=str(folder))
    trained = build(config, 4, 32).eval()
    torch.testing.assert_close(ours(trained)[1], theirs(model)[1], rtol=0, atol=1e-5)


def test_a_tensor_without_a_place_is_told(tmp_path):
    """As an adapter that was left beside the towers: without it features are others."""
    folder = saved(clip(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    places = {"text_model.embeddings.position_ids": torch.arange(16)}  # of early versions, and no weights
    save_file(state | places, folder / "model.safetensors")
    CLIP4Clip.from_checkpoint(folder)
    save_file(state | {"vision_model.adapter.weight": torch.ones(4, 64)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected clip\.vision_model\.adapter\.weight"):
        CLIP4Clip.from_checkpoint(folder)


def test_pixels_and_pieces_of_a_folder(tmp_path):
    """Weights in several files, as transformers writes large models, and its processor's settings."""
    folder = tmp_path / "model"
    model = clip()
    saved(model, folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    about = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2, "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    again, data = open_checkpoint(str(folder))
    torch.testing.assert_close(ours(again)[0], theirs(model)[0], rtol=0, atol=1e-5)
    assert (data.mean, data.std, data.interpolation, data.resize_mode, data.image_size) == (
        (0.4,) * 3, (0.3,) * 3, "bilinear", "shortest", 32)  # fmt: skip


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}


def test_pixels_as_transformers_5_writes_them(tmp_path):
    """In processor_config.json alone; without either file, CLIP's are taken with a word."""
    folder = saved(clip(), tmp_path / "model")
    with pytest.warns(UserWarning, match=r"has neither processor_config\.json nor preprocessor_config\.json"):
        assert open_checkpoint(str(folder))[1].resize_mode == "shortest"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    data = open_checkpoint(str(folder))[1]
    assert (data.mean, data.std, data.resize_mode) == ((0.5,) * 3, (0.5,) * 3, "squash")


def test_a_tokenizer_of_an_earlier_export_does_not_stay(tmp_path):
    """transformers would take its tokenizer.json before the vocabulary of the new one."""
    folder, other = tmp_path / "out", vocabularies.sentencepiece(tmp_path / "other")
    about = {"kind": "hf", "name": other, "context_length": 77, "kwargs": {}, "mode": None, "fixed_length": False}
    text = SPEC["text_cfg"] | {"vocab_size": 160, "hf_tokenizer_name": other, "pool_type": "eos", "eos_id": 1}
    export(tiny(spec=spec(text_cfg=text, tokenizer=about)), folder, "transformers")
    assert (folder / "tokenizer.json").is_file()
    (folder / "notes.txt").write_text("mine")
    (folder / "processor_config.json").write_text('{"image_processor": {"image_mean": [0, 0, 0]}}')
    export(tiny(spec=spec(text_cfg=SPEC["text_cfg"] | {"vocab_size": 49408})), folder, "transformers")
    caption = "a dog catches a frisbee"
    assert AutoTokenizer.from_pretrained(folder)(caption)["input_ids"] == clips_tokenizer()([caption], 7)[0].tolist()
    export(tiny(), folder, "transformers")
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("preprocessor_config.json", PROCESSOR | {"image_mean": None}, "image_mean=None: it has to be three numbers"),
        ("preprocessor_config.json", PROCESSOR | {"resample": 1}, "resample=1 is not supported"),
        ("preprocessor_config.json", PROCESSOR | {"do_normalize": False}, "do_normalize=False is not supported"),
        ("preprocessor_config.json", PROCESSOR | {"rescale_factor": 1 / 127.5}, "rescale_factor=.* is not supported"),
        ("preprocessor_config.json", PROCESSOR | {"size": {"longest_edge": 32}}, "longest_edge.* is not supported"),
        ("preprocessor_config.json", [PROCESSOR], "is damaged"),
        ("processor_config.json", {"image_processor": [PROCESSOR]}, "is damaged"),
        ("config.json", {"model_type": "clip", "vision_config": {"hidden_size": "wide"}}, "is damaged"),
        ("config.json", {"model_type": "clip", "vision_config": 3}, "is damaged"),
    ],
)
def test_damaged_settings_of_a_folder_are_named(name, content, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        stated(tmp_path)


def test_a_rounded_scale_of_pixels_is_the_usual_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    found = []
    for more in ({}, {"rescale_factor": 0.00392156862}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | more))
        found.append(stated(tmp_path))
    assert found[0] == found[1]


def test_a_siglip_that_is_not_squashed_is_noted(tmp_path):
    saved(siglip(), tmp_path / "model")
    model, data = open_checkpoint(str(tmp_path / "model"))
    note = "transformers' processor of SigLIP squashes them"
    assert not any(note in said for said in export(model, tmp_path / "out", "transformers", data))
    assert any(
        note in said for said in export(model, tmp_path / "out", "transformers", replace(data, resize_mode="shortest"))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "relu"}, "hidden_act=relu: supported are quick_gelu, gelu"),
        (
            {"image_size": 48},
            r"timm has no SigLIP tower of width 64.* pictures of 48; with such patches it has pictures of .*32",
        ),
        ({"num_patches": 256}, "of any shape"),
        ({"vision_use_head": False}, "no pooling head"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001; supported is .* 1e-06"),
    ],
)
def test_siglips_that_cannot_be_had_are_refused_with_the_reason(change, reason, tmp_path):
    config = json.loads(SiglipConfig(text_config=WORDS, vision_config=PICTURES).to_json_string())
    config["vision_config"] |= change
    with pytest.raises(ValueError, match=reason):
        spec_of(config, tmp_path)


def test_published_siglips_have_their_place_in_timm():
    for sizes, name in (
        ({}, "vit_base_patch16_siglip_224"),
        ({"image_size": 512}, "vit_base_patch16_siglip_512"),
        ({"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304, "patch_size": 14,
          "image_size": 384}, "vit_so400m_patch14_siglip_384"),
    ):  # fmt: skip
        vision = SiglipConfig(vision_config=sizes).vision_config
        assert timm_name(vision) == name


def test_towers_that_transformers_does_not_have_are_refused(tmp_path):
    from tests.c4c.models.small import FAMILIES

    for name in ("ResNet", "custom text", "CoCa", "ConvNeXt"):
        with pytest.raises(ValueError, match=r"use --format open_clip or onnx"):
            export(tiny(spec=FAMILIES[name]), tmp_path / "written", "transformers")
    with pytest.raises(ValueError, match="the weights of the head seqTransf would be lost"):
        export(tiny("seqTransf"), tmp_path / "written", "transformers")
    for text, reason in (
        ({"pool_type": "eos", "eos_id": 2}, "the highest token of a caption"),
        (
            {"pool_type": "eos", "eos_id": 7, "tokenizer_kwargs": {"clean": "lower"}},
            r"tokenizer_kwargs \({'clean': 'lower'}\)",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            export(tiny(spec=spec(text_cfg=SPEC["text_cfg"] | text)), tmp_path / "written", "transformers")
    assert not list(tmp_path.iterdir())

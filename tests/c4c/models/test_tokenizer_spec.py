"""Which tokenizer a backbone has, and when its text tower's features depend on the padding: against open_clip itself."""

import json
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from c4c.models import towers
from c4c.models.text_tower import caption_features
from c4c.models.tokenizer_spec import depends_on_padding, describe, row_length, with_files, without_files
from pipelines.tokens import Tokenizer
from tests import vocabularies

VISION = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 64, "head_width": 32}
TEXT = {"context_length": 24, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}
BERT = {"model_type": "bert", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
ROBERTA = BERT | {"model_type": "xlm-roberta", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MT5 = {"model_type": "mt5", "vocab_size": 200, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
       "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
NLLB = {"model_type": "m2m_100", "vocab_size": 600, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
        "max_position_embeddings": 40, "pad_token_id": 1}  # fmt: skip


# ---- which tokenizer ----


class Recorded:
    """Stands for open_clip's classes: what each was made with."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, *args, **kwargs) -> tuple:
        kwargs.pop("cache_dir", None)
        return (self.kind, *map(str, args), kwargs)


@pytest.fixture
def theirs(monkeypatch):
    """What open_clip's get_tokenizer makes."""
    for name, kind in (("SimpleTokenizer", "clip"), ("HFTokenizer", "hf"), ("SigLipTokenizer", "SigLIP")):
        monkeypatch.setattr(f"open_clip.factory.{name}", Recorded(kind))
    return open_clip.get_tokenizer


def as_open_clip(about: dict[str, Any]) -> tuple:
    """`describe`'s answer in the form of `Recorded`."""
    length = {"context_length": about["context_length"]}
    if about["kind"] == "clip":
        return "clip", length | about["kwargs"]
    return "hf", about["name"], length | {"tokenizer_mode": about["mode"]} | about["kwargs"]


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_backbone_has_open_clips_tokenizer(theirs, name):
    assert as_open_clip(describe(open_clip.get_model_config(name), name)) == theirs(name)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"context_length": 40, "tokenizer_kwargs": {"clean": "canonicalize"}},
        {"hf_tokenizer_name": "google/mt5-base", "tokenizer_kwargs": {"clean": "lower"}, "tokenizer_mode": "clips"},
    ],
)
def test_a_folder_brings_its_own(theirs, tmp_path, text):
    folder = tmp_path / "a siglip folder"
    folder.mkdir()
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    about = describe(config, f"local-dir:{folder}")
    assert as_open_clip(about) == theirs(f"local-dir:{folder}")
    assert about.get("hub") == text.get("hf_tokenizer_name"), "for whoever has to fetch it"


def test_a_relative_folder_is_kept_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = describe({"text_cfg": {"hf_tokenizer_name": "a/b"}}, "local-dir:models/x")
    assert about["name"] == str(tmp_path / "models/x")


def test_a_hub_backbone_names_its_tokenizer(theirs, monkeypatch):
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_tokenizer_name": "timm/SigLIP", "context_length": 64}}
    monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *_, **__: {"model_cfg": config})
    assert as_open_clip(describe(config, "hf-hub:timm/siglip")) == theirs("hf-hub:timm/siglip")


@pytest.mark.parametrize(
    ("name", "variant", "hub"),
    [
        ("my-SigLIP", "c4-en", "timm/ViT-B-16-SigLIP"),
        ("my-SigLIP-i18n", "mc4", "timm/ViT-B-16-SigLIP-i18n-256"),
        ("my-SigLIP2", "gemma", "timm/ViT-B-16-SigLIP2"),
    ],
)
def test_a_name_with_siglip_and_no_tokenizer_has_siglips(theirs, monkeypatch, name, variant, hub):
    """open_clip makes it of a vocabulary on the web; the hub has the same one with a published backbone."""
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": 64}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    assert theirs(name) == ("SigLIP", variant, {"context_length": 64})
    about = describe(config, name)
    assert (about["kind"], about["name"], about["kwargs"]) == ("hf", hub, {"clean": "canonicalize"})
    assert open_clip.get_model_config(hub.partition("/")[2])["text_cfg"]["hf_tokenizer_name"] == hub


# ---- what depends on the padding ----

TOWERS: dict[str, tuple[dict, bool]] = {  # text_cfg, whether features change with the padding
    "CLIP": ({}, False),
    "first token": ({"pool_type": "first"}, False),
    "worldwide": ({"pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "x"}, False),
    "MobileCLIP": ({"no_causal_mask": True}, True),
    "SigLIP": ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "hf_tokenizer_name": "x"}, True),
    "causal, last token": ({"pool_type": "last"}, True),
    "CoCa": ({"embed_cls": True}, True),
}
HUGGING_FACE = {"BERT": BERT, "XLM-R": ROBERTA, "mT5": MT5, "NLLB": NLLB}


def features(spec: dict, tokens: Tensor) -> Tensor:
    torch.manual_seed(0)
    clip = towers.build(spec).eval()
    torch.manual_seed(1)
    for parameter in clip.parameters():  # also those that begin with zeros
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        return caption_features(clip, tokens, words=False)


def captions(pad: int, start: int, end: int) -> Tensor:
    rows = torch.full((3, 24), pad)
    for i, length in enumerate((4, 7, 10)):
        rows[i, :length] = torch.arange(10, 10 + length) * (i + 2)
        rows[i, 0], rows[i, length - 1] = start, end
    return rows


@pytest.mark.parametrize("name", TOWERS)
def test_padding_counts_where_the_spec_says(name):
    text, depends = TOWERS[name]
    spec = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": TEXT | text, "custom_text": True}
    end = 2 if "eos_id" in text else 199
    rows = captions(pad=1 if "eos_id" in text else 0, start=5, end=end)
    whole, cut = features(spec, rows), features(spec, rows[:, :12])
    assert ((whole - cut).abs().max() > 1e-3) == depends == depends_on_padding(text), (whole - cut).abs().max()
    if not depends:
        torch.testing.assert_close(whole, cut, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_towers_do_not_see_the_padding(name, pooler):
    text = {"hf_model_name": "x", "hf_tokenizer_name": "x", "hf_proj_type": "linear", "hf_pooler_type": pooler}
    config = HUGGING_FACE[name]
    spec = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": text, "hf_config": config}
    rows = captions(pad=config["pad_token_id"], start=5, end=2)
    torch.testing.assert_close(features(spec, rows), features(spec, rows[:, :12]), atol=1e-5, rtol=1e-4)
    assert not depends_on_padding(text)


def test_what_the_padding_could_be_above_keeps_its_length():
    """With another vocabulary, the highest id of a row may be its padding, whose place then depends on the length."""
    spec = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True}
    rows = captions(pad=199, start=5, end=2)
    rows[2] = torch.arange(24) + 3  # as long as can be
    whole, cut = features(spec, rows), features(spec, torch.cat([rows[:, :11], torch.full((3, 1), 2)], dim=1))
    assert (whole - cut)[2].abs().max() > 1e-3
    assert depends_on_padding({"hf_tokenizer_name": "x"})


def test_a_class_token_behind_the_padding_keeps_its_length():
    assert depends_on_padding({"tokenizer_mode": "clips", "hf_model_name": "x"})


# ---- a user's way: a folder, its tokenizer, captions cut shorter than the tower takes ----

FAMILIES: dict[str, tuple[Any, dict, dict | None]] = {
    "worldwide, XLM-V": (vocabularies.xlm, {"pool_type": "eos", "eos_id": 2}, None),
    "worldwide, mT5": (vocabularies.sentencepiece, {"pool_type": "eos", "eos_id": 1, "tokenizer_kwargs": {"clean": "canonicalize"}}, None),
    "CLIPA": (vocabularies.wordpiece, {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"strip_sep_token": True}}, None),
    "SigLIP": (lambda f: vocabularies.sentencepiece(f, pads_with_end=True),
               {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}}, None),
    "XLM-RoBERTa": (vocabularies.xlm, {"hf_pooler_type": "mean_pooler"}, ROBERTA),
    "mT5": (vocabularies.sentencepiece, {"hf_pooler_type": "mean_pooler"}, MT5),
    "NLLB": (vocabularies.nllb, {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}, NLLB),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_a_folder_are_encoded_as_open_clip_does(family, tmp_path):
    vocabulary, text, config = FAMILIES[family]
    vocabulary(tmp_path)
    text = {"context_length": 24, "hf_tokenizer_name": "some/tokenizer"} | text
    if config is None:
        text = TEXT | text
    else:
        (tmp_path / "text").mkdir()
        (tmp_path / "text/config.json").write_text(json.dumps(config))
        text |= {"hf_model_name": str(tmp_path / "text"), "hf_model_pretrained": False}
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text, "custom_text": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    name = f"local-dir:{tmp_path}"
    theirs = open_clip.create_model(name, load_weights=False, pretrained_text=False).eval()
    expected = theirs.encode_text(open_clip.get_tokenizer(name)(vocabularies.TEXTS))

    spec = {"quick_gelu": False, **model, "hf_config": config, "tokenizer": describe(model, name)}
    clip = towers.build(spec).eval()
    clip.load_state_dict(theirs.state_dict())
    tokenizer = Tokenizer(spec["tokenizer"])
    with torch.no_grad():
        found = caption_features(clip, tokenizer(vocabularies.TEXTS, 24), words=False)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        fits = [i for i, caption in enumerate(vocabularies.TEXTS) if tokenizer.count(caption) <= 20]
        assert len(fits) > 3
        shorter = tokenizer([vocabularies.TEXTS[i] for i in fits], 20)
        assert shorter.shape[1] == row_length(spec, 20) == (20 if not spec["tokenizer"]["fixed_length"] else 24)
        torch.testing.assert_close(caption_features(clip, shorter, words=False), expected[fits], atol=1e-5, rtol=1e-5)
        assert caption_features(clip, tokenizer.missing(20)[None], words=False).isfinite().all()


def test_a_copy_of_the_files_counts_where_it_is(tmp_path):
    copy, about = tmp_path / "copy", {"kind": "hf", "name": "google/mt5-base"}
    assert with_files({"tokenizer": about}, copy) == {"tokenizer": about}
    copy.mkdir()
    spec = with_files({"tokenizer": about}, copy)
    assert spec["tokenizer"]["files"] == str(copy)
    assert without_files(spec) == {"tokenizer": about} == without_files({"tokenizer": about})
    assert with_files({"tokenizer": {"kind": "clip"}}, copy) == {"tokenizer": {"kind": "clip"}}
    assert with_files({}, copy) == without_files({}) == {}, "a run of before there was a choice"

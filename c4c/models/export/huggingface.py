"""A folder as transformers loads it: CLIPModel or SiglipModel.from_pretrained(FOLDER), with the processor and tokenizer beside."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from c4c.models import towers
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.folder import TOKENIZER, drop_earlier, save_json, save_tensors, written
from c4c.models.export.towers_only import about_resize, pictures, refuse_more, without_merging
from c4c.models.weights.huggingface import CONFIG, PREPROCESSOR, PROCESSOR, from_open_clip
from pipelines.config import DataConfig
from pipelines.tokens import CLIPS, Tokenizer

WEIGHTS = "model.safetensors"
# of open_clip's settings of a tower, those that transformers has as well; all others must be as open_clip has them by itself
_VISION = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "act_kwargs", "norm_kwargs"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs", "eos_id",
         "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "hf_model_pretrained"}  # fmt: skip
_SIGLIP_IMAGE = {"timm_pool": "map", "timm_proj": "none"}
_SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
_LEGACY_EOS = 2  # which transformers' CLIP does not look for, as early configs of OpenAI's models had it
_PIL = {"bilinear": 2, "bicubic": 3}


def write(model: CLIP4Clip, data: DataConfig | None, folder: Path) -> list[str]:
    """Returns notes for people. Raises ValueError if the layout cannot hold the model, and OSError."""
    notes = [refuse_more(model, "transformers' layout"), *about_resize(data), *without_merging(model)]
    siglip = _is_siglip(model.spec)
    config = _siglip_config(model) if siglip else _clip_config(model.spec)
    how = pictures(model, data)
    if how["resize_mode"] == "longest":
        notes.append("its pictures are scaled by the long side and filled, which transformers' processors do not do")
    if how["resize_mode"] == "shortest" and siglip:
        notes.append(
            "its pictures are scaled by the short side and cut out, and transformers' processor of SigLIP squashes them: scores "
            "differ but for square pictures"
        )
    if not siglip and model.clip.logit_bias is not None:
        notes.append(
            "transformers' CLIP has no logit_bias, which is left out: scores rank the same, but are no probabilities"
        )
    with written(folder) as beside:
        save_tensors(from_open_clip(model.clip.state_dict()), beside / WEIGHTS)
        save_json(config, beside / CONFIG)
        save_json(_processor(how, siglip), beside / PREPROCESSOR)
        notes += _save_tokenizer(model, beside, folder)
        drop_earlier(folder, beside, (PROCESSOR,))
    return notes


def _is_siglip(spec: dict) -> bool:
    """Whether these are SigLIP's towers. Raises ValueError for towers that are neither SigLIP's nor CLIP's."""
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    if "_siglip_" in vision.get("timm_model_name", "") and "_gap_" not in vision["timm_model_name"]:
        has = _SIGLIP_IMAGE.items() <= vision.items() and _SIGLIP_TEXT.items() <= text.items()
        others = _unusual(text, CLIPTextCfg, _TEXT | _SIGLIP_TEXT.keys())
        if has and not others and spec.get("init_logit_bias") is not None:
            return True
    odd = _unusual(vision, CLIPVisionCfg, _VISION) + _unusual(text, CLIPTextCfg, _TEXT)
    eos = text.get("pool_type") == "eos" and odd == ["pool_type"]
    if towers.kind(spec) != "ViT" or spec.get("custom_text") or (odd and not eos):
        what = f"{towers.kind(spec)} with {', '.join(odd)}" if odd else towers.kind(spec)
        raise ValueError(
            f"transformers' CLIP has plain ViTs and CLIP's text transformer, and its SigLIP timm's vit_*_siglip_*; this is a {what}: "
            "use --format open_clip or onnx"
        )
    if text.get("pool_type") == "eos" and text.get("eos_id") == _LEGACY_EOS:
        raise ValueError(
            f"transformers' CLIP takes eos_token_id {_LEGACY_EOS} to mean the highest token of a caption, and this text tower is read at the "
            f"first token {_LEGACY_EOS}: use --format open_clip or c4c"
        )
    if told := [name for name in ("tokenizer_kwargs", "tokenizer_mode") if text.get(name)]:
        raise ValueError(
            f"transformers' tokenizers cannot be told this model's {' and '.join(f'{name} ({text[name]})' for name in told)}, and would make "
            "other tokens of some captions: use --format open_clip or c4c"
        )
    return False


def _unusual(given: dict, kind: type, known: set[str]) -> list[str]:
    """Settings beyond `known` that are not as open_clip has them by itself."""
    default = {field.name: field.default for field in fields(kind)}
    return sorted(name for name, value in given.items() if name not in known and value != default.get(name))


def _clip_config(spec: dict) -> dict:
    from transformers import CLIPConfig

    vision, text = towers.parts(spec)
    features, size = spec["embed_dim"], towers.image_size(spec)
    end = text.eos_id if text.pool_type == "eos" else text.vocab_size - 1
    words = {
        "max_position_embeddings": text.context_length, "vocab_size": text.vocab_size, "bos_token_id": text.vocab_size - 2,
        "eos_token_id": end, "pad_token_id": end, "projection_dim": features, "num_attention_heads": text.heads,
        "hidden_act": _activation(spec, text.act_kwargs), **_transformer(text),
    }  # fmt: skip
    image = {
        "image_size": size, "patch_size": vision.patch_size, "projection_dim": features,
        "num_attention_heads": vision.width // vision.head_width, "hidden_act": _activation(spec, vision.act_kwargs),
        **_transformer(vision),
    }  # fmt: skip
    with towers.quiet():
        config = CLIPConfig(text_config=words, vision_config=image, projection_dim=features)
    return json.loads(config.to_json_string()) | {"architectures": ["CLIPModel"]}


def _transformer(tower: CLIPVisionCfg | CLIPTextCfg) -> dict:
    assert isinstance(tower.layers, int)
    eps = (tower.norm_kwargs or {}).get("eps", 1e-5)
    return {
        "hidden_size": tower.width, "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers, "layer_norm_eps": eps,
    }  # fmt: skip


def _activation(spec: dict, arguments: dict | None) -> str:
    if spec["quick_gelu"]:
        return "quick_gelu"
    return "gelu_pytorch_tanh" if (arguments or {}).get("approximate") == "tanh" else "gelu"


def _siglip_config(model: CLIP4Clip) -> dict:
    from transformers import SiglipConfig

    _, text = towers.parts(model.spec)
    trunk: Any = model.clip.visual.trunk
    block, size = trunk.blocks[0], towers.image_size(model.spec)
    words = {
        "max_position_embeddings": text.context_length, "vocab_size": text.vocab_size, "num_attention_heads": text.heads,
        "hidden_act": _activation(model.spec, text.act_kwargs), "projection_size": model.spec["embed_dim"],
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1, **_transformer(text),
    }  # fmt: skip
    image = {
        "image_size": size, "patch_size": trunk.patch_embed.patch_size[0], "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features, "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads, "layer_norm_eps": block.norm1.eps, "hidden_act": _timms(block.mlp.act),
    }  # fmt: skip
    with towers.quiet():
        config = SiglipConfig(text_config=words, vision_config=image)
    return json.loads(config.to_json_string()) | {"architectures": ["SiglipModel"]}


def _timms(activation: nn.Module) -> str:
    tanh = "tanh" in type(activation).__name__.lower() or getattr(activation, "approximate", "none") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _processor(how: dict, siglip: bool) -> dict:
    """preprocessor_config.json."""
    side = how["size"]
    square = {"height": side, "width": side}
    about = {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor", "do_resize": True,
        "resample": _PIL[how["interpolation"]], "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": how["mean"], "image_std": how["std"], "do_convert_rgb": True,
    }  # fmt: skip
    if how["resize_mode"] == "shortest" and not siglip:
        return about | {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    return about | {"size": square, "do_center_crop": False}


def _save_tokenizer(model: CLIP4Clip, beside: Path, folder: Path) -> list[str]:
    """Write it into `beside`, and drop what `folder` has of another. Returns notes on what could not be written."""
    about = CLIPS | model.spec.get("tokenizer", {})
    notes = [_about_texts(about)]
    if about["kind"] == "hf":
        try:
            Tokenizer(about).save(beside)
        except ValueError as error:  # the user may have put its files into the folder
            return [f"the tokenizer is not in the folder: {error}"]
    elif about["kwargs"] or model.spec["text_cfg"].get("vocab_size", 49408) != 49408:
        notes = ["the tokenizer is not in the folder: it is none that transformers has"]
    else:
        save_clips_tokenizer(beside, about["context_length"])
    drop_earlier(folder, beside, TOKENIZER)
    return notes


def _about_texts(about: dict[str, Any]) -> str:
    """What the tokenizer is not told by its files: open_clip's classes clean texts before it sees them."""
    clean = about["kwargs"].get("clean", "lower" if about["kind"] == "clip" else "whitespace")
    padded = f", padded to {about['context_length']} tokens" if about["fixed_length"] else ""
    letters = ", capitals and punctuation" if clean == "canonicalize" else ""
    return (
        f"transformers' tokenizer takes texts as they are, where this model's are cleaned first: curly quotes, &amp; and the like{letters} get "
        f"other tokens. Give it what open_clip.tokenizer.get_clean_fn({clean!r}) makes of a text{padded}"
    )


def save_clips_tokenizer(folder: Path, length: int) -> None:
    """CLIP's vocabulary and merges, as transformers' CLIPTokenizer reads them."""
    own = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"  # where open_clip writes <start_of_text> and <end_of_text>
    names = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    save_json(about | tokens, folder / "tokenizer_config.json")
    save_json(tokens, folder / "special_tokens_map.json")

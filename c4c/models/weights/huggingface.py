"""transformers' layout of CLIP and SigLIP: a folder with config.json, which says everything of the towers, or its file of weights.

The same tensors stand there under other names, with the three projections of attention apart. SigLIP's image tower is timm's ViT
in open_clip; timm's names fix its sizes.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from c4c.files import read_json_object
from c4c.models import towers
from c4c.models.tokenizer_spec import describe
from c4c.models.weights.base import Content, Unsaid, Weights, floats

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # in which transformers 5 writes image_processor, and no PREPROCESSOR
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_TYPES = ("clip", "siglip", "siglip2")
_ACTIVATIONS: dict[str, tuple[bool, dict | None]] = {  # by transformers' names: whether QuickGELU, arguments of GELU
    "quick_gelu": (True, None), "gelu": (False, None), "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
    "gelu_new": (False, {"approximate": "tanh"}),
}  # fmt: skip
_SIGLIPS_PIXELS = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "fill_color": 0,
}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# of a processor: pixels from 0 to 1, normalised
_USUAL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_BLOCKS = {"layer_norm1": ("ln_1", "norm1"), "layer_norm2": ("ln_2", "norm2"), "mlp.fc1": ("mlp.c_fc", "mlp.fc1"),
           "mlp.fc2": ("mlp.c_proj", "mlp.fc2"), "self_attn.out_proj": ("attn.out_proj", "attn.proj")}  # fmt: skip
_TIMMS_EPS = 1e-6  # of the norms of SigLIP's image towers in timm
_CLIPS_VOCABULARY = 49408  # of its own tokenizer
# SigLIP's tokenizers by the size of their vocabulary, for folders that have none
_TOKENIZERS = {32000: "timm/ViT-B-16-SigLIP", 250000: "timm/ViT-B-16-SigLIP-i18n-256", 256000: "timm/ViT-B-16-SigLIP2"}


class Pair(NamedTuple):
    """Tensors that are the same: put together along the first axis, and for how="T" transposed, for "1" with an axis before."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    how: str = ""


def is_folder(folder: Path) -> bool:
    """Whether it is a model folder of transformers, of a kind that is read here."""
    return not (folder / "config.yaml").exists() and _config(folder).get("model_type") in _TYPES


def stated(path: Path) -> dict | None:
    """The towers that the config.json in a folder, or beside a file of transformers' weights, describes; None without one."""
    folder = path if path.is_dir() else path.parent
    return spec_of(_config(folder), folder) if is_described(path) else None


def is_described(path: Path) -> bool:
    """Whether there is such a config.json in a folder, or beside a file of weights."""
    return is_folder(path) if path.is_dir() else path.name in _FILES and is_folder(path.parent)


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder of transformers. Raises ValueError."""
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has {CONFIG}, but none of {', '.join(_FILES)}")


def matches(content: Content) -> bool:
    """Whether its names are those of transformers' CLIPModel or SiglipModel."""
    return {"text_model.embeddings.token_embedding.weight", "vision_model.embeddings.patch_embedding.weight"} <= (
        content.state.keys()
    )


def read(content: Content, spec: dict | None) -> Weights:
    """config.json beside the file counts; without one, `spec`, the towers that the user named. Raises ValueError, Unsaid."""
    config = _config(content.path.parent)
    if config.get("model_type") in _TYPES:
        spec = spec_of(config, content.path.parent)
    if spec is None:
        raise Unsaid(
            f"there is no {CONFIG} of transformers beside the weights, which do not say their activation and heads "
            f"themselves. Put it there, or name the backbone: --backbone NAME, in training model.backbone=NAME"
        )
    state = to_open_clip(content.state)
    return Weights(floats({f"clip.{name}": tensor for name, tensor in state.items()}), spec, kind="transformers")


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in open_clip's names; what has no place there keeps its own, so that loading tells of it. Raises ValueError naming what is
    missing."""
    out: dict[str, Tensor] = {}
    rest = {name for name in state if not name.endswith(".position_ids")}  # numbers that early versions stored
    for ours, theirs, how in pairs(
        "vision_model.head.probe" in state, *_depths(state, r"{}_model\.encoder\.layers\.(\d+)\.")
    ):
        if absent := [name for name in theirs if name not in state]:
            raise ValueError(
                f"{', '.join(absent)} missing: these are not all weights of a CLIP or SigLIP of transformers"
            )
        whole = torch.cat([state[name] for name in theirs]) if len(theirs) > 1 else state[theirs[0]]
        whole = whole.T if how == "T" else whole[None] if how == "1" else whole.reshape(()) if how == "()" else whole
        parts = whole.split((len(whole) // 3, 2 * (len(whole) // 3))) if len(ours) == 2 else (whole,)
        out |= {name: part.contiguous() for name, part in zip(ours, parts, strict=True)}
        rest -= set(theirs)
    return out | {name: state[name] for name in rest}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`. Raises KeyError for other towers than it makes."""
    siglip = any(name.startswith("visual.trunk.") for name in state)
    image = r"visual\.trunk\.blocks\.(\d+)\." if siglip else r"visual\.transformer\.resblocks\.(\d+)\."
    text = r"text\.transformer\.resblocks\.(\d+)\." if siglip else r"transformer\.resblocks\.(\d+)\."
    out: dict[str, Tensor] = {}
    for ours, theirs, how in pairs(siglip, _depth(state, image), _depth(state, text)):
        whole = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        # transformers keeps SigLIP's scale and bias as vectors of one number, CLIP's scale as a number
        whole = (
            whole.T if how == "T" else whole[0] if how == "1" else whole.reshape(1) if how == "()" and siglip else whole
        )
        parts = whole.chunk(len(theirs)) if len(theirs) > 1 else (whole,)
        out |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return out


def _depths(state: dict[str, Tensor], pattern: str) -> tuple[int, int]:
    return _depth(state, pattern.format("vision")), _depth(state, pattern.format("text"))


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def pairs(siglip: bool, image_layers: int, text_layers: int) -> Iterator[Pair]:
    """All tensors of a model, in open_clip's names and in transformers'."""
    text = "text." if siglip else ""
    yield Pair(("logit_scale",), ("logit_scale",), "()")
    yield Pair((f"{text}token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",))
    yield Pair((f"{text}positional_embedding",), ("text_model.embeddings.position_embedding.weight",))
    yield from _same(f"{text}ln_final", "text_model.final_layer_norm")
    yield from _blocks(f"{text}transformer.resblocks", "text_model", text_layers, timms=False)
    if siglip:
        yield Pair(("logit_bias",), ("logit_bias",), "()")
        yield from _same("text.text_projection", "text_model.head")
        yield from _blocks("visual.trunk.blocks", "vision_model", image_layers, timms=True)
        yield from _siglip_picture()
        return
    yield Pair(("text_projection",), ("text_projection.weight",), "T")
    yield from _blocks("visual.transformer.resblocks", "vision_model", image_layers, timms=False)
    yield Pair(("visual.class_embedding",), ("vision_model.embeddings.class_embedding",))
    yield Pair(("visual.conv1.weight",), ("vision_model.embeddings.patch_embedding.weight",))
    yield Pair(("visual.positional_embedding",), ("vision_model.embeddings.position_embedding.weight",))
    yield from _same("visual.ln_pre", "vision_model.pre_layrnorm")  # as transformers spells it
    yield from _same("visual.ln_post", "vision_model.post_layernorm")
    yield Pair(("visual.proj",), ("visual_projection.weight",), "T")


def _siglip_picture() -> Iterator[Pair]:
    """SigLIP's image tower but for its blocks; its pooling keeps q apart from k and v in timm."""
    ours, theirs = "visual.trunk", "vision_model"
    yield from _same(f"{ours}.patch_embed.proj", f"{theirs}.embeddings.patch_embedding")
    yield Pair((f"{ours}.pos_embed",), (f"{theirs}.embeddings.position_embedding.weight",), "1")
    yield from _same(f"{ours}.norm", f"{theirs}.post_layernorm")
    yield Pair((f"{ours}.attn_pool.latent",), (f"{theirs}.head.probe",))
    for kind in ("weight", "bias"):
        yield Pair(
            (f"{ours}.attn_pool.q.{kind}", f"{ours}.attn_pool.kv.{kind}"), (f"{theirs}.head.attention.in_proj_{kind}",)
        )
    yield from _same(f"{ours}.attn_pool.proj", f"{theirs}.head.attention.out_proj")
    yield from _same(f"{ours}.attn_pool.norm", f"{theirs}.head.layernorm")
    for layer in ("fc1", "fc2"):
        yield from _same(f"{ours}.attn_pool.mlp.{layer}", f"{theirs}.head.mlp.{layer}")


def _blocks(ours: str, tower: str, layers: int, timms: bool) -> Iterator[Pair]:
    for layer in range(layers):
        theirs = f"{tower}.encoder.layers.{layer}"
        for name, own in _BLOCKS.items():
            yield from _same(f"{ours}.{layer}.{own[timms]}", f"{theirs}.{name}")
        for kind in ("weight", "bias"):
            fused = f"attn.qkv.{kind}" if timms else f"attn.in_proj_{kind}"
            yield Pair((f"{ours}.{layer}.{fused}",), tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"))


def _same(ours: str, theirs: str) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield Pair((f"{ours}.{kind}",), (f"{theirs}.{kind}",))


# ---- what config.json says ----


def _config(folder: Path) -> dict:
    """config.json of a folder; {} where there is none that can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def spec_of(config: dict, folder: Path) -> dict:
    """The towers that a config.json of transformers describes, with the pixels and tokens of the folder. Raises ValueError."""
    vision, text, features = _towers_of(config, folder)
    spec = _clip(vision, text, features) if config["model_type"] == "clip" else _siglip(vision, text)
    if text.vocab_size in _TOKENIZERS or (_has_tokenizer(folder) and text.vocab_size != _CLIPS_VOCABULARY):
        spec["text_cfg"]["hf_tokenizer_name"] = _TOKENIZERS.get(text.vocab_size, str(folder))
    spec["text_cfg"] |= {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }  # fmt: skip
    pixels = _preprocess(folder, vision.image_size)
    if pixels is None and config["model_type"] != "clip":
        pixels = _SIGLIPS_PIXELS | {"size": vision.image_size}
    elif pixels is None:
        warnings.warn(
            f"{folder} has neither {PROCESSOR} nor {PREPROCESSOR}, which say how pictures are made: they are made as CLIP's. "
            "Put the file there, or set data.mean, data.std and data.resize_mode",
            stacklevel=4,
        )
    if pixels:
        spec["preprocess_cfg"] = pixels
    return spec | {"tokenizer": describe(spec, f"local-dir:{folder}" if _has_tokenizer(folder) else "")}


def _towers_of(config: dict, folder: Path) -> tuple[Any, Any, int]:
    """The settings of the image tower and of the text tower, complete, and the size of CLIP's features. Raises ValueError."""
    from transformers import CLIPConfig, SiglipConfig

    clip = config["model_type"] == "clip"
    try:
        if "num_patches" in config.get("vision_config", {}):
            raise ValueError("SigLIP2 for pictures of any shape (NaFlex) is not supported: take one of a fixed size")
        with towers.quiet():  # transformers warns of ids of tokens that it does not use
            full: Any = (CLIPConfig if clip else SiglipConfig).from_dict(config)
    except ValueError:
        raise
    except Exception as error:  # transformers checks its settings in many ways
        raise ValueError(f"{folder / CONFIG} is damaged ({_in_one_line(error)})") from error
    return full.vision_config, full.text_config, full.projection_dim if clip else 0


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _clip(vision: Any, text: Any, features: int) -> dict:
    (quick, image_arguments), (quick_text, text_arguments) = _activation(vision), _activation(text)
    if quick != quick_text:
        raise ValueError(
            f"its towers have two activations ({vision.hidden_act}, {text.hidden_act}); open_clip's have one: not supported"
        )
    image: dict[str, Any] = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.hidden_size,
        "layers": vision.num_hidden_layers, "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
    }  # fmt: skip
    words: dict[str, Any] = {}
    # transformers looks for this id, or where it is 2 for the highest; CLIP's own is the highest
    if text.eos_token_id not in (2, text.vocab_size - 1):
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    for tower, about, arguments in ((image, vision, image_arguments), (words, text, text_arguments)):
        if arguments:
            tower["act_kwargs"] = arguments
        if about.layer_norm_eps != 1e-5:
            tower["norm_kwargs"] = {"eps": about.layer_norm_eps}
    return {"embed_dim": features, "quick_gelu": quick, "vision_cfg": image, "text_cfg": words}


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer.model")
    )


def _siglip(vision: Any, text: Any) -> dict:
    if not getattr(vision, "vision_use_head", True):
        raise ValueError("its image tower has no pooling head (vision_use_head): not supported")
    (_, image_arguments), (quick, text_arguments) = _activation(vision), _activation(text)
    if quick:
        raise ValueError("a SigLIP with QuickGELU is not supported: timm's image towers have GELU")
    if vision.layer_norm_eps != _TIMMS_EPS:
        raise ValueError(
            f"its image tower has layer_norm_eps={vision.layer_norm_eps:g}; supported is that of timm's image towers, {_TIMMS_EPS:g}"
        )
    words = {
        "no_causal_mask": True,
        "tokenizer_kwargs": {"clean": "canonicalize"}, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": text.layer_norm_eps},
    }  # fmt: skip
    image = {"image_size": vision.image_size, "timm_model_name": timm_name(vision), "timm_model_pretrained": False,
             "timm_pool": "map", "timm_proj": "none"}  # fmt: skip
    return {
        "embed_dim": vision.hidden_size, "quick_gelu": False, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": image | ({"act_kwargs": image_arguments} if image_arguments else {}),
        "text_cfg": words | ({"act_kwargs": text_arguments} if text_arguments else {}),
    }  # fmt: skip


def timm_name(vision: Any) -> str:
    """Timm's name of SigLIP's image tower of these sizes (transformers' vision_config). Raises ValueError if it has none."""
    wanted = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    names = timm.list_models(f"vit_*_patch{vision.patch_size}_siglip_{vision.image_size}")
    for name in names:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        block = model.blocks[0]
        if (model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features) == wanted:
            return name
    known = sorted(
        {name.split("_siglip_")[-1] for name in timm.list_models(f"vit_*_patch{vision.patch_size}_siglip_*")}
    )
    raise ValueError(
        f"timm has no SigLIP tower of width {wanted[0]}, {wanted[1]} layers, {wanted[2]} heads, patches of "
        f"{vision.patch_size} and pictures of {vision.image_size}"
        + (f"; with such patches it has pictures of {', '.join(known)}" if known else "")
    )


def _activation(about: Any) -> tuple[bool, dict | None]:
    if about.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={about.hidden_act}: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[about.hidden_act]


def _preprocess(folder: Path, size: int) -> dict | None:
    """How pictures are made by a folder of transformers, in open_clip's form; None where it does not say. Raises ValueError."""
    if (found := _processor(folder)) is None:
        return None
    path, about = found
    for key, usual in _USUAL.items():
        given = usual if about.get(key) is None else about[key]
        if not isinstance(given, int | float) or not math.isclose(given, usual, rel_tol=1e-5):  # some were rounded
            raise ValueError(f"{path}: {key}={given} is not supported: it has to be {usual}")
    sides = about.get("size", size)
    if isinstance(sides, dict) and "shortest_edge" not in sides and "height" not in sides:
        raise ValueError(f"{path}: size={sides} is not supported: it has to name shortest_edge, or height and width")
    shortest = not (isinstance(sides, dict) and "height" in sides)
    side = sides.get("shortest_edge", sides.get("height")) if isinstance(sides, dict) else sides
    interpolation = _RESAMPLING.get(about.get("resample", 3))
    if interpolation is None:
        raise ValueError(
            f"{path}: resample={about['resample']} is not supported: it has to be 2 (bilinear) or 3 (bicubic)"
        )
    if side != size:
        warnings.warn(
            f"{path} scales pictures to {side} and the model takes {size}: scaled to {size} here; "
            f"data.resize={side} does as it says",
            stacklevel=4,
        )
    return {
        "size": size, "mean": _colours(path, about, "image_mean"), "std": _colours(path, about, "image_std"),
        "interpolation": interpolation, "resize_mode": "shortest" if shortest else "squash", "fill_color": 0,
    }  # fmt: skip


def _processor(folder: Path) -> tuple[Path, dict] | None:
    """The file that says how pictures are made, and what it says; None if there is none. Raises ValueError for a damaged one."""
    for name in (PROCESSOR, PREPROCESSOR):  # as transformers looks for it
        path = folder / name
        about = read_json_object(path) if path.is_file() else {}
        if name == PROCESSOR:
            about = about.get("image_processor") or {}
        if not isinstance(about, dict):
            raise ValueError(f"{path} is damaged: its image_processor is a {type(about).__name__}")
        if about:
            return path, about
    return None


def _colours(path: Path, about: dict, key: str) -> list[float]:
    values = about.get(key)
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)):
        raise ValueError(f"{path}: {key}={values}: it has to be three numbers, of red, green and blue")
    return [float(value) for value in values]

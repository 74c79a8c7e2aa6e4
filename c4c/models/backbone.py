"""Backbones by name, and what each brings along: towers, and how pictures and captions are made for them."""

import difflib
import json
from contextlib import suppress
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from c4c.config import Config
from c4c.models import towers
from c4c.models.tokenizer_spec import describe
from c4c.settings import ModelConfig
from pipelines.hub import mind_the_network
from pipelines.preprocess import Preprocess
from pipelines.tokens import CLIPS, Tokenizer

open_clip.add_model_config(Path(__file__).parent / "backbones")

HUB, FOLDER = "hf-hub:", "local-dir:"
_CONFIG = "open_clip_config.json"
_KEPT = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias")
_MODES = ("shortest", "longest", "squash")


class UnknownBackbone(ValueError):
    """No model of that name, or one that cannot be used; the message says why."""


def named(backbone: str, tag: str = "") -> dict:
    """The spec (see c4c.models.towers) of any name that open_clip knows, hf-hub:ID, local-dir:DIR or a folder with a config.

    tag: of open_clip's weights for it, whose activation and preprocessing count. Raises UnknownBackbone.
    """
    config, preprocess = _config(backbone)
    if tag and (published := open_clip.get_pretrained_cfg(backbone, tag)):
        config["quick_gelu"] = bool(config.get("quick_gelu") or published.get("quick_gelu"))
        preprocess = published
    try:
        return _spec(config, preprocess, backbone)
    except UnknownBackbone as error:
        raise UnknownBackbone(f"model.backbone={backbone} cannot be used: {error}") from error


def _config(backbone: str) -> tuple[dict, dict]:
    """open_clip's model config, and how pictures are made for it."""
    if backbone.startswith(HUB):
        return _split(_fetched(backbone.removeprefix(HUB)), backbone)
    if (folder := folder_of(backbone)) is not None:
        try:
            about = json.loads((folder / _CONFIG).read_text())
        except FileNotFoundError as error:
            raise UnknownBackbone(f"model.backbone={backbone}: there is no {folder / _CONFIG}") from error
        except (OSError, ValueError) as error:
            raise UnknownBackbone(f"model.backbone={backbone}: {folder / _CONFIG} cannot be read ({error})") from error
        return _split(about, backbone)
    if (config := open_clip.get_model_config(backbone)) is None:
        near = difflib.get_close_matches(backbone.replace("/", "-"), open_clip.list_models(), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UnknownBackbone(
            f"model.backbone={backbone}: open_clip knows no such model. {hint}python -m c4c.backbones lists all"
        )
    return config, usual_preprocess(backbone)


def folder_of(backbone: str) -> Path | None:
    """The folder that a backbone's name means, None if it means none."""
    if backbone.startswith(FOLDER):
        return Path(backbone.removeprefix(FOLDER))
    return Path(backbone) if (Path(backbone) / _CONFIG).is_file() else None


def _split(about: object, backbone: str) -> tuple[dict, dict]:
    config = about.get("model_cfg", about) if isinstance(about, dict) else None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise UnknownBackbone(f"model.backbone={backbone}: its {_CONFIG} describes no towers (model_cfg)")
    assert isinstance(about, dict)
    return config, about.get("preprocess_cfg", {})


def _fetched(repository: str) -> dict:
    mind_the_network()
    try:
        path = open_clip.pretrained.download_pretrained_from_hf(repository, filename=_CONFIG)
        return json.loads(Path(path).read_text())
    except Exception as error:  # hubs fail in many ways
        raise UnknownBackbone(
            f"model.backbone={HUB}{repository}: its {_CONFIG} is not here and could not be fetched "
            f"({type(error).__name__}). Fetch https://huggingface.co/{repository} on a machine with a network, and name its "
            f"folder: {FOLDER}DIR"
        ) from error


def _spec(config: dict, preprocess: dict, backbone: str) -> dict:
    """What is kept of open_clip's config, complete. Raises UnknownBackbone, without the name."""
    spec = {"quick_gelu": False} | {key: value for key, value in config.items() if key in _KEPT}
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    for name, given, kind in (("vision_cfg", vision, CLIPVisionCfg), ("text_cfg", text, CLIPTextCfg)):
        if unknown := given.keys() - {f.name for f in fields(kind)}:
            raise UnknownBackbone(
                f"its {name} has {', '.join(sorted(unknown))}, which open_clip {open_clip.__version__} does not know"
            )
    size = vision.get("image_size", 224)
    if not isinstance(size, int) and len(set(size)) > 1:
        raise UnknownBackbone(f"it takes pictures of {size[1]}x{size[0]}, and c4c makes square ones")
    model = vision.get("timm_model_name")
    if model and not timm.is_model(model):
        raise UnknownBackbone(f"its image tower is {model}, which timm {timm.__version__} does not have")
    if "hf_model_name" in text:
        spec["hf_config"] = config.get("hf_config") or _hugging_face(text["hf_model_name"])
    spec["preprocess_cfg"] = _pictures(preprocess, towers.image_size(spec))
    folder = folder_of(backbone)
    spec["tokenizer"] = describe(config, backbone if folder is None else f"{FOLDER}{folder}")
    return spec


@lru_cache(maxsize=16)
def _hugging_face(name: str) -> dict:
    from transformers import AutoConfig

    mind_the_network()
    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except Exception as error:  # the hub fails in many ways
        raise UnknownBackbone(
            f"the configuration of its text tower, Hugging Face's {name}, is not here and could not be fetched "
            f"({type(error).__name__}). Fetch it on a machine with a network (hf download {name}) and copy ~/.cache/huggingface"
        ) from error


def _pictures(given: dict, size: int) -> dict:
    """All of open_clip's preprocess_cfg, plain."""
    default = PreprocessCfg()
    mean, std = (_three(given.get(key) or getattr(default, key)) for key in ("mean", "std"))
    mode = given.get("resize_mode") or default.resize_mode
    interpolation = given.get("interpolation") or default.interpolation
    if mode not in _MODES:
        raise UnknownBackbone(f"its pictures are resized by {mode!r}, which is none of {', '.join(_MODES)}")
    if interpolation == "random":  # of training: open_clip evaluates by bicubic then
        interpolation = "bicubic"
    return {"size": size, "mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode,
            "fill_color": given.get("fill_color") or 0}  # fmt: skip


def _three(value: float | list | tuple) -> list[float]:
    return list(map(float, value)) if isinstance(value, list | tuple) else [float(value)] * 3


def usual_preprocess(backbone: str) -> dict:
    """How pictures are made for most of open_clip's weights of a backbone; CLIP's way where it has none."""
    ways = [published_preprocess(backbone, tag) for tag in open_clip.list_pretrained_tags_by_model(backbone)]
    return max(ways, key=ways.count, default={})


def other_tags(backbone: str) -> dict[str, dict]:
    """Specs of open_clip's weights of a backbone that are used in another way than its name alone says, by tag."""
    specs = {tag: named(backbone, tag) for tag in open_clip.list_pretrained_tags_by_model(backbone)}
    usual = way(named(backbone))
    return {tag: spec for tag, spec in specs.items() if way(spec) != usual}


def way(spec: dict) -> str:
    """How pictures are made for towers, and their activation: what no weights tell."""
    known = preprocess_of(spec)
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (known.mean, known.std))
    activation = "QuickGELU" if spec["quick_gelu"] else "GELU"
    return f"{activation}, pixels of mean [{mean}] and std [{std}], {known.resize_mode}, {known.interpolation}"


def published_preprocess(backbone: str, tag: str) -> dict:
    """How pictures are made for open_clip's weights `tag`, without their size."""
    about = open_clip.get_pretrained_cfg(backbone, tag)
    return {key: about[key] for key in ("mean", "std", "interpolation", "resize_mode") if about.get(key) is not None}


def preprocess_of(spec: dict) -> Preprocess:
    """What a spec's towers take, for `DataConfig.filled`. A spec of before there was such a thing: as CLIP's."""
    known = _pictures(spec.get("preprocess_cfg", {}), towers.image_size(spec))
    return Preprocess(
        image_size=towers.image_size(spec), mean=tuple(known["mean"]), std=tuple(known["std"]),
        interpolation=known["interpolation"], resize_mode=known["resize_mode"], fill=known["fill_color"],
        max_words=towers.context_length(spec),
    )  # fmt: skip


def of_size(spec: dict) -> list[str]:
    """Names of the backbones whose towers are as large, those with the same activation first."""
    fits = []
    for name in open_clip.list_models():
        with suppress(ValueError):
            config = {"quick_gelu": False} | open_clip.get_model_config(name)
            if towers.sizes(config) == towers.sizes(spec):
                fits.append((config["quick_gelu"] != spec["quick_gelu"], len(name), name))
    return [name for *_, name in sorted(fits)]


def settled(config: Config) -> Config:
    """The configuration with what its `data` leaves to the backbone filled in. Raises ValueError for a backbone that cannot be used."""
    return replace(config, data=config.data.filled(preprocess_of(spec_of(config.model))))


def spec_of(model: ModelConfig) -> dict:
    """The spec of the towers that a run starts from, before any weights are read. Raises ValueError."""
    from c4c.models.weights import stated  # which reads what this describes

    if model.init_from and (spec := stated(model.init_from)) is not None:
        return spec
    tags = open_clip.list_pretrained_tags_by_model(model.backbone)
    return named(model.backbone, model.init_from if model.init_from in tags else "")


def with_padding(spec: dict) -> dict:
    """The spec with the token that fills captions up, as heads that look at words need it: `pad_id` and `pad_ends` of its tokenizer.

    Raises ValueError if the tokenizer cannot be had.
    """
    about = spec.get("tokenizer", CLIPS)
    if about["kind"] == "clip" or "pad_id" in about:
        return spec
    tokenizer = Tokenizer(about)
    length = tokenizer.context_length
    full = tokenizer(["word " * length], length)[0]  # without padding: then its last token is the end
    return spec | {"tokenizer": about | {"pad_id": tokenizer.pad_id, "pad_ends": bool(full[-1] == tokenizer.pad_id)}}


def other_towers(before: dict, now: dict) -> list[str]:
    """What of two specs differs that changes features."""
    keys = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text")
    return [key for key in keys if before.get(key) != now.get(key)]

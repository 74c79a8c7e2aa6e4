"""open_clip's checkpoints: a state dict, bare or as its training wraps it, and folders with open_clip_config.json.

The names of a state dict do not tell the activation or the heads: those come from the backbone that the user names, or from the
folder's config. Layouts that open_clip's own load_checkpoint converts are converted here by open_clip's functions.
"""

import warnings
from contextlib import suppress
from pathlib import Path

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.factory import _find_checkpoint_in_dir, parse_model_name
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor

from c4c.models import towers
from c4c.models.backbone import named, other_tags, way
from c4c.models.weights import openai
from c4c.models.weights.base import Content, Unsaid, Weights, floats
from pipelines.hub import mind_the_network

CONFIG = "open_clip_config.json"
_MARKS = ("visual.conv1.weight", "visual.trunk.", "image_encoder.model.")  # ViT or ResNet, timm, Apple's MobileCLIP


def matches(content: Content) -> bool:
    """Whether it holds an image tower by open_clip's names, or by one that open_clip converts."""
    return any(name.startswith(_MARKS) for name in content.state)


def read(content: Content, spec: dict | None) -> Weights:
    """spec: towers that the user named; None: none. Raises Unsaid where they have to be named, and ValueError."""
    if spec is None:
        raise Unsaid(
            "weights of open_clip do not say which activation (GELU or QuickGELU) or attention heads their towers have. "
            f"{openai.name_the_backbone()}{_of_this_size(content.state)}"
        )
    state = in_names_of(spec, content.state)
    with suppress(ValueError):  # a plain ViT or ResNet, which can be measured
        spec = openai.fitted(openai.measured(state) | {"quick_gelu": spec["quick_gelu"]}, spec)
    return Weights(floats({f"clip.{name}": tensor for name, tensor in state.items()}), spec, kind="open_clip")


def read_big_vision(path: Path, spec: dict | None) -> Weights:
    """SigLIP's weights as big_vision publishes them, an .npz. Raises ValueError."""
    if spec is None:
        raise Unsaid(f"{path}: weights of big_vision do not say what they are of. {openai.name_the_backbone()}")
    model = towers.build(spec)
    try:
        load_big_vision_weights(model, str(path))
    except Exception as error:  # whatever a missing array or another shape leads to
        raise ValueError(
            f"{path}: no weights of big_vision for these towers ({type(error).__name__}: {error})"
        ) from error
    return Weights({f"clip.{k}": v for k, v in model.state_dict().items()}, spec, kind="open_clip")


def in_names_of(spec: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any of open_clip's ages in the names of the towers that it builds today from `spec`.

    What has no place there is left out: CoCa's text decoder (with a warning), masks and indices that are no weights.
    """
    custom = towers.is_custom(spec)
    if any(name.startswith("image_encoder.model.") for name in state):
        with torch.device("meta"):
            model = towers.build(spec)
        state = convert_state_dict(model, state)
    if custom and not any(name.startswith("text.") for name in state):
        state = convert_to_custom_text_state_dict(state)
    elif not custom:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    decoder = [name for name in state if name.startswith("text_decoder.")]
    if decoder:
        warnings.warn("CoCa's text decoder is left out: retrieval uses the two towers only", stacklevel=3)
    useless = ("attn_mask", ".position_ids")
    state = {k: v for k, v in state.items() if not (k in decoder or k.endswith(useless))}
    if spec.get("init_logit_bias") is not None and "logit_bias" not in state and "logit_scale" in state:
        # as open_clip starts SigLIP's loss from CLIP's weights
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    for name in ("logit_scale", "logit_bias"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    return state


def located(name: str) -> Path:
    """The file of weights that `local-dir:DIR` or `hf-hub:ID` stands for. Raises ValueError."""
    schema, place = parse_model_name(name)
    if schema == "local-dir":
        if (file := _find_checkpoint_in_dir(Path(place))) is None:
            raise ValueError(f"{name} has {CONFIG}, but no weights (open_clip_model.safetensors or the like)")
        return Path(file)
    mind_the_network()
    try:
        return Path(download_pretrained_from_hf(place))
    except Exception as error:  # hubs fail in many ways
        raise ValueError(
            f"{name}: the weights are not here and could not be fetched ({type(error).__name__}). Fetch "
            f"https://huggingface.co/{place} on a machine with a network, copy the folder, and name it as local-dir:FOLDER"
        ) from error


def folder_of_file(path: Path) -> str | None:
    """The `local-dir:DIR` that a file of weights lies in; None if no config lies beside it."""
    return f"local-dir:{path.parent}" if path.is_file() and (path.parent / CONFIG).is_file() else None


def how_to_fetch(backbone: str, tag: str, called: str = "") -> str:
    """How open_clip's weights `tag` get to a machine without a network, with all that goes with them. called: see `read_backbone`."""
    keep, instead = (called, "name instead ") if called else (f"model.init_from={tag}", "set model.init_from=")
    hub = "/".join(open_clip.get_pretrained_cfg(backbone, tag).get("hf_hub", "").split("/")[:2])
    return (
        f"On a machine with a network: hf download {hub}. Copy its ~/.cache/huggingface here and keep {keep}; or "
        f"copy the folder of https://huggingface.co/{hub}, with its {CONFIG}, and {instead}local-dir:DIR. The weights "
        f"alone do not say how they are used: {way(named(backbone, tag))}"
    )


def warn_of_other_tags(path: Path, backbone: str) -> None:
    """Say what is taken for granted of a file that may be one of several of open_clip's, which are used in different ways."""
    tags: dict[str, list[str]] = {}
    for tag, spec in other_tags(backbone).items():
        tags.setdefault(way(spec), []).append(tag)
    if tags:
        others = "; ".join(f"{', '.join(names)}: {how}" for how, names in tags.items())
        warnings.warn(
            f"{path} does not say which of open_clip's weights of {backbone} it is, and is used with {way(named(backbone))}. "
            f"Others are used differently ({others}). If it is one of those, put its {CONFIG} beside it",
            stacklevel=4,
        )


def _of_this_size(state: dict[str, Tensor]) -> str:
    """A sentence on the backbones whose weights have the same names and shapes."""
    names = fitting(state)
    return f". Of this size are {openai.listed(names)}" if names else ". No backbone that open_clip knows has this size"


def fitting(state: dict[str, Tensor]) -> list[str]:
    """Names of open_clip's backbones that have exactly these weights, shortest names first."""
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if _may_fit(state, config):
            with suppress(ValueError, RuntimeError, KeyError, AttributeError, ImportError), torch.device("meta"):
                spec = named(name)
                own = {k: v.shape for k, v in towers.build(spec).state_dict().items()}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    here = {k: v.shape for k, v in in_names_of(spec, state).items()}
                if own == here:
                    names.append(name)
    return sorted(names, key=lambda name: (len(name), name))


def _may_fit(state: dict[str, Tensor], config: dict) -> bool:
    """Whether the few numbers that a config states agree with the weights: building all of them would take minutes."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    timm = any(name.startswith("visual.trunk.") for name in state)
    if timm != ("timm_model_name" in vision) or "hf_model_name" in text:
        return False
    prefix = "text." if "text.token_embedding.weight" in state else ""
    tokens, places = (state.get(f"{prefix}{name}") for name in ("token_embedding.weight", "positional_embedding"))
    if tokens is None or places is None or "text_projection" not in state | {"text_projection": None}:
        return False
    # CoCa's text tower has one position more than its config says, for its own class token
    expected = (text.get("vocab_size", 49408), text.get("width", 512))
    if tuple(tokens.shape) != expected or len(places) - text.get("context_length", 77) not in (0, 1):
        return False
    conv = state.get("visual.conv1.weight")
    if timm or conv is None or isinstance(vision.get("layers"), list):
        return timm or isinstance(vision.get("layers"), list) == ("visual.layer1.0.conv1.weight" in state)
    return tuple(conv.shape[::3]) == (vision.get("width", 768), vision.get("patch_size", 16))

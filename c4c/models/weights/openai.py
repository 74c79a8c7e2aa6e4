"""OpenAI's CLIP: a TorchScript archive, or its state dict. Its tensors' shapes and its family say everything of its towers."""

import warnings

import open_clip
from torch import Tensor

from c4c.models import towers
from c4c.models.weights.base import ARCHIVE_EXTRAS, Content, Unsaid, Weights, floats

_NAMED = 6  # backbones that an error names


def matches(content: Content) -> bool:
    """Whether OpenAI wrote it: nobody else keeps the sizes of the model among its weights."""
    return bool(ARCHIVE_EXTRAS & content.state.keys()) and "visual.conv1.weight" in content.state


def read(content: Content, spec: dict | None) -> Weights:
    """spec: towers that the user named; None: none. Raises ValueError."""
    state = {name: tensor for name, tensor in content.state.items() if name not in {*ARCHIVE_EXTRAS, "attn_mask"}}
    spec = family_spec(measured(state), spec, "OpenAI's")
    return Weights(floats({f"clip.{name}": tensor for name, tensor in state.items()}), spec, kind="OpenAI")


def family_spec(own: dict, named: dict | None, whose: str) -> dict:
    """The towers of weights whose family says QuickGELU and heads of width 64; own: their sizes; named: the user's towers.

    Raises Unsaid where backbones of that size have heads of another width, and none is named.
    """
    if named is None:
        other = [name for name, spec in _of_size(own) if _head_widths(spec) != _head_widths(own)]
        if other:
            raise Unsaid(
                f"its towers are as large as those of {listed(other)}, whose attention heads are not {towers.HEAD_WIDTH} wide, and "
                f"the weights do not say which they have. {name_the_backbone()}"
            )
        return own
    if (named := fitted(own, named)) is own:
        return own
    if _head_widths(named) != _head_widths(own):
        return named
    if not named.get("quick_gelu"):
        warnings.warn(
            f"the backbone named has the activation GELU, but weights of {whose} have QuickGELU, which is used: name the "
            "backbone that ends in -quickgelu",
            stacklevel=3,
        )
    return named | {"quick_gelu": True}


def name_the_backbone() -> str:
    """What to do where weights do not say what they are."""
    return "Name the backbone they were trained as: --backbone NAME, in training model.backbone=NAME"


def listed(names: list[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def fitted(own: dict, named: dict) -> dict:
    """The towers named, for pictures of the size that the weights are for; `own`, what the weights measure, if those are of other sizes.

    Other sizes are refused by whoever knows what was named (see `differing`).
    """
    differ = differing(own, named)
    if differ and set(differ) != {"picture size"}:
        return own
    if not differ:
        return named
    size = towers.image_size(own)
    pixels = {"preprocess_cfg": named["preprocess_cfg"] | {"size": size}} if "preprocess_cfg" in named else {}
    return named | {"vision_cfg": named["vision_cfg"] | {"image_size": size}} | pixels


def differing(one: dict, other: dict) -> list[str]:
    """Names of the sizes in which two descriptions of towers differ. Raises ValueError for what is no description."""
    sizes, others = towers.sizes(one), towers.sizes(other)
    return [key for key in sizes | others if sizes.get(key) != others.get(key)]


def _of_size(spec: dict) -> list[tuple[str, dict]]:
    """Plain backbones of open_clip that are as large."""
    fits = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        plain = isinstance(config["vision_cfg"].get("layers"), int) and "hf_model_name" not in config["text_cfg"]
        config.setdefault("quick_gelu", False)
        if plain and "timm_model_name" not in config["vision_cfg"] and not differing(config, spec):
            fits.append((name, config))
    return fits


def _head_widths(spec: dict) -> tuple[float, float]:
    vision, text = towers.parts(spec)
    return vision.head_width, text.width / text.heads


def measured(state: dict[str, Tensor]) -> dict:
    """The towers that a state dict in OpenAI's names fits, from its tensors' shapes: QuickGELU, heads of width 64.

    Raises ValueError naming what is missing.
    """
    resnet = "visual.layer1.0.conv1.weight" in state
    image = ("visual.attnpool.positional_embedding",) if resnet else ("visual.positional_embedding", "visual.proj")
    needed = ("visual.conv1.weight", *image, "positional_embedding", "token_embedding.weight", "ln_final.weight",
              "text_projection")  # fmt: skip
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(f"these are not the weights of a CLIP ViT or ResNet: {', '.join(absent)} missing")
    text_width = len(state["ln_final.weight"])
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": _resnet(state) if resnet else _vit(state),
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": max(1, text_width // towers.HEAD_WIDTH),
            "layers": _depth(state, "transformer.resblocks."),
            "mlp_ratio": _ratio(state, "transformer.resblocks.0.mlp.c_fc.weight"),
        },
    }


def _vit(state: dict[str, Tensor]) -> dict:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "image_size": patch * grid,
        "patch_size": patch,
        "width": width,
        "layers": _depth(state, "visual.transformer.resblocks."),
        "head_width": towers.HEAD_WIDTH,
        "mlp_ratio": _ratio(state, "visual.transformer.resblocks.0.mlp.c_fc.weight"),
    }


def _resnet(state: dict[str, Tensor]) -> dict:
    """A picture is halved five times before attention pools it."""
    grid = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    width = len(state["visual.layer1.0.conv1.weight"])
    layers = [_depth(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {"image_size": 32 * grid, "layers": layers, "width": width, "head_width": towers.HEAD_WIDTH}


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _ratio(state: dict[str, Tensor], name: str) -> float:
    out, width = state[name].shape if name in state else (4, 1)
    return out / width

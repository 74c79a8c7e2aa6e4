"""CLIP's two towers, described by a plain dict in open_clip's own form:

{"embed_dim", "quick_gelu", "vision_cfg": {...}, "text_cfg": {...}}
"""

import logging
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

open_clip.add_model_config(Path(__file__).parent / "backbones")


HEAD_WIDTH = 64  # of attention heads where nothing says: OpenAI's


def named(backbone: str) -> dict:
    """The towers of a model that open_clip, or c4c/backbones, knows. Raises ValueError if it has no plain ViT and text tower."""
    spec = open_clip.get_model_config(backbone)
    if spec is None:
        raise ValueError(
            f"model.backbone={backbone}: open_clip knows no such model. Names are like ViT-B-32, ViT-B-16, ViT-L-14; "
            "python -c 'import open_clip; print(open_clip.list_models())' prints all"
        )
    known = ({f.name for f in fields(CLIPVisionCfg)}, {f.name for f in fields(CLIPTextCfg)})
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    plain = isinstance(vision.get("layers"), int) and "timm_model_name" not in vision and "hf_model_name" not in text
    if (
        not plain
        or spec.get("custom_text")
        or "multimodal_cfg" in spec
        or not (vision.keys() <= known[0] and text.keys() <= known[1])
    ):
        raise ValueError(
            f"model.backbone={backbone}: its towers are not a ViT and CLIP's text transformer; choose a plain ViT"
        )
    return {
        "embed_dim": spec["embed_dim"],
        "quick_gelu": spec.get("quick_gelu", False),
        "vision_cfg": vision,
        "text_cfg": text,
    }


def sizes(spec: dict) -> dict[str, int]:
    """What the shapes of the weights depend on, by names for people. Raises ValueError if `spec` is no description of towers."""
    vision, text = parts(spec)
    return {
        "picture size": vision.image_size, "patch size": vision.patch_size, "width": vision.width, "layers": vision.layers,
        "text width": text.width, "text layers": text.layers, "words": text.context_length, "vocabulary": text.vocab_size,
        "feature size": spec["embed_dim"],
    }  # fmt: skip


def parts(spec: dict) -> tuple[CLIPVisionCfg, CLIPTextCfg]:
    """The two towers' own settings. Raises ValueError if `spec` is no description of towers."""
    try:
        vision, text = CLIPVisionCfg(**spec["vision_cfg"]), CLIPTextCfg(**spec["text_cfg"])
        _ = spec["embed_dim"], spec["quick_gelu"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of the towers is damaged ({type(error).__name__}: {error})") from error
    return vision, text


def of_size(spec: dict) -> list[str]:
    """Names of the backbones whose towers are as large, those with the same activation first."""
    fits = []
    for name in open_clip.list_models():
        with suppress(ValueError):
            if sizes(own := named(name)) == sizes(spec):
                fits.append((own["quick_gelu"] != spec["quick_gelu"], len(name), name))
    return [name for *_, name in sorted(fits)]


def build(spec: dict) -> CLIP:
    """Towers with random weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that it loaded no weights
    try:
        vision, text = CLIPVisionCfg(**spec["vision_cfg"]), CLIPTextCfg(**spec["text_cfg"])
        return CLIP(spec["embed_dim"], vision, text, quick_gelu=spec["quick_gelu"])
    finally:
        logging.disable(before)


def measured(state: dict[str, Tensor], quick_gelu: bool) -> dict:
    """The towers that a state dict in OpenAI's names fits, from its tensors' shapes; attention heads are width // 64.

    Raises ValueError naming what is missing.
    """
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "positional_embedding",
              "token_embedding.weight", "ln_final.weight", "text_projection")  # fmt: skip
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(f"these are not the weights of a CLIP ViT: {', '.join(absent)} missing")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    text_width = len(state["ln_final.weight"])
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": patch * grid,
            "patch_size": patch,
            "width": width,
            "layers": _depth(state, "visual.transformer.resblocks."),
            "head_width": HEAD_WIDTH,
            "mlp_ratio": _ratio(state, "visual.transformer.resblocks.0.mlp.c_fc.weight"),
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": max(1, text_width // HEAD_WIDTH),
            "layers": _depth(state, "transformer.resblocks."),
            "mlp_ratio": _ratio(state, "transformer.resblocks.0.mlp.c_fc.weight"),
        },
    }


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _ratio(state: dict[str, Tensor], name: str) -> float:
    out, width = state[name].shape if name in state else (4, 1)
    return out / width


class VideoTransformer3d(VisionTransformer):
    """CLIP's ViT with a patch embedding that also spans three frames; takes [M, F, 3, H, W], gives [M * F, D].

    Made from a 2d one by `to_3d`. The centre tap starts as the 2d kernel and the others as zeros, so at first nothing
    changes. The 2d kernel stays in the state dict, unused, as in CLIP4Clip.
    """

    def _embeds(self, video: Tensor) -> Tensor:
        # [M, F, 3, H, W] -> [M, W, F, gh, gw] -> [M * F, gh * gw, W]
        x = self.conv2(video.transpose(1, 2)).transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype))


def to_3d(visual: VisionTransformer) -> None:
    """Give a ViT the 3d patch embedding, in place."""
    kernel = visual.conv1.weight
    width, _, height, across = kernel.shape
    visual.conv2 = nn.Conv3d(3, width, (3, height, across), stride=(1, height, across), padding=(1, 0, 0), bias=False)
    with torch.no_grad():
        visual.conv2.weight.zero_()
        visual.conv2.weight[:, :, 1] = kernel
    kernel.requires_grad_(False)
    visual.__class__ = VideoTransformer3d

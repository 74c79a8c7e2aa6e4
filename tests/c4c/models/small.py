"""Small models of every kind of tower, with random weights, and what they say of a few clips and captions."""

import json
from typing import Any

import open_clip
import torch

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.tokenizer_spec import depends_on_padding

SPEC: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}
_TEXT = {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 4, "layers": 2}
_SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def spec(**changes: Any) -> dict:
    """A copy of SPEC with other values."""
    return json.loads(json.dumps(SPEC)) | changes


def timm(name: str, size: int, **others: Any) -> dict:
    """Of an image tower of timm's."""
    vision = {"image_size": size, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    return {"embed_dim": 64, "quick_gelu": False, "vision_cfg": vision | others, "text_cfg": dict(_TEXT)}


# a family, and the towers of it that are the quickest
FAMILIES: dict[str, dict] = {
    "ViT": {"embed_dim": 48, "quick_gelu": False, "text_cfg": dict(_TEXT),
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}},
    "ResNet": {"embed_dim": 64, "quick_gelu": False, "text_cfg": dict(_TEXT),
               "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}},
    "custom text": {"embed_dim": 64, "quick_gelu": True, "custom_text": True, "text_cfg": dict(_TEXT),
                    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}},
    "CoCa": {"embed_dim": 64, "quick_gelu": False, "custom_text": True,
             "text_cfg": _TEXT | {"embed_cls": True, "output_tokens": True},
             "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32,
                            "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}},
    "ConvNeXt": timm("convnext_atto", 64),
}  # fmt: skip


def tiny(head: str = "meanP", patch: str = "2d", seed: int = 0, spec: dict = SPEC) -> CLIP4Clip:
    """Of seeded weights, none of which is zero: what is left out or exchanged shows."""
    torch.manual_seed(seed)
    model = CLIP4Clip(spec, head, patch, blocks=2, segments=4).eval()
    for parameter in model.parameters():
        if parameter.numel() == 1 or parameter.std() == 0:
            torch.nn.init.normal_(parameter, float(parameter.detach().mean()), 0.02)
    return model


def clip_state(seed: int = 0) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in tiny(seed=seed).clip.state_dict().items()}


def clips(model: CLIP4Clip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames, mask and captions."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(3, 4, 3, model.image_size, model.image_size, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    tokens = torch.tensor([[998, 5, 999, 0], [998, 7, 8, 999], [998, 999, 0, 0]])
    if depends_on_padding(model.spec["text_cfg"]):
        tokens = torch.nn.functional.pad(tokens, (0, model.context_length - 4))
    return frames, mask, tokens


def scores(model: CLIP4Clip) -> torch.Tensor:
    frames, mask, tokens = clips(model)
    with torch.no_grad():
        return model.similarity(model.encode_text(tokens), model.encode_video(frames, mask), mask)


def register(monkeypatch, name: str, spec: dict) -> None:
    """Have open_clip know a backbone until the test ends."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, spec)

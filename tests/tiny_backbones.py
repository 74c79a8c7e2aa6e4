"""A small backbone of every family that open_clip builds, under names that model.backbone takes once `register` was called.

The real configs' kinds of towers at a fraction of their size; a process of a test's own has to register them again.
"""

import json
import tempfile
from functools import partial
from pathlib import Path

import open_clip
from timm.models import convnext, eva, fastvit, register_model, vision_transformer, vitamin

SIZE = 32  # of pictures, pixels
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
_PLAIN = {"image_size": SIZE, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}


@register_model
def tiny_pe(pretrained: bool = False, **kwargs):
    args = {
        "img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "global_pool": "map",
        "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "ref_feat_shape": (2, 2),
        "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 2.0,
    }  # fmt: skip
    return eva._create_eva("vit_pe_core_tiny_patch16_384", pretrained=False, **args | kwargs)


@register_model
def tiny_eva02(pretrained: bool = False, **kwargs):
    args = {
        "img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_fused": False, "mlp_ratio": 8 / 3,
        "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True, "ref_feat_shape": (2, 2),
        "global_pool": "token",
    }  # fmt: skip
    return eva._create_eva("eva02_base_patch16_clip_224", pretrained=False, **args | kwargs)


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs):
    args = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False,
            "global_pool": "map"}  # fmt: skip
    return vision_transformer._create_vision_transformer(
        "vit_base_patch16_siglip_224", pretrained=False, **args | kwargs
    )


@register_model
def tiny_convnext(pretrained: bool = False, **kwargs):
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)}
    return convnext._create_convnext("convnext_tiny", pretrained=False, **args | kwargs)


@register_model
def tiny_fastvit(pretrained: bool = False, **kwargs):
    args = {
        "layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32), "mlp_ratios": (2, 2, 2, 2), "se_downsamples": (False, False, True, True),
        "pos_embs": (None, None, None, partial(fastvit.RepConditionalPosEnc, spatial_shape=(7, 7))),
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"), "lkc_use_act": True,
    }  # fmt: skip
    return fastvit._create_fastvit("fastvit_mci0", pretrained=False, **args | kwargs)


@register_model
def tiny_vitamin(pretrained: bool = False, **kwargs):
    embed = vitamin.VitCfg(
        embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8, head_type="1d",
        conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    )  # fmt: skip
    args = {"img_size": SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_layer": vitamin.GeGluMlp, "mlp_ratio": 2.0,
            "class_token": False, "global_pool": "avg", "embed_cfg": embed}  # fmt: skip
    return vitamin._create_vitamin("vitamin_small_224", pretrained=False, **args | kwargs)


def _timm(name: str, pool: str | None, proj: str | None) -> dict:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": SIZE}


def _roberta(folder: Path) -> str:
    """A folder with the configuration of a small Hugging Face text model."""
    from transformers import RobertaConfig

    RobertaConfig(
        vocab_size=49408, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
        max_position_embeddings=90,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def configs(folder: Path) -> dict[str, dict]:
    """open_clip's model config of each family, by the name it is registered under. folder: for files that they name."""
    custom = {"embed_dim": 32, "custom_text": True}
    return {
        "tiny-vit": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": _PLAIN, "text_cfg": _TEXT},
        "tiny-resnet": {
            "embed_dim": 32, "text_cfg": _TEXT,
            "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
        },
        "tiny-coca": custom | {
            "vision_cfg": _PLAIN | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True},
            "text_cfg": _TEXT | {"context_length": 20, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
        },
        "tiny-pe": custom | {"vision_cfg": _timm("tiny_pe", "map", None), "text_cfg": _TEXT | {"context_length": 32}},
        "tiny-eva02": custom | {"vision_cfg": _timm("tiny_eva02", "token", None), "text_cfg": _TEXT},
        "tiny-sigmoid": custom | {
            "init_logit_bias": -10, "vision_cfg": _timm("tiny_siglip", "map", "none"),
            "text_cfg": _TEXT | {"context_length": 20, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        },
        "tiny-convnext": {"embed_dim": 32, "vision_cfg": _timm("tiny_convnext", "", "linear"), "text_cfg": _TEXT},
        "tiny-fastvit": custom | {"vision_cfg": _timm("tiny_fastvit", "avg", None), "text_cfg": _TEXT | {"no_causal_mask": True}},
        "tiny-vitamin": custom | {"vision_cfg": _timm("tiny_vitamin", "", "linear"), "text_cfg": _TEXT},
        "tiny-roberta": {
            "embed_dim": 32, "vision_cfg": _PLAIN,
            "text_cfg": {"hf_model_name": _roberta(folder / "roberta"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"},
        },
    }  # fmt: skip


NAMES = ("tiny-vit", "tiny-resnet", "tiny-coca", "tiny-pe", "tiny-eva02", "tiny-sigmoid", "tiny-convnext", "tiny-fastvit",
         "tiny-vitamin", "tiny-roberta")  # fmt: skip
_registered: list[tempfile.TemporaryDirectory] = []


def register() -> None:
    """Tell open_clip of them, once a process."""
    if _registered:
        return
    folder = tempfile.TemporaryDirectory(prefix="c4c-backbones-")
    _registered.append(folder)
    made = configs(Path(folder.name))
    assert tuple(made) == NAMES
    (Path(folder.name) / "configs").mkdir()
    for name, config in made.items():
        (Path(folder.name) / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path(folder.name) / "configs")

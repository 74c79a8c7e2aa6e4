"""How many floating point operations a step is made of, and how many a known GPU can do."""

import torch

from c4c.performance.hardware import peak_flops


def per_pair(spec: dict, frames: int, words: int) -> float:
    """Of the forward pass of the towers for one (video, caption) pair; a multiplication and an addition are two.

    The heads are left out: small beside the towers. spec: see c4c.models.towers.
    """
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    grid = vision["image_size"] // vision["patch_size"]
    tokens = grid * grid + 1
    patches = 2 * grid * grid * 3 * vision["patch_size"] ** 2 * vision["width"]
    picture = patches + vision["layers"] * _block(tokens, vision["width"], vision.get("mlp_ratio", 4.0))
    caption = text["layers"] * _block(words, text["width"], text.get("mlp_ratio", 4.0))
    return frames * picture + caption


def _block(tokens: int, width: int, ratio: float) -> float:
    """A transformer block: four projections, the MLP, and attention's two products."""
    return 2 * tokens * width * width * (4 + 2 * ratio) + 4 * tokens * tokens * width


def peak(device: torch.device, precision: str) -> float | None:
    """Of the device in FLOP/s; None where it is not known, and in fp32, where it depends on too much else."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))

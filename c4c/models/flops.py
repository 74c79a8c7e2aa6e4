"""How many floating point operations a step is made of, and how many a known GPU can do."""

import json
from functools import lru_cache
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch.utils.flop_counter import FlopCounterMode

from c4c.merging import NO_MERGING, Merging
from c4c.models import towers
from c4c.models.text_tower import caption_features
from c4c.models.tokenizer_spec import row_length
from c4c.performance.hardware import peak_flops


def per_pair(
    spec: dict, frames: int, words: int, captions: float = 1, merging: Merging = NO_MERGING, linear_patch: str = "2d"
) -> float:
    """Of the forward pass of the towers for one (video, caption) pair; a multiplication and an addition are two.

    The heads are left out: small beside the towers. spec: see c4c.models.towers. captions: of the video, on average. merging: of
    tokens in the image tower; what it costs itself is counted too. linear_patch: as model.linear_patch; a 3d patch spans three frames.
    """
    if towers.is_plain(spec):
        text = CLIPTextCfg(**spec["text_cfg"])
        caption = text.layers * _block(words, text.width, text.mlp_ratio)
        return of_video(spec, frames, merging, 3 if linear_patch == "3d" else 1) + captions * caption
    picture, caption = counted(json.dumps(spec, sort_keys=True), words)
    return (of_video(spec, frames, merging) if merging else frames * picture) + captions * caption


def of_video(spec: dict, frames: int, merging: Merging, taps: int = 1) -> float:
    """Of the image tower, one of open_clip's ViTs, for the frames of a video. taps: frames that a patch spans."""
    vision = CLIPVisionCfg(**spec["vision_cfg"])
    width, grid = vision.width, towers.image_size(spec) // vision.patch_size
    total = frames * taps * 2.0 * grid * grid * 3 * vision.patch_size**2 * width
    for tokens in merging.plan(grid * grid, int(vision.layers)):
        clips = -(-frames // tokens.frames)
        seen = tokens.frames + tokens.patches
        total += clips * _block(seen, width, vision.mlp_ratio, seen - tokens.merged)
        if tokens.merged:  # keys of A with those of B, and the sums and sizes of what B takes
            into = tokens.patches // 2
            total += clips * 2 * into * ((tokens.patches - into) * vision.head_width + tokens.merged * (width + 1))
    return total


@lru_cache(maxsize=64)
def counted(spec: str, words: int) -> tuple[int, int]:
    """(of a picture, of a caption), counted on torch's meta device, where nothing is computed. spec: as JSON."""
    about = json.loads(spec)
    return count_towers(about, words, towers.build_on_meta(about))


def count_towers(spec: dict, words: int, clip: Any) -> tuple[int, int]:
    """As `counted`, of towers `clip` on the meta device."""
    clip.train()  # in evaluation torch fuses attention, which is not counted
    towers.keep_statistics(clip)
    clip.requires_grad_(False)  # which the counter's hooks would look for
    size, length = towers.image_size(spec), row_length(spec, words)
    picture = torch.empty(1, 3, size, size, device="meta")
    caption = torch.zeros(1, length, dtype=torch.long, device="meta")
    found = []
    for run in (lambda: clip.visual(picture), lambda: caption_features(clip, caption, words=False)):
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            run()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def _block(tokens: int, width: int, ratio: float, left: int | None = None) -> float:
    """A transformer block: four projections, the MLP, and attention's two products. left: tokens that the MLP gets; None: all."""
    left = tokens if left is None else left
    return 2 * width * width * (4 * tokens + 2 * ratio * left) + 4 * tokens * tokens * width


def peak(device: torch.device, precision: str) -> float | None:
    """Of the device in FLOP/s; None where it is not known, and in fp32, where it depends on too much else."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))

"""What the other modules know of a frame: which ones are on the extractor's grid, how large, which way up."""

from fractions import Fraction

import av
import numpy as np


class VideoError(ValueError):
    """A video that cannot be used, and why."""


def grid(number: int, fps: Fraction, rate: int) -> bool:
    """Whether frame `number` is on the official extractor's grid at `rate` frames a second.

    Second s starts at frame s*int(fps); in it, frames k*max(1, int(fps)//rate) for k < rate are taken
    (CLIP4Clip `RawVideoExtractorCV2`, with the frame rate truncated as there).
    """
    whole = max(1, int(fps))
    step = max(1, whole // rate)
    inside = number % whole
    return inside % step == 0 and inside // step < rate


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the short side at `short_side` and the long side as PIL/torchvision's Resize rounds it."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def upright(frame: av.VideoFrame, rotation: int | None = None) -> np.ndarray:
    """The frame as uint8 RGB [H, W, 3], turned the way a player would show it."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round((frame.rotation if rotation is None else rotation) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns))  # rows may come padded


def short(error: Exception) -> str:
    """A library's error in one short line."""
    return str(getattr(error, "strerror", None) or error).split("\n")[0][:160]

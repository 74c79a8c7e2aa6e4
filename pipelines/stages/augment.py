"""Which part of a picture becomes the frame, and how its look is changed in training.

All frames of a clip get the same view. What is random is drawn from a generator that counts from (seed, epoch, video,
caption), so a resumed run draws the same.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipelines.config import DataConfig
from shards.video.picture import scaled_size

_RATIO = 4 / 3  # of a random crop's sides, either way; torchvision's RandomResizedCrop
_TRIES = 10


@dataclass(frozen=True)
class View:
    """x, y, width, height of the window in a picture's own pixels, maybe fractional; it is scaled to the frame's size.

    `flip`: mirrored left to right. `brightness`, `contrast`, `saturation`: factors, 1 changes nothing."""

    x: float
    y: float
    width: float
    height: float
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def augments(config: DataConfig) -> bool:
    """Whether training changes pictures at random."""
    return config.random_crop > 0 or config.flip > 0 or config.colour > 0


def view(size: tuple[int, int], config: DataConfig, random: np.random.Generator | None = None) -> View:
    """The view of a picture of `size` (width, height): the recipe's, or with `random` one drawn from it."""
    window = _centre(size, config)
    if random is None:
        return View(*window)
    chance = random.random(8)  # always as many, so that one setting does not change what another draws
    if config.random_crop:
        window = _random_window(size, config.random_crop, random)
    factors = 1 + config.colour * (2 * chance[1:4] - 1)
    return View(*window, bool(chance[0] < config.flip), *factors.tolist())


def _centre(size: tuple[int, int], config: DataConfig) -> tuple[float, float, float, float]:
    """As torchvision's Resize to the short side and CenterCrop, as a window before the resize."""
    scaled, crop = scaled_size(*size, config.short_side), config.image_size
    start = [round((n - crop) / 2) for n in scaled]
    ratio = [n / s for n, s in zip(size, scaled, strict=True)]
    return start[0] * ratio[0], start[1] * ratio[1], crop * ratio[0], crop * ratio[1]


def _random_window(size: tuple[int, int], least: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """As torchvision's RandomResizedCrop: an area of `least` to 1 of the picture's, sides 3:4 to 4:3."""
    width, height = size
    areas = random.uniform(least, 1, _TRIES) * width * height
    ratios = np.exp(random.uniform(-math.log(_RATIO), math.log(_RATIO), _TRIES))
    places = random.random((_TRIES, 2))
    for area, ratio, (right, down) in zip(areas, ratios, places, strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(right * (width - w + 1)), int(down * (height - h + 1)), w, h
    w, h = min(width, round(height * _RATIO)), min(height, round(width * _RATIO))
    return (width - w) // 2, (height - h) // 2, w, h

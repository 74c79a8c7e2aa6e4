"""Which part of a picture becomes the frame, and how its look is changed in training.

All frames of a clip get the same view. What is random is drawn from a generator that counts from (seed, epoch, video,
caption), so a resumed run draws the same.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from pipelines.config import DataConfig
from shards.video.geometry import scaled_size

_RATIO = 4 / 3  # of a random crop's sides, either way; torchvision's RandomResizedCrop
_TRIES = 10


@dataclass(frozen=True)
class View:
    """x, y, width, height of the window in a picture's own pixels, maybe fractional; it is scaled to the frame's size, or to
    `scaled` (width, height), which stands in the middle of the frame.

    `flip`: mirrored left to right. `brightness`, `contrast`, `saturation`: factors, 1 changes nothing."""

    x: float
    y: float
    width: float
    height: float
    scaled: tuple[int, int] | None = None
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def within(self, size: tuple[int, int], other: tuple[int, int]) -> "View":
        """Of a picture of `size` that is scaled to `other` (width, height), the same window."""
        right, down = other[0] / size[0], other[1] / size[1]
        return replace(self, x=self.x * right, y=self.y * down, width=self.width * right, height=self.height * down)


def augments(config: DataConfig) -> bool:
    """Whether training changes pictures at random."""
    return config.random_crop > 0 or config.flip > 0 or config.colour > 0


def view(size: tuple[int, int], config: DataConfig, random: np.random.Generator | None = None) -> View:
    """The view of a picture of `size` (width, height): the recipe's, or with `random` one drawn from it."""
    window: tuple[float, float, float, float] = (0, 0, *size)
    scaled = config.geometry.size(*size) if config.resize_mode == "longest" else None
    if config.resize_mode == "shortest":
        window = _cropped(size, config)
    if random is None:
        return View(*window, scaled)
    chance = random.random(8)  # always as many, so that one setting does not change what another draws
    if config.random_crop:
        window, scaled = _random_window(size, config.random_crop, random), None
    factors = 1 + config.colour * (2 * chance[1:4] - 1)
    return View(*window, scaled, bool(chance[0] < config.flip), *factors.tolist())


def crop_starts(scaled: tuple[int, int], config: DataConfig) -> list[int]:
    """X and y of the crop in a picture that is scaled to (width, height): the centre, as torchvision's CenterCrop rounds it, or
    along the long side what `data.crop` says."""
    free = [n - config.image_size for n in scaled]
    starts = [round(n / 2) for n in free]
    if config.crop != "centre" and scaled[0] != scaled[1]:
        long = int(scaled[1] > scaled[0])
        starts[long] = 0 if config.crop == "start" else free[long]
    return starts


def margin(side: int, scaled: int) -> int:
    """Pixels of the frame before a picture of `scaled` pixels, along one side; below 0: pixels that are cut off. As torchvision's
    CenterCrop rounds it, or open_clip's CenterCropOrPad."""
    return (side - scaled) // 2 if scaled < side else -round((scaled - side) / 2)


def _cropped(size: tuple[int, int], config: DataConfig) -> tuple[float, float, float, float]:
    """As torchvision's Resize to the short side and a crop, as a window before the resize."""
    scaled, crop = scaled_size(*size, config.short_side), config.image_size
    start = crop_starts(scaled, config)
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

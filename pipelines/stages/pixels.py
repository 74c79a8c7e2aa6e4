"""uint8 pixels to the numbers that a model takes, on any device: (pixel / 255 - mean) / std for each colour."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Pixels:
    """The normalisation with these means and standard deviations of red, green and blue, both of pixels in 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        spread = 255 * np.array(std, np.float64)
        self.scale = (1 / spread).astype(np.float32)
        self.offset = (-np.array(mean, np.float64) * 255 / spread).astype(np.float32)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.normalise = normalised  # engine.compile puts a compiled one here, which is one pass over the bytes

    def __call__(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [..., H, W, 3] -> dtype [..., 3, H, W], computed in float32."""
        return self.normalise(frames, *self.on(frames.device), dtype)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and offset, float32 [3] each, of pixels in 0..255: pixel * scale + offset."""
        if device not in self._on:  # copied once: a copy in every step would wait for the one before
            scale, offset = torch.from_numpy(self.scale), torch.from_numpy(self.offset)
            self._on[device] = scale.to(device), offset.to(device)
        return self._on[device]


def normalised(frames: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames [..., H, W, 3] * scale [3] + offset [3], as dtype [..., 3, H, W]."""
    return frames.float().mul_(scale).add_(offset).to(dtype).movedim(-1, -3)

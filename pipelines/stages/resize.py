"""Pictures to the recipe's size on a CPU, where they were not decoded by a graph.

torch's kernel for bytes takes a sixth of the time of DALI's cubic resize, and differs from PIL by at most 1 (70 dB; DALI's: 55), but
where PIL scales the height first (54).
"""

import numpy as np
import torch
from torch.nn.functional import interpolate

from pipelines.config import DataConfig
from pipelines.stages.augment import crop_starts, margin


def resized(pictures: list[np.ndarray], config: DataConfig, uncropped: bool) -> np.ndarray:
    """uint8 [n, H, W, 3] of pictures [h, w, 3]: scaled as the recipe says and PIL, torchvision and open_clip do it (antialiased),
    then, unless they are wanted `uncropped`, cut as `data.crop` says or filled around the centre. One that is not as large as the first is made to
    fit."""
    height, width = pictures[0].shape[:2]
    scaled, side = config.geometry.size(width, height), config.image_size
    frame, left, top = scaled, 0, 0
    if not uncropped:
        frame, left, top = (side, side), *(margin(side, n) for n in scaled)
        if config.resize_mode == "shortest":
            left, top = (-start for start in crop_starts(scaled, config))
    out = np.empty((len(pictures), *frame[::-1], 3), np.uint8)
    if scaled[0] < frame[0] or scaled[1] < frame[1]:
        out[:] = config.fill
    for k, picture in enumerate(pictures):
        if picture.shape[1::-1] != scaled:
            planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
            planes = interpolate(planes, scaled[::-1], mode=config.interpolation, antialias=True)
            picture = planes[0].permute(1, 2, 0).numpy()
        shown = picture[max(0, -top) :, max(0, -left) :][: frame[1], : frame[0]]
        height, width = shown.shape[:2]
        out[k, max(0, top) :, max(0, left) :][:height, :width] = shown
    return out

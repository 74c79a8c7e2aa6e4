"""Parameter-free heads: the mean of the frames."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from c4c.models.heads import Compared, Head


def masked_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """[M, F, D], [M, F] -> [M, D]; zeros for a video without frames."""
    weight = mask.to(frames.dtype).unsqueeze(-1)
    return (frames * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


class Cosine(Head):
    """Heads that end in one vector a video, compared with the text by cosine."""

    late = False
    compares_channels = True

    @override
    def text(self, features: Tensor) -> Tensor:
        return normalize(features.float(), dim=-1)

    @override
    def score(self, text: Tensor, video: Tensor) -> Tensor:
        return text @ video.T

    @override
    def compared(self, text: Tensor, video: Tensor) -> list[Compared]:
        ones = torch.ones(len(text), device=text.device, dtype=text.dtype)
        return [Compared(text, video, ones, ones.bool())]


class MeanPooling(Cosine):
    """CLIP4Clip's meanP: normalise each frame, average those in the mask, normalise the average."""

    name = "meanP"

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return normalize(masked_mean(normalize(frames.float(), dim=-1), mask), dim=-1)


class SimpleMeanAdapter(Cosine):
    """mmaction2's mean: average the raw frame features, normalise once."""

    name = "SimpleMeanAdapter"

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return normalize(masked_mean(frames.float(), mask), dim=-1)

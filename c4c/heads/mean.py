"""Parameter-free head: the mean of the frames."""

from torch import Tensor, nn
from torch.nn.functional import normalize


class MeanPooling(nn.Module):
    """CLIP4Clip's meanP: normalise each frame, average those in the mask, normalise the average; cosine with the text."""

    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        """[M, F, D], [M, F] -> [M, D] of length 1. A video without frames gives zeros, which match nothing."""
        weight = mask.to(frames.dtype).unsqueeze(-1)
        total = (normalize(frames, dim=-1) * weight).sum(dim=1)
        return normalize(total / weight.sum(dim=1).clamp(min=1), dim=-1)

    def score(self, text: Tensor, video: Tensor) -> Tensor:
        """[N, D], [M, D] -> [N, M]."""
        return normalize(text, dim=-1) @ video.T

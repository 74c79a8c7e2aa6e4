"""Channel decorrelation regularisation of DRL (Wang et al., https://arxiv.org/abs/2203.07111), over the global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from c4c.losses import sum_over_ranks
from c4c.models.heads import Compared

_CONSTANT = 1e-12  # variance up to which a channel counts as constant


def decorrelation(compared: Sequence[Compared], off_diagonal: float) -> Tensor:
    """How far the channels of what the score compares are from agreeing one by one; a scalar, the same on every rank.

        L = sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2

    C [D, D] is the mean of the correlation matrices (see `correlation`) of `compared`: for tokens and frames, of each word with
    its best frame, and of each frame with its best word. Every rank gives as many of them, of its own pairs.
    """
    matrix = torch.stack([correlation(one) for one in compared]).mean(dim=0)
    diagonal = matrix.diagonal()
    off = matrix - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + off_diagonal * off.square().sum()


def correlation(compared: Compared) -> Tensor:
    """C [D, D] of the rows r of all ranks: C_ij = sum_r w_r x_ri y_rj / sum_r w_r.

    x and y are the text's and the video's channels, each with its mean over the rows taken off and divided by its standard
    deviation over the rows (both without the weights w; the deviation with 1 / n). A channel that is constant correlates with none.
    """
    text, video, weight, counted = compared
    kept = counted[:, None].to(text.dtype)
    weight, width = weight * counted, text.shape[1]
    sums = torch.cat([(text * kept).sum(dim=0), (video * kept).sum(dim=0), kept.sum()[None], weight.sum()[None]])
    means, rows, weights = sum_over_ranks(sums).split([2 * width, 1, 1])
    rows = rows.clamp(min=1)
    text, video = ((x - mean) * kept for x, mean in zip((text, video), (means / rows).chunk(2), strict=True))
    squares = torch.cat([text.square().sum(dim=0), video.square().sum(dim=0)])
    products = (weight[:, None] * text).T @ video
    squares, products = sum_over_ranks(torch.cat([squares, products.flatten()])).split([2 * width, width * width])
    of_text, of_video = _inverse_deviation(squares / rows).chunk(2)
    weights = torch.where(weights > 0, weights, 1.0)
    return of_text[:, None] * products.unflatten(0, (width, width)) * of_video / weights


def _inverse_deviation(variance: Tensor) -> Tensor:
    """1 / sqrt; 0, without a gradient, where it is as good as none."""
    varies = variance > _CONSTANT
    return torch.where(varies, variance, 1.0).rsqrt() * varies

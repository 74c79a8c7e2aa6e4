"""Scores that stand in a matrix, for what asks a head for them."""

import torch
from torch import Tensor

from c4c.retrieval.metrics import Score


def of_matrix(similarity: Tensor) -> tuple[Tensor, Tensor, Score]:
    """(texts, videos, score) that look scores up in a matrix [N, M]: for `ranks`."""
    n, m = similarity.shape
    texts = torch.arange(n, dtype=torch.float64)[:, None]
    videos = torch.arange(m, dtype=torch.float64)[:, None]
    return texts, videos, lambda t, v: similarity[t[:, 0].long()][:, v[:, 0].long()]

"""The symmetric contrastive loss over the global batch, with exact gradients on any number of ranks.

Each rank scores its own texts against all videos and its own videos against all texts. Exchanged features carry their
gradient back to the rank they came from, summed over ranks. Every rank's loss is `world` times its share of the mean
over the global batch, so that the average over ranks which data parallelism takes of gradients, and we of losses, is
that of the global batch on one machine.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All ranks' tensors, one after another along the first axis; equal shapes. Gradients are summed over ranks."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.rows : (dist.get_rank() + 1) * ctx.rows]


def gather(local: Tensor) -> Tensor:
    """[B, ...] of each rank -> [world * B, ...] on all of them, differentiable."""
    return local if world_size() == 1 else _Gather.apply(local)


def contrastive_loss(
    text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, score: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean of text-to-video and video-to-text cross-entropy over all valid pairs of all ranks; a scalar.

    text [B, D], video [B, ...]: this rank's features, row i of one belonging to row i of the other. valid bool [B]:
    rows that are not padding. score(texts [N, D], videos [M, ...]) -> [N, M], multiplied by `scale`.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    all_valid = gather(valid.to(text.dtype)).detach().bool()
    own = torch.arange(len(text), device=text.device) + rank * len(text)
    # padding is nobody's negative; each row keeps its own column so that padded rows, weighted 0, stay finite
    hidden = ~all_valid.expand(len(text), -1).scatter(1, own[:, None], torch.ones_like(own, dtype=torch.bool)[:, None])
    to_video = (scale * score(text, gather(video))).masked_fill(hidden, float("-inf"))
    to_text = (scale * score(gather(text), video)).T.masked_fill(hidden, float("-inf"))
    rows = cross_entropy(to_video, own, reduction="none") + cross_entropy(to_text, own, reduction="none")
    return (rows * valid).sum() * (world / 2) / all_valid.sum()

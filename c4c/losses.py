"""Contrastive losses over the global batch, with exact gradients on any number of ranks.

Each rank scores its own texts against all videos and its own videos against all texts. Exchanged features carry their
gradient back to the rank they came from, summed over ranks. Every rank's loss is `world` times its share of the mean
over the global batch, so that the average over ranks which data parallelism takes of gradients, and we of losses, is
that of the global batch on one machine. It holds for every head, tightTransf included.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

Score = Callable[[Tensor, Tensor], Tensor]  # texts [N, ...], videos [M, ...] -> [N, M]


def world_size() -> int:
    """Ranks of the process group; 1 without one."""
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


def _both_ways(text: Tensor, video: Tensor, scale: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """(own texts against all videos [B, N], own videos against all texts [B, N])."""
    if world_size() == 1:
        scores = scale * score(text, video)
        return scores, scores.T
    return scale * score(text, gather(video)), (scale * score(gather(text), video)).T


def contrastive_loss(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, score: Score) -> Tensor:
    """Mean of text-to-video and video-to-text cross-entropy over all valid pairs of all ranks; a scalar.

    text [B, ...], video [B, ...]: this rank's, row i of one belonging to row i of the other. valid bool [B]: rows that
    are not padding. score(texts, videos) -> [N, M], multiplied by `scale`.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    all_valid = gather(valid.to(text.dtype)).detach().bool()
    own = torch.arange(len(text), device=text.device) + rank * len(text)
    # padding is nobody's negative; each row keeps its own column so that padded rows, weighted 0, stay finite
    hidden = ~all_valid.expand(len(text), -1).scatter(1, own[:, None], torch.ones_like(own, dtype=torch.bool)[:, None])
    to_video, to_text = (s.masked_fill(hidden, float("-inf")) for s in _both_ways(text, video, scale, score))
    rows = cross_entropy(to_video, own, reduction="none") + cross_entropy(to_text, own, reduction="none")
    return (rows * valid).sum() * (world / 2) / all_valid.sum().clamp(min=1)


def bag_loss(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, score: Score) -> Tensor:
    """MIL-NCE of bags in rows: text [B, bag, ...], video [B, ...], valid bool [B, bag]: captions that are not padding."""
    own = torch.arange(len(video), device=video.device)[:, None].expand(valid.shape)
    owner = torch.where(valid, own, -1)
    return mil_nce_loss(text.flatten(0, 1), video, owner.flatten(), valid.any(dim=1), scale, score)


LOSSES = {"cross_entropy": contrastive_loss, "mil_nce": bag_loss}


def mil_nce_loss(text: Tensor, video: Tensor, owner: Tensor, valid: Tensor, scale: Tensor, score: Score) -> Tensor:
    """MIL-NCE over all videos of all ranks (Miech et al., https://arxiv.org/abs/1912.06430, equation 1); a scalar.

        L = -mean_i log( P_i / (P_i + N_i) ),   P_i = sum over the bag of video i of exp(s)
        N_i = sum over video i with all other captions, and the bag of i with all other videos, of exp(s)

    video [B, ...]; text [T, ...] the captions of this rank's bags, T equal on all ranks; owner int64 [T]: the row in
    `video` of each, -1 for padding; valid bool [B]: rows that are not padding. Bags may differ in size.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    rows = len(video)
    own_rows = torch.where(owner >= 0, owner + rank * rows, owner)
    owners = gather(own_rows.double()).detach().long()
    all_valid = gather(valid.to(video.dtype)).detach().bool()
    to_video, to_text = _both_ways(text, video, scale, score)  # [T, N], [B, all T]
    lowest = torch.finfo(to_text.dtype).min
    own = torch.arange(rows, device=video.device) + rank * rows
    caption_counts = (owners >= 0) & all_valid[owners.clamp(min=0)]
    in_bag = owners[None] == own[:, None]  # [B, all T]
    positive = to_text.masked_fill(~in_bag, lowest).logsumexp(dim=1)
    negative_captions = to_text.masked_fill(in_bag | ~caption_counts[None], lowest).logsumexp(dim=1)
    # each own caption against the other videos, then summed over the bag: [T, N] -> [T] -> [B]
    others = torch.arange(to_video.shape[1], device=video.device)[None] != own_rows[:, None]
    against = to_video.masked_fill(~(others & all_valid[None]), lowest).logsumexp(dim=1)
    local_bag = owner[None] == torch.arange(rows, device=video.device)[:, None]  # [B, T]
    negative_videos = against[None].expand(rows, -1).masked_fill(~local_bag, lowest).logsumexp(dim=1)
    everything = torch.stack([positive, negative_captions, negative_videos]).logsumexp(dim=0)
    return torch.where(valid, everything - positive, 0.0).sum() * world / all_valid.sum().clamp(min=1)

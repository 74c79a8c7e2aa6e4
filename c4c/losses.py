"""Contrastive losses over the global batch, with exact gradients on any number of ranks.

Each rank scores its own texts against all videos and its own videos against all texts. Exchanged features carry their
gradient back to the rank they came from, summed over ranks. Every rank's loss is `world` times its share of the mean
over the global batch, so that the average over ranks which data parallelism takes of gradients, and we of losses, is
that of the global batch on one machine. It holds for every head, tightTransf included.

The softmax losses need all scores of a row at once, so each rank gathers all features. The sigmoid loss is a sum over pairs:
the features travel from rank to rank, and each rank has those of one other at a time.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, logsigmoid

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


def process_rank() -> int:
    """This process's number in the process group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(local: Tensor) -> Tensor:
    """[B, ...] of each rank -> [world * B, ...] on all of them, differentiable."""
    return local if world_size() == 1 else _Gather.apply(local)


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors, on all of them. So are the gradients."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum over all ranks, on all of them, differentiable.

    Where each rank computes the same number of it, the average over ranks of the gradients is the number's own.
    """
    return local if world_size() == 1 else _Sum.apply(local)


def equal_rows(first: Tensor, second: Tensor) -> Tensor:
    """int64 [N, L], [M, L] -> bool [N, M]: which rows are the same. One column at a time, so that [N, M, L] is never held."""
    same = torch.ones(len(first), len(second), dtype=torch.bool, device=first.device)
    for ours, theirs in zip(first.T, second.T, strict=True):
        same &= ours[:, None] == theirs
    return same


def both_ways(text: Tensor, video: Tensor, scale: Tensor, score: Score) -> tuple[Tensor, Tensor]:
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
    world, rank = world_size(), process_rank()
    all_valid = gather(valid.to(text.dtype)).detach().bool()
    own = torch.arange(len(text), device=text.device) + rank * len(text)
    # padding is nobody's negative; each row keeps its own column so that padded rows, weighted 0, stay finite
    hidden = ~all_valid.expand(len(text), -1).scatter(1, own[:, None], torch.ones_like(own, dtype=torch.bool)[:, None])
    to_video, to_text = (s.masked_fill(hidden, float("-inf")) for s in both_ways(text, video, scale, score))
    rows = cross_entropy(to_video, own, reduction="none") + cross_entropy(to_text, own, reduction="none")
    return (rows * valid).sum() * (world / 2) / all_valid.sum().clamp(min=1)


def bag_loss(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, score: Score) -> Tensor:
    """MIL-NCE of bags in rows: text [B, bag, ...], video [B, ...], valid bool [B, bag]: captions that are not padding."""
    own = torch.arange(len(video), device=video.device)[:, None].expand(valid.shape)
    owner = torch.where(valid, own, -1)
    return mil_nce_loss(text.flatten(0, 1), video, owner.flatten(), valid.any(dim=1), scale, score)


def mil_nce_loss(text: Tensor, video: Tensor, owner: Tensor, valid: Tensor, scale: Tensor, score: Score) -> Tensor:
    """MIL-NCE over all videos of all ranks (Miech et al., https://arxiv.org/abs/1912.06430, equation 1); a scalar.

        L = -mean_i log( P_i / (P_i + N_i) ),   P_i = sum over the bag of video i of exp(s)
        N_i = sum over video i with all other captions, and the bag of i with all other videos, of exp(s)

    video [B, ...]; text [T, ...] the captions of this rank's bags, T equal on all ranks; owner int64 [T]: the row in
    `video` of each, -1 for padding; valid bool [B]: rows that are not padding. Bags may differ in size.
    """
    world, rank = world_size(), process_rank()
    rows = len(video)
    own_rows = torch.where(owner >= 0, owner + rank * rows, owner)
    owners = gather(own_rows.double()).detach().long()
    all_valid = gather(valid.to(video.dtype)).detach().bool()
    to_video, to_text = both_ways(text, video, scale, score)  # [T, N], [B, all T]
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


_ROWS = 256  # texts or videos of this rank that the sigmoid loss scores at once


def sigmoid_loss(
    text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, bias: Tensor, score: Score,
    weights: Iterable[Tensor] = (), gradient_scale: float = 1.0, tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SigLIP's loss over all pairs of all ranks (Zhai et al., https://arxiv.org/abs/2303.15343, equation 1); a scalar.

        L = -sum_ij log sigmoid(z_ij (scale * s_ij + bias)) / number of texts,   z_ij = 1 where i = j, else -1

    text [B, ...], video [B, ...]: this rank's, row i of one belonging to row i of the other; B is equal on all ranks. valid
    bool [B]: rows that are not padding, which is in no pair. score(texts, videos) -> [N, M]; weights: those inside it.

    The smaller of the two features travels round the ranks with its gradient, and each block of scores is differentiated at
    once: a rank holds the features of one other rank and `_ROWS` rows of scores, whatever the number of ranks. The gradients are
    those of the loss times `gradient_scale`, and divided by it again: fp16 needs its loss scale inside `score` too.

    tokens int64 [B, L]: of the texts; rows with the same ones are in no pair with each other. None: they are.
    """
    world, rank = world_size(), process_rank()
    all_valid = gather(valid.to(text.dtype)).detach().bool().unflatten(0, (world, len(valid)))
    factor = world / all_valid.sum().clamp(min=1).to(text.dtype)
    all_tokens = None if tokens is None else gather(tokens).unflatten(0, (world, len(tokens)))
    texts_move = text.numel() <= video.numel()
    moving, staying = (text, video) if texts_move else (video, text)
    inside = [
        scale.detach().requires_grad_(scale.requires_grad),
        bias.detach().requires_grad_(bias.requires_grad),
        *weights,
    ]
    from_inside: list[Tensor | None] = [None] * len(inside)
    from_staying = torch.zeros_like(staying)
    carried = torch.stack([moving.detach(), torch.zeros_like(moving)])  # with the gradient that it has met so far
    total, own_rows = torch.zeros_like(factor), torch.arange(len(text), device=text.device)
    for hop in range(world):
        other, gradient = carried[0].requires_grad_(moving.requires_grad), carried[1]
        for part in (slice(i, i + _ROWS) for i in range(0, len(text), _ROWS)):
            own = staying.detach()[part].requires_grad_(staying.requires_grad)
            scores = score(other, own).T if texts_move else score(own, other)
            matching = own_rows[part, None] == own_rows if hop == 0 else None
            counted = valid[part, None] & all_valid[(rank - hop) % world]
            if tokens is not None and all_tokens is not None:
                equal = equal_rows(tokens[part], all_tokens[(rank - hop) % world])
                counted &= ~equal if matching is None else ~equal | matching
            cost = factor * _pair_costs(inside[0] * scores + inside[1], matching, counted)
            total += cost.detach()
            to_other, to_own, *to_inside = _gradients(cost * gradient_scale, [other, own, *inside])
            gradient += 0 if to_other is None else to_other
            from_staying[part] += 0 if to_own is None else to_own
            from_inside = [_plus(a, b) for a, b in zip(from_inside, to_inside, strict=True)]
        carried = _to_next_rank(carried)
    inputs, found = [moving, staying, scale, bias, *inside[2:]], [carried[1], from_staying, *from_inside]
    known = [(i, g) for i, g in zip(inputs, found, strict=True) if g is not None and i.requires_grad]
    return _WithGradients.apply(total, gradient_scale, [g for _, g in known], *[i for i, _ in known])


def _pair_costs(logits: Tensor, matching: Tensor | None, counted: Tensor) -> Tensor:
    """-log sigmoid of logits [N, M], negated for pairs that do not match (matching None: no pair does), over those counted."""
    logits = logits.masked_fill(~counted, 0.0)
    signed = -logits if matching is None else torch.where(matching, logits, -logits)
    return -(logsigmoid(signed) * counted).sum()


def _gradients(cost: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """Of a cost, at each tensor; None where there is none to be had."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not wanted or not cost.requires_grad:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad(cost, wanted, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """A sum, in float32 at least."""
    if more is None:
        return total
    more = more.to(torch.promote_types(more.dtype, torch.float32))
    return more if total is None else total + more


def _to_next_rank(tensor: Tensor) -> Tensor:
    """Send a tensor to the next rank, and return the previous one's; both at once, so that no rank waits for another's turn."""
    if world_size() == 1:
        return tensor
    world, rank = dist.get_world_size(), dist.get_rank()
    received = torch.empty_like(tensor)
    exchange = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % world),
        dist.P2POp(dist.irecv, received, (rank - 1) % world),
    ]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received


class _WithGradients(torch.autograd.Function):
    """A number whose gradients at `tensors` are known, `scale` times too large.

    The weights of a head are among the tensors: ZeRO gets their gradients from autograd, each once.
    """

    @staticmethod
    def forward(ctx, number: Tensor, scale: float, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.scale, ctx.dtypes = scale, [tensor.dtype for tensor in tensors]
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        factor = upstream / ctx.scale
        scaled = [(g * factor).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, None, *scaled

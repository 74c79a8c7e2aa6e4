"""Token merging in open_clip's ViTs: a block merges its most similar patch tokens, so that the blocks behind it have fewer to compute.

From ToMe (https://arxiv.org/abs/2210.09461): between attention and MLP of a block, patch tokens are split by turns into A and B; each
in A has one edge, to the token of B whose key is most similar (cosine of the keys' mean over heads). The r best edges merge: the token
of B becomes the average of both, weighted by their sizes, how many patches each stands for. Attention takes the sizes into account:
softmax(Q K^T / sqrt(d) + log size). Class tokens never merge.

From TempMe (https://arxiv.org/abs/2409.01156): before chosen blocks two neighbouring clips, frames at first, become one, so that their
tokens attend to each other and merge across frames. Unlike there, joining itself merges nothing: the block's own merging does it, and
each frame keeps its own class token, which the heads take.

Frames outside the mask are tokens of size 0: no other token attends to them or takes anything from them.
"""

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from c4c.merging import Merging
from c4c.models.lora import CallingAttention

# is added to the attention scores of tokens of size 0; finite, so that a clip of them alone gives numbers
_UNSEEN = -1e4


class MergingBlock(ResidualAttentionBlock):
    """A transformer block that merges tokens between its attention and its MLP."""

    def forward(self, x: Tensor, size: Tensor | None, first: int, merged: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [G, L, D] and their sizes [G, L], None where all are 1 -> the same of L - merged tokens.

        first: how many tokens lead and never merge, the class tokens.
        """
        bias = None if size is None else _log_size(size).to(x.dtype)[:, None, None]
        normed = self.ln_1(x)
        mixed, keys = self.attn(normed, normed, normed, need_weights=False, attn_mask=bias)
        x = x + self.ls_1(mixed)
        if merged:
            x, size = merge(x, x.new_ones(x.shape[:2]) if size is None else size, keys, first, merged)
        return x + self.ls_2(self.mlp(self.ln_2(x))), size


class MergingViT(VisionTransformer):
    """A ViT whose blocks merge tokens; made from open_clip's own by `merge_tokens`, with the same weights."""

    merging: Merging

    def forward(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """[N, 3, H, W] -> [N, D]. Where clips are joined: [M, F, 3, H, W] and the mask [M, F], None for all frames -> [M * F, D]."""
        if not self.merging.joins:
            return self._encoded(self._embeds(frames), None, len(frames))
        x = self._embeds(frames.flatten(0, 1))
        mask = x.new_ones(frames.shape[:2]) if frame_mask is None else frame_mask.to(x.dtype)
        return self._encoded(x, mask.reshape(-1, 1).expand(x.shape[:2]), len(frames))

    def _encoded(self, x: Tensor, size: Tensor | None, videos: int) -> Tensor:
        """Embedded tokens of all frames [M * F, L, D] and their sizes -> [M * F, D]."""
        number, first = len(x), 1
        blocks = list(self.transformer.resblocks)
        for block, tokens in zip(blocks, self.merging.plan(x.shape[1] - 1, len(blocks)), strict=True):
            if size is not None and tokens.frames > first:
                x, size = join(x, size, first, videos)
                first = tokens.frames
            if self.transformer.grad_checkpointing:
                x, size = checkpoint(block, x, size, first, tokens.merged, use_reentrant=False)
            else:
                x, size = block(x, size, first, tokens.merged)
        pooled = self._pooled(x, size, first)  # [clips, frames of a clip, D]
        # [clips, frames of a clip, D] -> [M, frames with those that joining added, D] -> [M * F, D]
        pooled = pooled.reshape(videos, -1, pooled.shape[-1])[:, : number // videos].flatten(0, 1)
        return pooled if self.proj is None else pooled @ self.proj

    def _pooled(self, x: Tensor, size: Tensor | None, first: int) -> Tensor:
        """[G, L, D] -> [G, first, D]: class tokens, or the mean of the patches that the tokens stand for."""
        if self.pool_type == "tok":
            return self.ln_post(x[:, :first])
        x = x if self.final_ln_after_pool else self.ln_post(x)
        weights = x.new_ones(x.shape[:2]) if size is None else size.to(x.dtype)
        weights = weights[:, first:, None]
        mean = (x[:, first:] * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        return self.ln_post(mean) if self.final_ln_after_pool else mean


def _log_size(size: Tensor) -> Tensor:
    return torch.where(size > 0, size.clamp(min=1).log(), _UNSEEN)


def match(keys: Tensor, size: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of patch tokens with keys [G, n, d] and sizes [G, n], which merge.

    Returns numbers in A of those that go [G, merged], of those that stay [G, |A| - merged] in their order, and of each that goes, the
    number in B of the token that it joins [G, merged]. Tokens of size 0 go first, and no other goes to them if it can go elsewhere.
    """
    units = functional.normalize(keys.detach(), dim=-1)
    similar = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    similar = similar.masked_fill((size[:, 1::2] == 0)[:, None], -2.0)
    best, nearest = similar.max(dim=-1)
    order = best.masked_fill(size[:, ::2] == 0, 2.0).argsort(dim=-1, descending=True, stable=True)
    gone, kept = order[:, :merged], order[:, merged:].sort(dim=-1).values
    return gone, kept, nearest.gather(1, gone)


def merge(x: Tensor, size: Tensor, keys: Tensor, first: int, merged: int) -> tuple[Tensor, Tensor]:
    """Tokens [G, L, D], sizes [G, L] and keys [G, L, d] -> tokens [G, L - merged, D] and their sizes, in at least fp32.

    The first `first` tokens stay; behind them come what is left of A, and B.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = size.to(wide)
    patches, weights = x[:, first:], size[:, first:, None]
    gone, kept, target = match(keys[:, first:].to(wide), weights[..., 0], merged)
    x_a, x_b, w_a, w_b = patches[:, ::2], patches[:, 1::2], weights[:, ::2], weights[:, 1::2]
    w_gone = w_a.take_along_dim(gone[..., None], dim=1)
    x_gone = x_a.take_along_dim(gone[..., None], dim=1) * w_gone
    # [G, B, merged]: which token of B takes which; a product, and no scattered addition, whose order would be by chance
    takes = (target[:, None] == torch.arange(x_b.shape[1], device=x.device)[:, None]).to(wide)
    total = w_b + takes @ w_gone
    mean = (x_b * w_b + takes @ x_gone) / total.clamp(min=1)
    rest, w_rest = (part.take_along_dim(kept[..., None], dim=1) for part in (x_a, w_a))
    return torch.cat([x[:, :first], rest, mean.to(x.dtype)], dim=1), torch.cat(
        [size[:, :first], w_rest[..., 0], total[..., 0]], dim=1
    )


def join(x: Tensor, size: Tensor, first: int, videos: int) -> tuple[Tensor, Tensor]:
    """Make one clip of each two neighbours: [M * clips, L, D] and sizes -> [M * ceil(clips / 2), 2 * L, D], class tokens first.

    first: class tokens of a clip. A last clip without a neighbour gets an empty one, of size 0.
    """
    odd = len(x) // videos % 2
    # [M * clips, L, D] -> [M, clips + odd, L, D] -> [M * pairs, 2, L, D]
    pairs = functional.pad(x.unflatten(0, (videos, -1)), (0, 0, 0, 0, 0, odd)).reshape(-1, 2, *x.shape[1:])
    sizes = functional.pad(size.unflatten(0, (videos, -1)), (0, 0, 0, odd)).reshape(-1, 2, *size.shape[1:])
    joined = torch.cat([pairs[:, :, :first].flatten(1, 2), pairs[:, :, first:].flatten(1, 2)], dim=1)
    return joined, torch.cat([sizes[:, :, :first].flatten(1, 2), sizes[:, :, first:].flatten(1, 2)], dim=1)


def merge_tokens(visual: Any, merging: Merging) -> None:
    """Have an image tower merge tokens, in place; no weight is added. Raises ValueError for one that cannot.

    visual: a module of open_clip's, whose attributes no type describes.
    """
    if not merging:
        return
    if reason := _cannot(visual, merging):
        raise ValueError(f"{reason}: set model.merge=0 and model.merge_frames=[], or choose another model.backbone")
    for block in visual.transformer.resblocks:
        block.__class__, block.attn.__class__ = MergingBlock, CallingAttention
        block.attn.gives_keys = True
    visual.__class__, visual.merging = MergingViT, merging


def _cannot(visual: Any, merging: Merging) -> str:
    """Why an image tower cannot merge tokens; '' if it can."""
    name = f"model.merge={merging.tokens}"
    if isinstance(visual, VisionTransformer) and hasattr(visual, "conv2"):
        return f"{name} and model.linear_patch=3d cannot be used together: frames already meet in the patch embedding"
    if type(visual) is not VisionTransformer:
        kind = f"timm's {type(visual.trunk).__name__}" if hasattr(visual, "trunk") else type(visual).__name__
        return (
            f"{name} needs one of open_clip's own ViTs as image tower, whose blocks it changes, and this one is {kind}"
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        return f"{name}: this image tower pools its tokens by attention, which would not see how many patches a merged token stands for"
    blocks = list(visual.transformer.resblocks)
    if not visual.transformer.batch_first or any(type(block) is not ResidualAttentionBlock for block in blocks):
        return (
            f"{name}: the blocks of this image tower ({type(blocks[0]).__name__}) have an attention of their own kind"
        )
    if merging.joins and visual.pool_type == "avg":
        return (
            f"model.merge_frames={list(merging.joins)}: a frame's feature is the mean of its patches in this image tower, and patches of "
            "joined frames merge"
        )
    if merging.joins and merging.joins[-1] >= len(blocks):
        return f"model.merge_frames={list(merging.joins)}: this image tower has blocks 0 to {len(blocks) - 1}"
    return ""

"""A stack of CLIP's transformer blocks over frames."""

from functools import partial
from typing import cast

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from c4c.models.prompts import PROMPTS
from c4c.models.text_tower import text_start

# Standard deviation of positions that start at random: that of what a random tower says of a frame. Blocks normalise the
# sum of the two, so smaller positions drown, and order is not learned in any number of steps a small run has.
POSITION_STD = 1.0
_HIDDEN = -1e6  # added to the attention on padding, as in CLIP4Clip's modules/until_module.py


class TemporalTransformer(nn.Module):
    """Blocks in CLIP's layout (`resblocks.N.…`), every position attending to all that are not padding."""

    def __init__(self, width: int, blocks: int, attention_heads: int, eps: float):
        super().__init__()
        self.attention_heads = attention_heads
        norm = partial(LayerNorm, eps=eps)
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, attention_heads, act_layer=QuickGELU, norm_layer=norm) for _ in range(blocks)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[M, T, D], bool [M, T] -> [M, T, D]. Outputs at padding mean nothing."""
        m, t, _ = x.shape
        hidden = (~mask).to(x.dtype) * _HIDDEN
        # [M, T] -> [M * heads, T queries, T keys]
        bias = hidden[:, None, None, :].expand(m, self.attention_heads, t, t).reshape(-1, t, t)
        for block in self.resblocks:
            x = block(x, attn_mask=bias)
        return x

    def randomize(self) -> None:
        """CLIP's own initialisation, for stacks that copy nothing."""
        blocks = cast(list[ResidualAttentionBlock], list(self.resblocks))
        width, depth = blocks[0].attn.embed_dim, len(blocks)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)


def too_long(what: str, length: int, limit: int) -> ValueError:
    """The error for clips of more frames than a head has positions."""
    return ValueError(f"{what} has {limit} positions and the clip needs {length}: lower data.num_frames")


def start_as_text(blocks: nn.ModuleList, table: nn.Embedding, clip: nn.Module) -> str:
    """Start blocks and a table of positions as the first blocks and the positions of a text tower; why that is not possible, or ''."""
    start = text_start(clip, table.embedding_dim)
    if isinstance(start, str):
        return start
    with torch.no_grad():
        rows = min(len(start.positions), table.num_embeddings)
        table.weight[:rows].copy_(start.positions[:rows])
        for block, source in zip(blocks, start.blocks, strict=False):
            copied = {name: weight for name, weight in source.state_dict().items() if name != PROMPTS}
            block.load_state_dict(copied)
    return ""

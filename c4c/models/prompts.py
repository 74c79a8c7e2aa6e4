"""Prompt vectors in every block of both towers (deep prompts: VPT, https://arxiv.org/abs/2203.12119; for text-video retrieval DGL,
https://arxiv.org/abs/2401.10588).

Block k of a tower has P vectors of its own, W_k [P, D]. It sees the sequence [W_k; x] of its prompts and of its tokens, and hands on its
outputs at the tokens alone: the next block has prompts of its own. So what prompts become is never used, and a block need not compute
it: prompts are keys and values of its attention only,

    x' = x + attention(Q = norm(x), K = V = norm([W_k; x])),    x'' = x' + MLP(norm(x')).

Prompts stand before the tokens, without positions. Every token sees all of them, in a causal tower too; positions, the context length
and the token that a caption is read at stay what they were. The mask of the words is extended by P columns of zeros.
"""

from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import pad

PROMPTS = "prompts"
_STD = 0.02  # of their first values: that of CLIP's token embeddings


class PromptedBlock(ResidualAttentionBlock):
    """A transformer block with prompt vectors [P, D]; made from open_clip's own by `add_prompts`."""

    prompts: nn.Parameter

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """[N, L, D] and a mask that is added to the scores, [L, L] or [N * heads, L, L] -> [N, L, D]. k_x, v_x: always None."""
        count = self.prompts.shape[0]
        first = self.prompts.to(q_x.dtype).expand(q_x.shape[0], -1, -1)
        seen = self.ln_1(torch.cat([first, q_x], dim=1))
        mask = None if attn_mask is None else pad(attn_mask, (count, 0))
        x = q_x + self.ls_1(self.attention(seen[:, count:], seen, seen, mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def add_prompts(clip: Any, number: int) -> list[str]:
    """Give every block of both towers `number` prompt vectors with random values, in place; 0: none. Returns their names in `clip`.

    clip: open_clip's model. Raises ValueError for towers that are not open_clip's own transformers, or merge tokens.
    """
    if not number:
        return []
    towers = {"image": clip.visual, "text": getattr(clip, "text", clip)}
    for name, tower in towers.items():
        if reason := _cannot(tower):
            raise ValueError(
                f"train.prompts={number}: the {name} tower {reason}: set train.prompts=0 (train.lora is for every kind of tower)"
            )
    for tower in towers.values():
        for block in tower.transformer.resblocks:
            weight = block.ln_1.weight
            block.prompts = nn.Parameter(nn.init.normal_(weight.new_empty(number, weight.shape[0]), std=_STD))
            block.__class__ = PromptedBlock
    return [name for name, _ in clip.named_parameters() if name.endswith(f".{PROMPTS}")]


def _cannot(tower: Any) -> str:
    """Why a tower's blocks cannot be given prompts; '' if they can."""
    if not isinstance(tower, VisionTransformer | TextTransformer | CLIP):
        kind = f"timm's {type(tower.trunk).__name__}" if hasattr(tower, "trunk") else type(tower).__name__
        return f"({kind}) is none of open_clip's own transformers"
    if not isinstance(tower, CLIP) and getattr(tower, "merging", None):
        return "merges tokens (model.merge), whose blocks take no prompts"
    blocks = list(tower.transformer.resblocks)
    if not tower.transformer.batch_first or any(type(block) is not ResidualAttentionBlock for block in blocks):
        return f"has blocks of another kind ({type(blocks[0]).__name__})"
    return ""


def prompts_in(state: dict[str, Tensor]) -> int:
    """How many prompt vectors a block has in a state dict; 0 for towers without."""
    return next((len(tensor) for name, tensor in state.items() if name.endswith(f".resblocks.0.{PROMPTS}")), 0)


def prompts_of(model: nn.Module) -> int:
    """How many prompt vectors each block of a model's towers has."""
    return next((block.prompts.shape[0] for block in model.modules() if isinstance(block, PromptedBlock)), 0)


def in_words(number: int, weights: list[nn.Parameter]) -> str:
    """For people, what is trained of the towers."""
    count = sum(weight.numel() for weight in weights)
    vectors = "1 prompt vector" if number == 1 else f"{number} prompt vectors"
    return f"{vectors} in each block of both towers, {count:,} numbers ({count * 4 / 1e6:.2f} MB in fp32), learn in place of the towers"

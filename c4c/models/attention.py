"""Self-attention of open_clip's blocks without the copies that torch.nn.MultiheadAttention makes on its way.

torch's module turns [N, L, D] into [L, N, D] first. Of such a view the product with the matrix of queries, keys and values is taken
without the bias, which is then added in a pass of its own; its result, three times as wide as the tokens, is copied, and the
outputs are once more. On a GPU these passes, and theirs in the backward pass, wait for memory.
"""

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional

from c4c.models.lora import CallingAttention


class DirectAttention(CallingAttention):
    """Queries, keys and values are views of one product, and stay where it puts them."""

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        query, key, value = inputs
        if query is not key or key is not value:
            return super()._projected(*inputs)
        # [N, L, 3 D] -> three of [N, L, D]
        return list(functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))


def attend_directly(model: nn.Module) -> None:
    """Have the blocks of a model's towers and head attend so, in place; weights keep their names. Others stay as they are: those with
    LoRA, those that merge tokens, and towers of other libraries."""
    for block in model.modules():
        if isinstance(block, ResidualAttentionBlock):
            attention = block.attn
            if type(attention) is nn.MultiheadAttention and attention.batch_first and attention._qkv_same_embed_dim:
                attention.__class__ = DirectAttention

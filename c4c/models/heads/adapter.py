"""mmaction2's TransformerAdapter."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from c4c.models.heads.blocks import TemporalTransformer, too_long
from c4c.models.heads.mean import Cosine, masked_mean


class TransformerAdapter(Cosine):
    """Learned positions for exactly `segments` frames, transformer blocks, the input added back; mean, normalised once.

    mmaction2 has no mask, its clips being always full; here padding is masked. Starts at random, LayerNorm eps 1e-5.
    (mmaction/models/similarity/adapters.py.)
    """

    name = "TransformerAdapter"

    def __init__(self, width: int, *, blocks: int = 4, segments: int = 12, attention_heads: int = 1, **_):
        super().__init__(width)
        self.positional_embedding = nn.Parameter(torch.empty(segments, width))
        self.transformer = TemporalTransformer(width, blocks, attention_heads, eps=1e-5)
        nn.init.normal_(self.positional_embedding, std=0.02)
        self.transformer.randomize()

    @override
    @property
    def most_frames(self) -> int:
        return len(self.positional_embedding)

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        length, limit = frames.shape[1], len(self.positional_embedding)
        if length > limit:
            raise too_long("TransformerAdapter", length, limit)
        x = frames.to(self.positional_embedding.dtype)
        x = self.transformer(x + self.positional_embedding[:length], mask)
        return normalize(masked_mean(x.float() + frames.float(), mask), dim=-1)

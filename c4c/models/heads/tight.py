"""CLIP4Clip's tightTransf: every text meets every video inside a transformer."""

import torch
from open_clip.transformer import LayerNorm, QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from c4c.models.heads import Head, present
from c4c.models.heads.blocks import POSITION_STD, TemporalTransformer, start_as_text, too_long

_PAIRS = 4096  # pairs that pass through the transformer at once; their activations are computed again for gradients


class _Embeddings(nn.Module):
    def __init__(self, positions: int, width: int):
        super().__init__()
        self.position_embeddings = nn.Embedding(positions, width)


class _Pooler(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_pool = LayerNorm(width, eps=1e-12)
        self.dense = nn.Linear(width, width)
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(self.ln_pool(x)[:, 0]))


class _Cross(nn.Module):
    def __init__(self, width: int, blocks: int, attention_heads: int, positions: int):
        super().__init__()
        self.embeddings = _Embeddings(positions, width)
        self.transformer = TemporalTransformer(width, blocks, attention_heads, eps=1e-12)
        self.pooler = _Pooler(width)


class TightTransf(Head):
    """tightTransf: [text, frames] + positions, transformer blocks, pool the text's place, a number. No temperature.

    The official code adds dropout of 0.1 on the embeddings in training; here there is none, so that a step is a pure
    function of its batch.
    """

    name = "tightTransf"
    scaled = False

    def __init__(self, width: int, *, blocks: int = 4, attention_heads: int = 1, positions: int = 77, **_):
        super().__init__(width)
        self.cross = _Cross(width, blocks, attention_heads, positions)
        self.similarity_dense = nn.Linear(width, 1)
        self.cross.transformer.randomize()
        nn.init.normal_(self.cross.embeddings.position_embeddings.weight, std=POSITION_STD)
        for linear in (self.cross.pooler.dense, self.similarity_dense):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    @override
    @property
    def most_frames(self) -> int:
        return self.cross.embeddings.position_embeddings.num_embeddings - 1  # the first is the text's

    @override
    def start_from(self, clip: nn.Module) -> str:
        return start_as_text(self.cross.transformer.resblocks, self.cross.embeddings.position_embeddings, clip)

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames * mask.unsqueeze(-1).to(frames.dtype)

    @override
    def score(self, text: Tensor, video: Tensor) -> Tensor:
        """[N, D], [M, F, D] -> [N, M]."""
        rows = max(1, _PAIRS // max(1, len(video)))
        parts = [text[i : i + rows] for i in range(0, len(text), rows)]
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self.score_at_once, part, video, use_reentrant=False) for part in parts])
        return torch.cat([self.score_at_once(part, video) for part in parts])

    @override
    def score_at_once(self, text: Tensor, video: Tensor) -> Tensor:
        return self.similarity_dense(self.pooled(text, video)).squeeze(-1).float()

    def pooled(self, text: Tensor, video: Tensor) -> Tensor:
        """Pooler output for every pair, [N, M, D]."""
        n, (m, f, d) = text.shape[0], video.shape
        table = self.cross.embeddings.position_embeddings
        if f + 1 > table.num_embeddings:
            raise too_long("tightTransf", f + 1, table.num_embeddings)
        mask = present(video)
        dtype = table.weight.dtype
        # text [N, D] and video [M, F, D] -> [N, M, 1 + F, D] -> [N * M, 1 + F, D]
        pair = torch.cat(
            [text.to(dtype)[:, None, None].expand(n, m, 1, d), video.to(dtype)[None].expand(n, m, f, d)], 2
        )
        x = pair.flatten(0, 1) + table(torch.arange(f + 1, device=text.device))
        seen = torch.cat([mask.new_ones(m, 1), mask], dim=1).expand(n, m, f + 1).flatten(0, 1)
        return self.cross.pooler(self.cross.transformer(x, seen)).unflatten(0, (n, m))

"""CLIP4Clip's sequential heads: the frames pass through an LSTM or a transformer before they are averaged."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from c4c.models.heads import Head
from c4c.models.heads.blocks import POSITION_STD, TemporalTransformer, start_as_text, too_long
from c4c.models.heads.mean import MeanPooling
from c4c.models.text_tower import text_start


class FrameTransformer(Head):
    """What heads with CLIP4Clip's temporal transformer share: add positions, 4 transformer blocks, add the input back.

    Named before the head that takes the frames from there. Positions and blocks start as CLIP's text positions and first text
    blocks. LayerNorm eps is 1e-12.
    """

    def __init__(self, width: int, *, blocks: int = 4, attention_heads: int = 1, positions: int = 77, **_):
        super().__init__(width)
        self.frame_position_embeddings = nn.Embedding(positions, width)
        self.transformerClip = TemporalTransformer(width, blocks, attention_heads, eps=1e-12)
        nn.init.normal_(self.frame_position_embeddings.weight, std=POSITION_STD)
        self.transformerClip.randomize()

    @override
    @property
    def most_frames(self) -> int:
        return self.frame_position_embeddings.num_embeddings

    @override
    def start_from(self, clip: nn.Module) -> str:
        return start_as_text(self.transformerClip.resblocks, self.frame_position_embeddings, clip)

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return super().video(self.frames(frames, mask), mask)

    def frames(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frame features after the transformer, residual included, [M, F, D]. Raises ValueError for more than `most_frames`."""
        length, limit = frames.shape[1], self.frame_position_embeddings.num_embeddings
        if length > limit:
            raise too_long(self.name, length, limit)
        positions = self.frame_position_embeddings(torch.arange(length, device=frames.device))
        x = frames.to(positions.dtype)
        return self.transformerClip(x + positions, mask).float() + frames.float()


class SeqTransf(FrameTransformer, MeanPooling):
    """seqTransf: the temporal transformer, then meanP."""

    name = "seqTransf"


class _Unused(nn.Module):
    """A table that nothing reads."""

    weight: Tensor

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(positions, width))


class SeqLSTM(MeanPooling):
    """seqLSTM: one forward LSTM layer, add the input back, then meanP.

    The official code packs sequences by length; an LSTM sees no later frame, so masking afterwards is the same.
    """

    name = "seqLSTM"

    def __init__(self, width: int, *, positions: int = 77, **_):
        super().__init__(width)
        self.lstm_visual = nn.LSTM(width, width, batch_first=True)
        # the official model owns this table and never uses it: kept so that checkpoints go both ways
        self.frame_position_embeddings = _Unused(positions, width)

    @override
    def start_from(self, clip: nn.Module) -> str:
        start = text_start(clip, self.width)
        if not isinstance(start, str) and start.positions.shape == self.frame_position_embeddings.weight.shape:
            self.frame_position_embeddings.weight.copy_(start.positions.detach())
        return ""  # the LSTM starts at random with every tower

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return super().video(self.frames(frames, mask), mask)

    def frames(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frame features after the LSTM, residual included, [M, F, D]."""
        out, _ = self.lstm_visual(frames.to(next(self.lstm_visual.parameters()).dtype))
        return out.float() + frames.float()

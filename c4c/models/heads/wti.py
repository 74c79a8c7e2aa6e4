"""Weighted token interaction (DRL, https://arxiv.org/abs/2203.07111)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from c4c.models.heads import Compared, Head, present

_ROWS = 32  # texts whose token-by-frame products are held at once


class WeightedTokenInteraction(Head):
    """Each token meets its best frame and each frame its best token; small MLPs weigh tokens and frames.

    score = (sum_t a_t max_f s_tf + sum_f b_f max_t s_tf) / 2, s the cosine, a and b softmaxes over what is present.
    """

    name = "wti"
    tokens = True
    compares_channels = True

    def __init__(self, width: int, **_):
        super().__init__(width)
        self.text_weight_fc = _mlp(width)
        self.video_weight_fc = _mlp(width)

    @override
    def text(self, features: Tensor) -> Tensor:
        return features.float()

    @override
    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames.float() * mask.unsqueeze(-1)

    @override
    def text_vector(self, text: Tensor) -> Tensor:
        """Words count as much as in the score."""
        weights = _weights(self.text_weight_fc, text, present(text))
        return normalize(torch.einsum("nl,nld->nd", weights, normalize(text, dim=-1)), dim=-1)

    @override
    def score(self, text: Tensor, video: Tensor) -> Tensor:
        """[N, L, D], [M, F, D] -> [N, M]."""
        return self._score(text, video, _ROWS)

    @override
    def score_at_once(self, text: Tensor, video: Tensor) -> Tensor:
        return self._score(text, video, None)

    @override
    def compared(self, text: Tensor, video: Tensor) -> list[Compared]:
        """Of each word with its best frame, by the word's weight, and of each frame with its best word, by the frame's."""
        seen_text, seen_video = present(text), present(video)
        a, b = _weights(self.text_weight_fc, text, seen_text), _weights(self.video_weight_fc, video, seen_video)
        words, frames = normalize(text, dim=-1), normalize(video, dim=-1)
        cosine = torch.einsum("bld,bfd->blf", words, frames)
        lowest = torch.finfo(cosine.dtype).min
        best_frame = cosine.masked_fill(~seen_video[:, None], lowest).argmax(dim=2)  # [B, L]
        best_word = cosine.masked_fill(~seen_text[:, :, None], lowest).argmax(dim=1)  # [B, F]
        both = seen_text.any(dim=1, keepdim=True) & seen_video.any(dim=1, keepdim=True)
        of_words = (words, _picked(frames, best_frame), a, seen_text & both)
        of_frames = (_picked(words, best_word), frames, b, seen_video & both)
        return [Compared(*(x.flatten(0, 1) for x in rows)) for rows in (of_words, of_frames)]

    def _score(self, text: Tensor, video: Tensor, together: int | None) -> Tensor:
        """together: texts at once; None: all."""
        seen_text, seen_video = present(text), present(video)
        a, b = _weights(self.text_weight_fc, text, seen_text), _weights(self.video_weight_fc, video, seen_video)
        words, frames = normalize(text, dim=-1), normalize(video, dim=-1)
        if together is None:
            return self._tile(words, a, seen_text, frames, b, seen_video)
        parts = [
            self._tile(words[i : i + together], a[i : i + together], seen_text[i : i + together], frames, b, seen_video)
            for i in range(0, len(text), together)
        ]
        return torch.cat(parts)

    @staticmethod
    def _tile(words: Tensor, a: Tensor, seen_text: Tensor, frames: Tensor, b: Tensor, seen_video: Tensor) -> Tensor:
        cosine = torch.einsum("nld,mfd->nmlf", words, frames)
        lowest = torch.finfo(cosine.dtype).min
        to_frame = cosine.masked_fill(~seen_video[None, :, None, :], lowest).amax(dim=3)  # [N, M, L]
        to_word = cosine.masked_fill(~seen_text[:, None, :, None], lowest).amax(dim=2)  # [N, M, F]
        empty = ~seen_video.any(dim=1)  # a video without frames matches nothing
        score = (torch.einsum("nml,nl->nm", to_frame, a) + torch.einsum("nmf,mf->nm", to_word, b)) / 2
        return score.masked_fill(empty[None], 0.0)


def _picked(rows: Tensor, which: Tensor) -> Tensor:
    """Rows [B, R, D] and numbers of them [B, N] -> [B, N, D]. By a product, whose gradient has the same bits every time."""
    chosen = which[..., None] == torch.arange(rows.shape[1], device=rows.device)
    return chosen.to(rows.dtype) @ rows


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def _weights(mlp: nn.Sequential, features: Tensor, seen: Tensor) -> Tensor:
    raw = mlp(features.to(next(mlp.parameters()).dtype)).squeeze(-1).float()
    raw = raw.masked_fill(~seen, torch.finfo(torch.float32).min)
    return raw.softmax(dim=-1) * seen

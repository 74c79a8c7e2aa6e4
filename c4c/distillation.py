"""Distillation of a teacher's scores into the model that is trained, over the global batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from c4c.caption_loss import mean_over_ranks
from c4c.losses import Score, both_ways, gather


class TeacherScores(NamedTuple):
    """A teacher's scores, scaled by its own temperature: of this rank's captions with all ranks' videos [B N, V], and of this rank's
    videos with all ranks' captions [B, V N]. known: bool [B], which of this rank's videos it knows; None: all."""

    of_texts: Tensor
    of_videos: Tensor
    known: Tensor | None = None


def distillation_loss(
    text: Tensor, video: Tensor, present: Tensor, scale: Tensor, score: Score, teacher: TeacherScores, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """How far the model's choices are from a teacher's; a scalar.

        L = T^2 / 2 * ( mean over captions t of KL(p(. | t) || q(. | t))      p, q softmaxes over the videos of all ranks
                      + mean over videos v of KL(p(. | v) || q(. | v)) )      p, q softmaxes over the captions of all ranks

    p is the softmax of the teacher's scaled scores over the temperature T, q that of the model's. T^2 keeps the size of the gradient
    (Hinton et al., https://arxiv.org/abs/1503.02531, section 2).

    text [B, N, ...], video [B, ...], present bool [B, N], scale and score: as `c4c.caption_loss.caption_loss` takes them. Captions that
    are not present, and videos without any caption or that the teacher does not know, are nobody's candidates and are not counted.
    """
    if teacher.known is not None:
        present = present & teacher.known[:, None]
    all_present = gather(present.to(video.dtype)).detach().bool()  # [V, N]
    scores, scores_of_videos = both_ways(text.flatten(0, 1), video, scale, score)
    t2v = _divergence(teacher.of_texts, scores, all_present.any(dim=1), temperature)
    v2t = _divergence(teacher.of_videos, scores_of_videos, all_present.flatten(), temperature)
    total = mean_over_ranks(t2v, present.flatten(), all_present)
    total = total + mean_over_ranks(v2t, present.any(1), all_present.any(1))
    return total * (temperature**2 / 2)


def _divergence(teacher: Tensor, model: Tensor, candidate: Tensor, temperature: float) -> Tensor:
    """KL(softmax of teacher || softmax of model) of each row [R, C] over the candidates, bool [C]; [R]."""
    lowest = torch.finfo(model.dtype).min  # not -inf: a row without candidates stays finite
    p, q = ((x / temperature).masked_fill(~candidate, lowest).log_softmax(dim=1) for x in (teacher, model))
    return (p.exp() * (p - q)).sum(dim=1)

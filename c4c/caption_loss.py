"""The softmax loss of videos with several captions each, with smoothed targets, and without false negatives."""

import torch
from torch import Tensor

from c4c.losses import Score, both_ways, equal_rows, gather, process_rank, world_size


def caption_loss(
    text: Tensor, video: Tensor, present: Tensor, scale: Tensor, score: Score, *, smoothing: float = 0.0,
    tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean of text-to-video and video-to-text cross-entropy over all captions and videos of all ranks; a scalar.

        t2v = -mean over captions t of log p(owner of t | t),            p a softmax over videos
        v2t = -mean over videos v of (1 / |P|) sum_{t in P} log p(t | v), p a softmax over captions, P the captions of v
        L = (t2v + v2t) / 2

    v2t is the "out" form of SupCon (Khosla et al., https://arxiv.org/abs/2004.11362, equation 2), whose denominator has all
    positives in it. With one caption a video it is `c4c.losses.contrastive_loss`.

    text [B, N, ...], video [B, ...]: this rank's; the captions in row i of one belong to row i of the other. present bool
    [B, N]: captions that are not padding; a row without any is padding. score(texts, videos) -> [N, M], multiplied by `scale`.

    smoothing: the share of each target that is spread evenly over the row's candidates, positives included (Szegedy et al.,
    https://arxiv.org/abs/1512.00567, section 7). tokens int64 [B, N, L]: if given, a caption and a video of which another
    caption has the same tokens are no candidates of each other.
    """
    rank = process_rank()
    rows, captions = present.shape
    all_present = gather(present.to(video.dtype)).detach().bool()  # [V, N], V rows of all ranks
    owner = torch.arange(len(all_present), device=video.device)
    own = owner[rank * rows : (rank + 1) * rows]
    belongs = own.repeat_interleave(captions)[:, None] == owner  # [B N, V]
    belongs_all = owner.repeat_interleave(captions) == own[:, None]  # [B, V N]
    to_video, to_text = ~all_present.any(dim=1)[None], ~all_present.flatten()[None]  # what is no candidate
    if tokens is not None:
        same = _same(tokens.flatten(0, 1), present.flatten(), all_present.flatten())  # [B N, V N]
        to_video = to_video | same.unflatten(1, (-1, captions)).any(dim=2)
        to_text = to_text | same.unflatten(0, (-1, captions)).any(dim=1)
    positive = belongs_all & (all_present.flatten()[None] | ~present.any(dim=1)[:, None])
    scores, scores_of_videos = both_ways(text.flatten(0, 1), video, scale, score)
    t2v = _costs(scores, belongs, belongs | ~to_video, smoothing)
    v2t = _costs(scores_of_videos, positive, positive | ~to_text & ~belongs_all, smoothing)
    return (
        mean_over_ranks(t2v, present.flatten(), all_present) + mean_over_ranks(v2t, present.any(1), all_present.any(1))
    ) / 2


def _same(tokens: Tensor, present: Tensor, all_present: Tensor) -> Tensor:
    """Bool [own captions, all captions]: which are the same, neither being padding."""
    return equal_rows(tokens, gather(tokens)) & present[:, None] & all_present


def _costs(scores: Tensor, positive: Tensor, candidate: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each row of scores [R, C] with a target spread evenly over the positives, and smoothed over candidates."""
    mean = torch.where(positive, scores, 0.0).sum(dim=1) / positive.sum(dim=1)
    if smoothing:
        everywhere = torch.where(candidate, scores, 0.0).sum(dim=1) / candidate.sum(dim=1)
        mean = (1 - smoothing) * mean + smoothing * everywhere
    return scores.masked_fill(~candidate, float("-inf")).logsumexp(dim=1) - mean


def mean_over_ranks(costs: Tensor, counted: Tensor, all_counted: Tensor) -> Tensor:
    """This rank's part of the mean over what counts on all ranks, times their number."""
    return torch.where(counted, costs, 0.0).sum() * world_size() / all_counted.sum().clamp(min=1)

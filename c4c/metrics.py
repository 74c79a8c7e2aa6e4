"""Retrieval metrics. A tie never helps: whatever scores at least as high as the right answer stands before it."""

import numpy as np
import torch
from torch import Tensor

_TILE = 1024  # queries scored at once, so that a large gallery needs no full matrix on the device


def text_ranks(similarity: Tensor, video_of_text: Tensor) -> Tensor:
    """For each text the 0-based rank of its video: int64 [N].

    similarity [N, M]; video_of_text int64 [N]. A score that is not a number is never below the right one, and a right
    answer that is not a number comes last.
    """
    own = similarity.gather(1, video_of_text[:, None])
    return (~(similarity < own)).sum(dim=1) - 1


def video_ranks(similarity: Tensor, video_of_text: Tensor) -> Tensor:
    """For each video the 0-based rank of its own texts among all videos' texts: int64 [M].

    A video's texts count by their best score, as in CLIP4Clip's evaluation of several captions a video.
    """
    videos = similarity.shape[1]
    worst_first = torch.nan_to_num(similarity, nan=float("inf"))
    best = torch.full((videos, videos), float("-inf"), dtype=similarity.dtype, device=similarity.device)
    # best[k, j]: video j against video k's texts
    best = best.scatter_reduce(0, video_of_text[:, None].expand_as(worst_first), worst_first, "amax")
    own = best.diagonal()
    broken = torch.zeros(videos, dtype=torch.bool, device=similarity.device)
    broken[video_of_text[similarity.gather(1, video_of_text[:, None]).squeeze(1).isnan()]] = True
    ranks = (best >= own).sum(dim=0) - 1
    return torch.where(broken, videos - 1, ranks)


def summarize(ranks: Tensor) -> dict[str, float]:
    """R1, R5, R10 in percent; MdR and MnR count from 1."""
    r = ranks.cpu().numpy()
    recalls = {f"R{k}": round(100.0 * float(np.mean(r < k)), 4) for k in (1, 5, 10)}
    return recalls | {"MdR": float(np.median(r) + 1), "MnR": round(float(np.mean(r) + 1), 4)}


def retrieval(similarity: Tensor, video_of_text: Tensor) -> dict:
    """{"t2v": {...}, "v2t": {...}, "n_texts", "n_videos"} from scores [N, M] and each text's video, int64 [N]."""
    tiles = [text_ranks(similarity[i : i + _TILE], video_of_text[i : i + _TILE]) for i in range(0, len(similarity), _TILE)]
    return {
        "t2v": summarize(torch.cat(tiles)),
        "v2t": summarize(video_ranks(similarity, video_of_text)),
        "n_texts": similarity.shape[0],
        "n_videos": similarity.shape[1],
    }

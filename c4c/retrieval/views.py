"""Several clips and crops of a video, and what they are together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from c4c.models.heads import Head
from c4c.models.heads.mean import Cosine
from c4c.retrieval.metrics import Score
from pipelines.config import CROPS


@dataclass(frozen=True)
class Views:
    """How often each video is encoded. clips: evenly shifted, see pipelines.requests.clip_request. crops: 1, the recipe's, or 3, the
    start, centre and end of the long side."""

    clips: int = 1
    crops: int = 1

    def __len__(self) -> int:
        return self.clips * self.crops

    def each(self) -> Iterator[tuple[int, str]]:
        """(number of the clip, data.crop or '' for the recipe's)."""
        for clip in range(self.clips):
            for crop in CROPS if self.crops == len(CROPS) else ("",):
                yield clip, crop


ONE_VIEW = Views()


def combined(head: Head, views: list[Tensor]) -> Tensor:
    """Features of videos, [M, ...] for each view, as one: of heads that compare vectors, the mean, normalised; of those that compare
    frames one by one, all of them, [M, views, ...]."""
    if len(views) == 1:
        return views[0]
    if isinstance(head, Cosine):
        return normalize(torch.stack(views).mean(dim=0), dim=-1)
    return torch.stack(views, dim=1)


def score_of(head: Head, views: int) -> Score:
    """What scores `combined` features: head.score, or the mean of its scores over the views."""
    if views == 1 or isinstance(head, Cosine):
        return head.score

    def score(texts: Tensor, videos: Tensor) -> Tensor:
        return torch.stack([head.score(texts, videos[:, k]) for k in range(views)]).mean(dim=0)

    return score

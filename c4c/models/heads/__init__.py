"""Similarity heads: from frame features and text features to a score for every pair.

A head is a subclass of `Head` in a file of this folder, found by its `name`: adding one is adding a file. Ranks exchange
what `text` and `video` return, one tensor each whose first axis counts texts or videos; `score` compares any of them
with any. In frame and token features a row of zeros is padding, so no mask travels with them.

A head that is `late` has no vector of a video: `score` looks at its frames one by one. For a first choice among many videos it offers
vectors all the same (`text_vector`, `video_vector`), whose products come near its scores.
"""

import importlib
import pkgutil
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import normalize


class Compared(NamedTuple):
    """Vectors that a score multiplies with each other: text and video [R, D], weight [R] in the score, counted bool [R]; rows that
    are not counted are padding."""

    text: Tensor
    video: Tensor
    weight: Tensor
    counted: Tensor

    def of(self, pairs: Tensor) -> "Compared":
        """Without the rows of padded pairs. pairs: bool [B], of as many rows each."""
        return self._replace(counted=self.counted & pairs.repeat_interleave(len(self.counted) // len(pairs)))


class Head(nn.Module):
    """The interface, and what a head does that has nothing special about a step.

    width: of the features. blocks: transformer layers, for those that have some. segments: frames a clip, for those
    whose positions are that many. attention_heads: of each layer.
    """

    name = ""  # as model.head calls it
    tokens = False  # whether it scores every token of a caption, not only the end-of-text feature
    scaled = True  # whether scores are multiplied by CLIP's temperature
    late = True  # whether a score is more than the product of two vectors
    # whether scores are made of products of a text's and a video's channels; it then has `compared`
    compares_channels = False

    def __init__(
        self, width: int, *, blocks: int = 4, segments: int = 12, attention_heads: int = 1, positions: int = 77
    ):
        super().__init__()
        self.width = width

    @property
    def most_frames(self) -> int | None:
        """How many frames it has positions for; None: any number."""
        return None

    def start_from(self, clip: nn.Module) -> str:
        """Initialise new modules from the text tower where CLIP4Clip does; why that is not possible, '' where all is as it should be."""
        return ""

    def text(self, features: Tensor) -> Tensor:
        """Text features [N, D], or [N, L, D] if `tokens` -> what stands for a text, [N, ...]."""
        return features

    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frame features [M, F, D], zeros outside `mask` [M, F] -> what stands for a video, [M, ...]."""
        raise NotImplementedError

    def score(self, text: Tensor, video: Tensor) -> Tensor:
        """What stands for N texts and M videos -> [N, M], before the temperature."""
        raise NotImplementedError

    def compared(self, text: Tensor, video: Tensor) -> list[Compared]:
        """What stands for B texts and for the video of each -> what the scores of these pairs are made of.

        The rows of a pair follow those of the one before.
        """
        raise NotImplementedError

    def text_vector(self, text: Tensor) -> Tensor:
        """What stands for a text, [N, ...] -> unit vectors [N, D]; a head that is not late scores by their product with videos'."""
        return mean_direction(text)

    def video_vector(self, video: Tensor) -> Tensor:
        """What stands for a video, [M, ...] -> unit vectors [M, D]; zeros for a video without frames."""
        return mean_direction(video)

    def score_at_once(self, text: Tensor, video: Tensor) -> Tensor:
        """As `score`, in one piece whatever memory it takes: what a graph of fixed operations can hold."""
        return self.score(text, video)


def mean_direction(features: Tensor) -> Tensor:
    """[N, D], or [N, T, D] with zeros at padding -> the normalised mean of the normalised rows, float32 [N, D]."""
    unit = normalize(features.float(), dim=-1)
    return unit if unit.dim() == 2 else normalize(unit.sum(dim=1), dim=-1)


def present(features: Tensor) -> Tensor:
    """Bool [..., T]: which rows of [..., T, D] are not padding."""
    return (features != 0).any(dim=-1)


def _all_heads() -> dict[str, type[Head]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {cls.name: cls for cls in _subclasses(Head) if cls.name}


def _subclasses(cls: type[Head]) -> list[type[Head]]:
    return [c for child in cls.__subclasses__() for c in (child, *_subclasses(child))]


HEADS = _all_heads()

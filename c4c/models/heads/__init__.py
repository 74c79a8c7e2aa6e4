"""Similarity heads: from frame features and text features to a score for every pair.

A head is a subclass of `Head` in a file of this folder, found by its `name`: adding one is adding a file. Ranks exchange
what `text` and `video` return, one tensor each whose first axis counts texts or videos; `score` compares any of them
with any. In frame and token features a row of zeros is padding, so no mask travels with them.
"""

import importlib
import pkgutil
from typing import cast

import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn


class Head(nn.Module):
    """The interface, and what a head does that has nothing special about a step.

    width: of the features. blocks: transformer layers, for those that have some. segments: frames a clip, for those
    whose positions are that many. attention_heads: of each layer.
    """

    name = ""  # as model.head calls it
    tokens = False  # whether it scores every token of a caption, not only the end-of-text feature
    scaled = True  # whether scores are multiplied by CLIP's temperature

    def __init__(
        self, width: int, *, blocks: int = 4, segments: int = 12, attention_heads: int = 1, positions: int = 77
    ):
        super().__init__()
        self.width = width

    @property
    def most_frames(self) -> int | None:
        """How many frames it has positions for; None: any number."""
        return None

    def start_from(self, clip: nn.Module) -> None:
        """Initialise new modules from CLIP's text tower where CLIP4Clip does."""

    def text(self, features: Tensor) -> Tensor:
        """Text features [N, D], or [N, L, D] if `tokens` -> what stands for a text, [N, ...]."""
        return features

    def video(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frame features [M, F, D], zeros outside `mask` [M, F] -> what stands for a video, [M, ...]."""
        raise NotImplementedError

    def score(self, text: Tensor, video: Tensor) -> Tensor:
        """What stands for N texts and M videos -> [N, M], before the temperature."""
        raise NotImplementedError


def present(features: Tensor) -> Tensor:
    """Bool [..., T]: which rows of [..., T, D] are not padding."""
    return (features != 0).any(dim=-1)


def copy_blocks(blocks: nn.ModuleList, clip: nn.Module) -> int:
    """Copy CLIP's text blocks 0, 1, … into `blocks`; returns how many were copied."""
    pairs = list(zip(blocks, cast(Transformer, clip.transformer).resblocks, strict=False))
    with torch.no_grad():
        for block, source in pairs:
            block.load_state_dict(source.state_dict())
    return len(pairs)


def _all_heads() -> dict[str, type[Head]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {cls.name: cls for cls in _subclasses(Head) if cls.name}


def _subclasses(cls: type[Head]) -> list[type[Head]]:
    return [c for child in cls.__subclasses__() for c in (child, *_subclasses(child))]


HEADS = _all_heads()

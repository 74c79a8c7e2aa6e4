"""Fewer and shorter rows for the text tower: equal captions are encoded once, and padding behind the longest is left out.

A causal tower never sees what follows the token that it is read at, so features and gradients are those of the full rows, up to the
rounding of sums in another order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from c4c.models.text_tower import inside_captions
from c4c.models.tokenizer_spec import depends_on_padding
from pipelines.tokens import CLIPS

MULTIPLE = 8  # of rows and of tokens: few shapes, which torch.compile and a GPU's kernels want


@dataclass(frozen=True)
class CaptionRows:
    """What of captions [N, L] the text tower has to see.

    length: tokens of a row. first, place: of captions that are encoded once, the rows to encode, int64 [U], and for each caption its
    place among them, int64 [N]; None: all rows.
    """

    length: int
    first: Tensor | None = None
    place: Tensor | None = None

    def take(self, tokens: Tensor) -> Tensor:
        """int64 [N, L] -> [U, length], on the device of `tokens`."""
        rows = tokens if self.first is None else tokens[_to(self.first, tokens.device)]
        return rows[:, : self.length]

    def spread(self, features: Tensor, length: int) -> Tensor:
        """Features of what `take` gave, [U, D] or of words [U, l, D] -> [N, D] or [N, length, D], zeros at what was left out."""
        if self.place is not None:  # by an index: its gradient sums in a fixed order, on a GPU too
            features = features[_to(self.place, features.device)]
        return pad(features, (0, 0, 0, length - features.shape[1])) if features.dim() == 3 else features


def plan(tokens: Tensor, spec: dict, *, trim: bool, share: bool, words: bool) -> CaptionRows:
    """The rows for captions int64 [N, L] on the host. spec: the towers. words: whether features of every token are wanted.

    trim: leave out padding (see `cannot_trim`). share: encode equal rows once.
    """
    length = tokens.shape[1]
    if trim:
        length = min(length, _rounded(_needed(tokens, spec, words)))
    if not share:
        return CaptionRows(length)
    _, first, place = np.unique(tokens.numpy(), axis=0, return_index=True, return_inverse=True)
    count = _rounded(len(first))
    if count >= len(tokens):
        return CaptionRows(length)
    first = np.pad(first, (0, count - len(first)))  # by row 0, whose further features nobody reads
    return CaptionRows(length, torch.from_numpy(first), torch.from_numpy(place.reshape(-1)))


def cannot_trim(spec: dict) -> str:
    """Why captions cannot be cut to the longest of a batch without a change of their features, '' if they can."""
    if "hf_model_name" in spec["text_cfg"]:
        return "its text tower is a Hugging Face model, whose attention may go both ways"
    if depends_on_padding(spec["text_cfg"]) or (CLIPS | spec.get("tokenizer", {}))["fixed_length"]:
        return "features of its text tower depend on the padding"
    return ""


def _needed(tokens: Tensor, spec: dict, words: bool) -> int:
    """Tokens of the longest caption, up to the last that is read."""
    if not len(tokens):
        return 1
    text = spec["text_cfg"]
    last = tokens.argmax(dim=1)
    if text.get("pool_type") == "eos":
        last = torch.maximum(last, (tokens == text.get("eos_id", 2)).int().argmax(dim=1))
    if words:
        about = spec.get("tokenizer", {})
        inside = inside_captions(tokens, about.get("pad_id"), about.get("pad_ends", False))
        last = torch.maximum(last, (inside * torch.arange(tokens.shape[1])).amax(dim=1))
    return int(last.numpy().max()) + 1


def _rounded(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


def _to(index: Tensor, device: torch.device) -> Tensor:
    """On the device, without a wait for it."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)

"""One update of the weights: forward, backward and the optimizer, with accumulation or gradient caching."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.losses import LOSSES, world_size
from c4c.models.clip4clip import MAX_SCALE, CLIP4Clip
from c4c.settings import TrainConfig
from c4c.zero import patches, state

if TYPE_CHECKING:
    from c4c.models.compiled import CompiledTowers

MAX_LOGIT = math.log(MAX_SCALE)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # frames, mask, tokens, and what of them is not padding


@dataclass(frozen=True)
class Pull:
    """Gradient caching: the loss's gradient at a micro-batch's features; in one of them also all features and `valid`."""

    text: Tensor | None
    video: Tensor | None
    all_features: tuple[Tensor, Tensor, Tensor] | None = None


class Learner(nn.Module):
    """Model and loss in one module, so that DeepSpeed's hooks see every weight that is used.

    peak_lrs, parts: of each group of weights, its peak learning rate and the part of the model that it is of (see
    c4c.training.param_groups). notes: what a person should know about the engine at the start. compiled: the towers, where
    they are compiled. All are set by c4c.zero.engine.build_engine.
    """

    peak_lrs: list[float]
    parts: list[str]
    notes: list[str]
    compiled: "CompiledTowers | None" = None

    def __init__(self, model: CLIP4Clip, loss: str = "cross_entropy"):
        super().__init__()
        self.model, self._criterion = model, LOSSES[loss]
        model.clip.logit_scale = patches.with_an_axis(model.clip.logit_scale)

    def forward(
        self,
        frames: Tensor | None,
        frame_mask: Tensor | None,
        tokens: Tensor | None,
        valid: Tensor | None = None,
        pull: Pull | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With `valid`, as `inputs_of` gives it: this rank's loss (see c4c.losses). Without: what stands for texts and
        videos, for evaluation.

        With `pull`, a micro-batch of gradient caching: a number whose gradient is the loss's (see `_cached_step`); without
        frames, the loss of `pull.all_features`.
        """
        if frames is None:
            assert pull is not None and pull.all_features is not None
            return self._loss(*pull.all_features)
        text, video = self.model(frames, frame_mask, tokens)
        if valid is None:
            return text, video
        if pull is None:
            return self._loss(text, video, valid)
        pulled = (text * pull.text).sum() + (video * pull.video).sum()
        return pulled if pull.all_features is None else pulled + self._loss(*pull.all_features)

    def _loss(self, text: Tensor, video: Tensor, valid: Tensor) -> Tensor:
        return self._criterion(text, video, valid, self.model.scale(), self.model.head.score)


def inputs_of(batch, loss: str) -> Inputs:
    """Frames, mask, tokens, and what of them is not padding: rows, bool [B]; for MIL-NCE captions, bool [B, bag]."""
    if loss != "mil_nce":
        return batch.frames, batch.frame_mask, batch.tokens, batch.valid
    tokens = batch.tokens if batch.tokens.dim() == 3 else batch.tokens[:, None]
    captions = tokens[..., 0] != 0  # every caption begins with a start token
    return batch.frames, batch.frame_mask, tokens, batch.valid[:, None] & captions


def train_step(engine, batch, factor: float, train: TrainConfig, frozen: Collection[str] = ()) -> Tensor:
    """One update of the weights, at `factor` times the peak learning rate; returns this rank's loss, on the device.

    frozen: parts of the model (see c4c.training.param_groups.part_of) whose learning rate is 0 in this step.
    `c4c.zero.skipping.was_applied` then tells whether the weights were changed: not where the loss or a gradient is not
    finite.
    """
    for group, lr, part in zip(engine.optimizer.param_groups, engine.module.peak_lrs, engine.module.parts, strict=True):
        group["lr"] = 0.0 if part in frozen else lr * factor
    inputs = inputs_of(batch, train.loss)
    if train.accumulate > 1:
        loss = _accumulated_step(engine, inputs, train.accumulate)
    elif train.micro_batch_size and train.micro_batch_size < len(batch.valid):
        loss = _cached_step(engine, inputs, train.micro_batch_size)
    else:
        loss = engine(*inputs)
        patches.backward(engine, loss)
        engine.step()
    temperature = engine.module.model.clip.logit_scale
    if temperature.requires_grad:  # at 1/100 or above, as CLIP4Clip keeps it after each step
        state.clamp(engine, temperature, MAX_LOGIT)
    return loss.detach()


def _accumulated_step(engine, inputs: Inputs, parts: int) -> Tensor:
    """Plain accumulation: `parts` smaller global batches, each with only its own negatives; one update with their mean."""
    rows = [
        slice(i, None, parts) for i in range(parts)
    ]  # in turn, so that every part gets some of the padding at the end
    valid = inputs[-1].flatten(1).any(dim=1) if inputs[-1].dim() > 1 else inputs[-1]
    counts = torch.stack([valid[r].sum() for r in rows]).float()
    if world_size() > 1:
        dist.all_reduce(counts)
    losses = []
    for r, share in zip(rows, counts / counts.sum(), strict=True):
        loss = engine(*(t[r] for t in inputs)) * share
        patches.backward(engine, loss)
        engine.step()  # updates at the last one only
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def _cached_step(engine, inputs: Inputs, micro: int) -> Tensor:
    """Gradient caching (https://arxiv.org/abs/2101.06983): the whole global batch's negatives with the memory of `micro`.

    Encode everything without graphs; take the loss's gradient at the features; encode each micro-batch again and pull
    that gradient through. The head's own weights and the temperature get theirs in one of these passes: the last, when ZeRO
    exchanges gradients; under stage 3 the first, which alone overwrites what its buffers hold from the step before.
    """
    *encoded, valid = inputs
    parts = [tuple(t[i : i + micro] for t in encoded) for i in range(0, len(valid), micro)]
    learner = engine.module
    with torch.no_grad():
        texts, videos = (torch.cat(features) for features in zip(*(learner(*part) for part in parts), strict=True))
    texts.requires_grad_(), videos.requires_grad_()
    loss = learner(None, None, None, pull=Pull(None, None, (texts, videos, valid)))
    text_grad, video_grad = torch.autograd.grad(loss, (texts, videos))
    all_features = (texts.detach(), videos.detach(), valid)
    scoring = 0 if engine.zero_optimization_stage() == 3 else len(parts) - 1
    for i, part in enumerate(parts):
        rows = slice(i * micro, (i + 1) * micro)
        pull = Pull(text_grad[rows], video_grad[rows], all_features if i == scoring else None)
        patches.backward(engine, engine(*part, valid[rows], pull))
        engine.step()  # updates at the last one only
    return loss

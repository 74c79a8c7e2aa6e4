"""One update of the weights: forward, backward and the optimizer, with accumulation or gradient caching."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.distillation import TeacherScores
from c4c.losses import world_size
from c4c.models.clip4clip import LOGIT_BIAS, MAX_SCALE, CLIP4Clip
from c4c.objective import LossOptions, loss_of
from c4c.settings import TrainConfig
from c4c.zero import patches, state

if TYPE_CHECKING:
    from c4c.models.compiled import CompiledTowers
    from c4c.training.stored_teacher import StoredTeacher
    from c4c.training.teacher import Teacher

MAX_LOGIT = math.log(MAX_SCALE)
SIGLIP_SCALE = 10.0  # which LOGIT_BIAS goes with (section 3.2 of the paper)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # frames, mask, tokens, and what of them is not padding


@dataclass(frozen=True)
class Pull:
    """Gradient caching: the loss's gradient at a micro-batch's features; in one of them also all that the loss takes: features of
    texts and videos, `valid`, tokens, and what the teacher says of them, if there is one."""

    text: Tensor | None
    video: Tensor | None
    all_features: tuple[Tensor, Tensor, Tensor, Tensor, TeacherScores | None] | None = None


class Learner(nn.Module):
    """Model and loss in one module, so that DeepSpeed's hooks see every weight that is used.

    loss: as train.loss. For `sigmoid` a model without a bias gets one, which starts at `logit_bias`; the other losses use none,
    and one that the model has is kept as it is. options: what else the settings say of it. notes: what a person should know at the
    start. Raises ValueError for options that the model's head cannot have.

    peak_lrs, parts: of each group of weights, its peak learning rate and the part of the model that it is of (see
    c4c.training.param_groups). compiled: the towers, where they are compiled. exact_buffers: stored buffers by name, as they were
    before they were rounded to the engine's precision. They are set by c4c.zero.engine.build_engine, which has notes of its own.
    gradient_scale: see c4c.losses.sigmoid_loss. left_out: names of the model's weights that checkpoints do not hold (see
    c4c.models.origin). teacher: of train.teacher; it is no part of this module.
    """

    peak_lrs: list[float]
    parts: list[str]
    exact_buffers: dict[str, Tensor]
    compiled: "CompiledTowers | None" = None
    gradient_scale = 1.0
    left_out: frozenset[str] = frozenset()
    teacher: "Teacher | StoredTeacher | None" = None

    def __init__(
        self, model: CLIP4Clip, loss: str = "cross_entropy", logit_bias: float = LOGIT_BIAS,
        options: LossOptions | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.loss, self.options = model, loss, options or LossOptions()
        self.options.check_head(model)
        self.notes: list[str] = []
        model.clip.logit_scale = patches.with_an_axis(model.clip.logit_scale)
        if loss == "sigmoid" and model.clip.logit_bias is None:
            model.add_bias(logit_bias)
            note = f"the weights have no logit_bias: train.loss=sigmoid starts it at {logit_bias:g} (train.logit_bias)"
            scale = model.scale().item()
            if scale > 3 * SIGLIP_SCALE and logit_bias == LOGIT_BIAS:
                note += f", which SigLIP does beside a scale of {SIGLIP_SCALE:g}; that of these weights is {scale:.1f}"
            self.notes.append(note)
        elif model.clip.logit_bias is not None:
            model.clip.logit_bias = patches.with_an_axis(model.clip.logit_bias)
            if loss != "sigmoid":  # no gradient would reach it
                model.clip.logit_bias.requires_grad_(False)

    def forward(
        self,
        frames: Tensor | None,
        frame_mask: Tensor | None,
        tokens: Tensor | None,
        valid: Tensor | None = None,
        pull: Pull | None = None,
        tokens_on_host: Tensor | None = None,
        teacher_rows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With `valid`, as `inputs_of` gives it: this rank's loss (see c4c.losses). Without: what stands for texts and
        videos, for evaluation.

        With `pull`, a micro-batch of gradient caching: a number whose gradient is the loss's (see `_cached_step`); without
        frames, the loss of `pull.all_features`. tokens_on_host: see CLIP4Clip.forward. teacher_rows: see `taught`.
        """
        if frames is None:
            assert pull is not None and pull.all_features is not None
            return self._loss(*pull.all_features)
        text, video = self.model(frames, frame_mask, tokens, tokens_on_host)
        if valid is None:
            return text, video
        if pull is None:
            return self._loss(text, video, valid, tokens, self.taught([(frames, frame_mask, tokens)], teacher_rows))
        pulled = (text * pull.text).sum() + (video * pull.video).sum()
        return pulled if pull.all_features is None else pulled + self._loss(*pull.all_features)

    def taught(self, parts: Sequence[tuple], rows: Tensor | None) -> TeacherScores | None:
        """What the teacher says of a rank's rows, in parts of (frames, mask, tokens), and as its `rows_of` gives them; None without a
        teacher. Called on every rank."""
        return None if self.teacher is None else self.teacher.scores(parts, rows)

    def _loss(
        self, text: Tensor, video: Tensor, valid: Tensor, tokens: Tensor | None, teacher: TeacherScores | None
    ) -> Tensor:
        return loss_of(self.loss, self.model, text, video, valid, self.gradient_scale, self.options, tokens, teacher)


def inputs_of(batch, loss: str) -> Inputs:
    """Frames, mask, tokens, and what of them is not padding: rows, bool [B]; of several captions a row, and for MIL-NCE, captions,
    bool [B, captions]."""
    if loss != "mil_nce" and batch.tokens.dim() == 2:
        return batch.frames, batch.frame_mask, batch.tokens, batch.valid
    tokens = batch.tokens if batch.tokens.dim() == 3 else batch.tokens[:, None]
    return batch.frames, batch.frame_mask, tokens, batch.caption_mask


def train_step(engine, batch, factor: float, train: TrainConfig, frozen: Collection[str] = ()) -> Tensor:
    """One update of the weights, at `factor` times the peak learning rate; returns this rank's loss, on the device.

    frozen: parts of the model (see c4c.training.param_groups.part_of) whose learning rate is 0 in this step.
    `c4c.zero.skipping.was_applied` then tells whether the weights were changed: not where the loss or a gradient is not
    finite.
    """
    for group, lr, part in zip(engine.optimizer.param_groups, engine.module.peak_lrs, engine.module.parts, strict=True):
        group["lr"] = 0.0 if part in frozen else lr * factor
    inputs = inputs_of(batch, train.loss)
    on_host = batch.tokens_on_host if engine.module.model.shortens_captions else None
    rows = None if engine.module.teacher is None else engine.module.teacher.rows_of(batch)
    engine.module.gradient_scale = patches.loss_scaler(engine).get("cur_scale", 1.0)
    if train.accumulate > 1:
        loss = _accumulated_step(engine, inputs, train.accumulate, on_host, rows)
    elif train.micro_batch_size and train.micro_batch_size < len(batch.valid):
        loss = _cached_step(engine, inputs, train.micro_batch_size, on_host, rows)
    else:
        loss = engine(*inputs, None, on_host, rows)
        patches.backward(engine, loss)
        engine.step()
    model = engine.module.model
    if model.bounded and model.clip.logit_scale.requires_grad:  # as CLIP4Clip bounds it after each step
        state.clamp(engine, model.clip.logit_scale, MAX_LOGIT)
    if engine.average is not None:  # of the weights as they are now, clamped
        engine.average.update(engine)
    return loss.detach()


def _accumulated_step(
    engine, inputs: Inputs, parts: int, on_host: Tensor | None = None, taught_rows: Tensor | None = None
) -> Tensor:
    """Plain accumulation: `parts` smaller global batches, each with only its own negatives; one update with their mean."""
    # in turn, so that every part gets some of the padding at the end
    rows = [slice(i, None, parts) for i in range(parts)]
    valid = inputs[-1].flatten(1).any(dim=1) if inputs[-1].dim() > 1 else inputs[-1]
    counts = torch.stack([valid[r].sum() for r in rows]).float()
    if world_size() > 1:
        dist.all_reduce(counts)
    losses = []
    for r, share in zip(rows, counts / counts.sum(), strict=True):
        loss = engine(*(t[r] for t in inputs), None, _rows(on_host, r), _rows(taught_rows, r)) * share
        patches.backward(engine, loss)
        engine.step()  # updates at the last one only
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def _rows(of_all: Tensor | None, rows: slice) -> Tensor | None:
    return None if of_all is None else of_all[rows]


def _cached_step(
    engine, inputs: Inputs, micro: int, on_host: Tensor | None = None, taught_rows: Tensor | None = None
) -> Tensor:
    """Gradient caching (https://arxiv.org/abs/2101.06983): the whole global batch's negatives with the memory of `micro`.

    Encode everything without graphs; take the loss's gradient at the features; encode each micro-batch again and pull
    that gradient through. A teacher is asked once. The head's own weights and the temperature get theirs in one of these passes: the last, when ZeRO
    exchanges gradients; under stage 3 the first, which alone overwrites what its buffers hold from the step before.
    """
    *encoded, valid = inputs
    pieces = [slice(i, i + micro) for i in range(0, len(valid), micro)]
    parts = [tuple(t[rows] for t in encoded) for rows in pieces]
    learner = engine.module
    with torch.no_grad():
        features = [learner(*part, None, None, _rows(on_host, rows)) for part, rows in zip(parts, pieces, strict=True)]
        texts, videos = (torch.cat(kind) for kind in zip(*features, strict=True))
    texts.requires_grad_(), videos.requires_grad_()
    taught = learner.taught(parts, taught_rows)
    loss = learner(None, None, None, pull=Pull(None, None, (texts, videos, valid, encoded[2], taught)))
    scale = learner.gradient_scale  # of fp16: a head that computes in it would lose small gradients without
    text_grad, video_grad = (grad / scale for grad in torch.autograd.grad(loss * scale, (texts, videos)))
    all_features = (texts.detach(), videos.detach(), valid, encoded[2], taught)
    scoring = 0 if engine.zero_optimization_stage() == 3 else len(parts) - 1
    for i, (part, rows) in enumerate(zip(parts, pieces, strict=True)):
        pull = Pull(text_grad[rows], video_grad[rows], all_features if i == scoring else None)
        patches.backward(engine, engine(*part, valid[rows], pull, _rows(on_host, rows)))
        engine.step()  # updates at the last one only
    return loss

"""What training minimises: the loss that train.loss names, with the settings beside it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from c4c.caption_loss import caption_loss
from c4c.decorrelation import decorrelation
from c4c.distillation import TeacherScores, distillation_loss
from c4c.losses import bag_loss, contrastive_loss, sigmoid_loss
from c4c.settings import TrainConfig

if TYPE_CHECKING:
    from c4c.models.clip4clip import CLIP4Clip


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The settings of a loss, as in `TrainConfig`, which refuses those that do not go together."""

    label_smoothing: float = 0.0
    mask_equal_captions: bool = False
    decorrelation: float = 0.0
    decorrelation_off_diagonal: float = 0.06
    teacher_weight: float = 1.0
    teacher_temperature: float = 1.0

    @classmethod
    def of(cls, train: TrainConfig) -> "LossOptions":
        """Those of a run."""
        return cls(**{name: getattr(train, name) for name in cls.__dataclass_fields__})

    def check_head(self, model: "CLIP4Clip") -> None:
        """Raise ValueError for a head without what the settings need."""
        if self.decorrelation and not model.head.compares_channels:
            raise ValueError(
                f"train.decorrelation={self.decorrelation:g} needs a head that compares the channels of a text with those of a video; "
                f"{model.head.name} scores both in one transformer. Set train.decorrelation=0, or another model.head, such as wti"
            )


_PLAIN = LossOptions()


def loss_of(
    name: str, model: "CLIP4Clip", text: Tensor, video: Tensor, valid: Tensor, gradient_scale: float = 1.0,
    options: LossOptions = _PLAIN, tokens: Tensor | None = None, teacher: TeacherScores | None = None,
) -> Tensor:  # fmt: skip
    """The loss that train.loss calls `name`, of the features that `model` gave; a scalar (see c4c.losses for ranks).

    valid: bool [B] rows that are not padding; or bool [B, N] captions, where text is [B, N, ...] and video [B, ...].
    gradient_scale: see `sigmoid_loss`; the other losses need none. tokens int64 [B, L] or [B, N, L]: of the texts, which only
    `options.mask_equal_captions` needs. teacher: what a teacher says of the same batch, to learn from as well.
    """
    tokens = tokens if options.mask_equal_captions else None
    if name == "sigmoid":
        weights = [weight for weight in model.head.parameters() if weight.requires_grad]
        scale, bias, score = model.scale(), model.bias(), model.head.score
        loss = sigmoid_loss(text, video, valid, scale, bias, score, weights, gradient_scale, tokens)
    else:
        loss = _softmax_loss(name, model, text, video, valid, options.label_smoothing, tokens)
    if options.decorrelation:
        loss = loss + options.decorrelation * _decorrelation(model, text, video, valid, options)
    if teacher is not None:
        rows, present = (text, valid) if valid.dim() == 2 else (text[:, None], valid[:, None])
        scale, score, temperature = model.scale(), model.head.score, options.teacher_temperature
        distilled = distillation_loss(rows, video, present, scale, score, teacher, temperature)
        loss = loss + options.teacher_weight * distilled
    return loss


def _softmax_loss(
    name: str, model: "CLIP4Clip", text: Tensor, video: Tensor, valid: Tensor, smoothing: float, tokens: Tensor | None
) -> Tensor:
    scale, score = model.scale(), model.head.score
    if name == "mil_nce":
        return bag_loss(text, video, valid, scale, score)
    if valid.dim() == 1 and not smoothing and tokens is None:
        return contrastive_loss(text, video, valid, scale, score)
    if valid.dim() == 1:
        text, valid, tokens = text[:, None], valid[:, None], None if tokens is None else tokens[:, None]
    return caption_loss(text, video, valid, scale, score, smoothing=smoothing, tokens=tokens)


def _decorrelation(model: "CLIP4Clip", text: Tensor, video: Tensor, valid: Tensor, options: LossOptions) -> Tensor:
    """Of the pairs of texts with their own videos: a video with several captions is in as many."""
    if valid.dim() == 2:
        text, video = text.flatten(0, 1), video.repeat_interleave(valid.shape[1], dim=0)
    compared = [one.of(valid.flatten()) for one in model.head.compared(text, video)]
    return decorrelation(compared, options.decorrelation_off_diagonal)

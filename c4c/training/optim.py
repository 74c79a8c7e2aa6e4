"""Learning rates, decay and freezing: mmaction2's recipe by default, the official CLIP4Clip's by choice."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.bounds import COUNT, check_numbers

if TYPE_CHECKING:  # settings are checked before torch is imported
    from torch import nn

SCHEDULES = ("mmaction2", "official")
LOSSES = ("cross_entropy", "mil_nce")
DECAYS = ("mmaction2", "official")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast. The defaults are mmaction2's CLIP4Clip recipe on MSR-VTT."""

    loss: str = "cross_entropy"  # of pairs, both ways; or mil_nce, of clips and bags of captions (clips.bag)
    batch_size: int = 128  # pairs a step, over all ranks
    micro_batch_size: int = 0  # pairs a rank encodes at once; fewer than its share: gradient caching. 0: all its share
    accumulate: int = 1  # updates take the mean of so many smaller batches, each with only its own negatives
    max_bad_steps: int = 20  # in a row: steps left out because the loss or a gradient was not finite; then the run ends
    epochs: float = 5.0
    max_steps: int = 0  # stop after so many steps; 0: epochs decide. The schedule ends there too
    drop_last: bool = False  # every batch full and the rest of an epoch left out, not all batches a little smaller
    lr: float = 1e-5  # of the head; of the towers times coef_lr
    coef_lr: float = 1.0
    lr_text: float = 1.0  # of the text tower, on top of that
    lr_video: float = 1.0  # of the video tower
    freeze_text_epochs: float = 0.0  # the text tower stays as it is for so long: its learning rate is 0
    freeze_video_epochs: float = 0.0
    schedule: str = "mmaction2"  # or official: see lr_factor and official_lr_factor
    warmup_epochs: float = 0.5  # mmaction2's
    warmup_start: float = 0.05  # mmaction2's: of lr, at the first step
    warmup_fraction: float = 0.1  # official: of all steps
    weight_decay: float = 0.05
    decay: str = "mmaction2"  # none on biases, norms and scalars; official: none on biases only
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True  # of Adam's moments; BertAdam has none
    freeze_layers: int = -1  # N >= 0: towers' embeddings and blocks below N stay as they are
    eval_every: int = 1  # epochs between validations; 0: only at the end
    eval_every_steps: int = 0  # steps between further validations, each with a checkpoint; 0: none
    patience: int = 0  # the run ends after so many validations in a row without a better t2v R@1; 0: it does not

    def __post_init__(self):
        counts = dict.fromkeys(
            ("max_steps", "eval_every", "micro_batch_size", "eval_every_steps", "patience"), (0, COUNT)
        )
        epochs = ("epochs", "warmup_epochs", "freeze_text_epochs", "freeze_video_epochs")
        rates = dict.fromkeys(("lr", "coef_lr", "lr_text", "lr_video", "weight_decay", "eps"), (0, math.inf))
        shares = dict.fromkeys(("warmup_start", "warmup_fraction"), (0, 1))
        check_numbers("train", self, {
            **counts, **rates, **shares, **dict.fromkeys(epochs, (0, 1_000_000)), "freeze_layers": (-1, COUNT),
            **dict.fromkeys(("batch_size", "accumulate", "max_bad_steps"), (1, COUNT)),
        })  # fmt: skip
        if not self.epochs and not self.max_steps:
            raise ValueError(
                "train.epochs=0 trains nothing: set it above 0, or train.max_steps; launch/eval.py --ckpt evaluates weights "
                "as they are"
            )
        if self.accumulate > 1 and self.micro_batch_size:
            raise ValueError(
                f"train.accumulate={self.accumulate} and train.micro_batch_size={self.micro_batch_size} both cut the batch: "
                "micro_batch_size keeps the whole batch's negatives (gradient caching), accumulate does not; set one of them"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={self.betas}: two numbers of at least 0 and below 1")
        for name, known in (("schedule", SCHEDULES), ("decay", DECAYS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name}={getattr(self, name)}: there are {', '.join(known)}")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))

    def endless_warmup(self, steps_per_epoch: int) -> str:
        """What to say of a warm-up that lasts as long as the run; nothing if it does not."""
        total, warmup = self.total_steps(steps_per_epoch), round(self.warmup_epochs * steps_per_epoch)
        if self.schedule != "mmaction2" or warmup < max(2, total):
            return ""
        return (
            f"train.warmup_epochs={self.warmup_epochs} is {warmup} steps, and the run has {total}: the learning rate never "
            "comes to train.lr. Set it lower, or train longer"
        )

    def frozen(self, epochs: float) -> tuple[str, ...]:
        """Parts of the model that stand still after so many epochs. Decay is part of an update, so nothing of them moves."""
        until = {"text": self.freeze_text_epochs, "video": self.freeze_video_epochs}
        return tuple(part for part, end in until.items() if epochs < end)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at `step` (from 0) over its peak."""
        total = self.total_steps(steps_per_epoch)
        if self.schedule == "official":
            return official_lr_factor(step, total, self.warmup_fraction)
        return lr_factor(step, total, round(self.warmup_epochs * steps_per_epoch), self.warmup_start)


def lr_factor(step: int, total: int, warmup: int, start: float) -> float:
    """mmaction2's: linear from `start` over `warmup` steps, then half a cosine to 0 over the rest."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def official_lr_factor(step: int, total: float, warmup: float) -> float:
    """CLIP4Clip's (modules/optimization.py): x = step / total; x / warmup below it, then (1 + cos(pi x)) / 2.

    As written there: the cosine is of the whole progress, so the rate drops a little where the warm-up ends, and the
    first step has rate 0.
    """
    x = step / total
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


def freeze(model: "nn.Module", layers: int) -> None:
    """CLIP4Clip's --freeze_layer_num, in place: with N >= 0, what is not named below gets no gradient.

    Trained: blocks N and above of both towers, the towers' last norms and projections, the temperature, a 3d patch
    kernel, the head. (The official script freezes nothing at all with 3d patches, by a slip.)
    """
    if layers < 0:
        return
    always = ("ln_final.", "text_projection", "logit_scale", "visual.ln_post.", "visual.proj", "visual.conv2.")
    for name, parameter in model.named_parameters():
        tower, _, rest = name.partition(".")
        if tower != "clip" or rest.startswith(always):
            continue
        _, in_block, after = rest.partition("transformer.resblocks.")
        if not (in_block and int(after.split(".")[0]) >= layers):
            parameter.requires_grad_(False)


def parameter_groups(model: "nn.Module", config: TrainConfig) -> list[dict]:
    """Parts of the model, with and without decay: up to eight groups, each with its `part`, `lr` and `weight_decay`."""
    groups: dict[tuple, list] = {}
    apart = (config.lr_text, config.lr_video, config.freeze_text_epochs, config.freeze_video_epochs) != (1, 1, 0, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            part = part if apart or part == "head" else "towers"
            groups.setdefault((part != "head", decays(name, parameter, config.decay), part), []).append(parameter)
    factors = {"head": 1.0, "text": config.coef_lr * config.lr_text, "video": config.coef_lr * config.lr_video}
    return [
        {
            "params": groups[tower, decayed, part],
            "part": part,
            "lr": config.lr * factors.get(part, config.coef_lr),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for tower, decayed, part in sorted(groups, reverse=True)
    ]


def part_of(name: str) -> str:
    """Which part of the model a weight belongs to: text, video, head, or temperature."""
    tower, _, rest = name.removeprefix("model.").partition(".")
    if tower != "clip":
        return "head"
    return "video" if rest.startswith("visual.") else "temperature" if rest == "logit_scale" else "text"


def decays(name: str, parameter: "nn.Parameter", rule: str) -> bool:
    """Whether weight decay applies: official, to all whose name lacks `bias`; mmaction2, to matrices and kernels."""
    if rule == "official":
        return "bias" not in name
    return parameter.ndim > 1

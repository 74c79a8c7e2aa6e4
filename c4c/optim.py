"""Learning rate and parameter groups."""

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast. The defaults are mmaction2's CLIP4Clip recipe on MSR-VTT."""

    batch_size: int = 128  # pairs a step, over all ranks
    epochs: float = 5.0
    max_steps: int = 0  # stop after so many steps; 0: epochs decide. The schedule ends there too
    lr: float = 1e-5
    warmup_epochs: float = 0.5
    warmup_start: float = 0.05  # of lr, at the first step
    weight_decay: float = 0.05  # none on biases, norms and the temperature
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    eval_every: int = 1  # epochs between validations; 0: only at the end

    def __post_init__(self):
        for name, low in (("batch_size", 1), ("lr", 0), ("epochs", 0), ("max_steps", 0), ("weight_decay", 0), ("eval_every", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least {low}")
        if len(self.betas) != 2:
            raise ValueError(f"train.betas={self.betas}: two numbers")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))


def lr_factor(step: int, total: int, warmup: int, start: float) -> float:
    """The learning rate at `step` (from 0) over its peak: linear from `start` over `warmup` steps, then half a cosine to 0.

    mmaction2's schedule: https://github.com/open-mmlab/mmaction2, configs/retrieval/clip4clip.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels, which decay, and vectors and scalars (biases, norms, the temperature)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if p.ndim > 1]
    plain = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

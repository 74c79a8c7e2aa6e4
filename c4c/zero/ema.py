"""An exponential moving average of the trained weights, in fp32.

It lies beside Adam's moments in the optimizer's state, under the name `ema`: each rank averages its own part of the fp32 masters, so that
a step exchanges nothing, and what saves, restores and partitions the moments anew does so with the average.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from c4c.zero import patches
from c4c.zero.config import at
from c4c.zero.skipping import was_applied

KEY = "ema"  # in the optimizer's state
_MOMENTS = ("exp_avg", "exp_avg_sq")
# of DeepSpeed's configuration, what an average can go with: Adam with two moments, and fp32 masters that stay in one place
_ALLOWED = {
    "optimizer.type": ("Adam", "AdamW", "adam", "adamw"),
    "optimizer.params.amsgrad": (None, False),
    "zero_optimization.offload_optimizer.device": (None, "none", "cpu"),
    "zero_optimization.offload_optimizer.ratio": (None, 1),
    "zero_optimization.offload_optimizer.super_offload": (None, False),
    "bf16.bf16_master_weights_and_grads": (None, False),
    "fp16.fp16_master_weights_and_grads": (None, False),
}


def require_averages(decay: float, settings: dict) -> None:
    """Raise ValueError if weights cannot be averaged under these settings of DeepSpeed's."""
    for path, allowed in _ALLOWED.items():
        if decay and (given := at(settings, path)) not in allowed:
            raise ValueError(
                f"train.ema={decay:g} is not possible with deepspeed.{path}={given}: leave one of the two out"
            )


def weight_of(decay: float, updates: int | Tensor) -> float | Tensor:
    """What the newest weights count in the average after so many updates, that one included.

    1 - min(decay, (1 + n) / (10 + n)), which is max(1 - decay, 9 / (10 + n)): at first the average follows quickly, so that the weights at
    the start do not count for long (tf.train.ExponentialMovingAverage, with num_updates = n).
    """
    if isinstance(updates, Tensor):
        return (9.0 / (10.0 + updates)).clamp(min=1.0 - decay)
    return max(1.0 - decay, 9.0 / (10.0 + updates))


class WeightAverage:
    """Of a new engine with Adam. Starts as the weights are; updates: that are averaged so far, as many as Adam's."""

    def __init__(self, engine, decay: float):
        self.decay = decay
        self.updates: int | Tensor = 0
        patches.make_moments(engine, [*_MOMENTS, KEY], 0)
        for master, average in _pairs(engine):
            average.copy_(master.detach())

    @torch.no_grad()
    def update(self, engine) -> None:
        """After each step of the engine, on every rank. One that was skipped changes nothing, and the host does not wait for the device."""
        applied = was_applied(engine)
        masters, averages = map(list, zip(*_pairs(engine), strict=True))
        if isinstance(applied, Tensor):
            self.updates = self.updates + applied
            weight = torch.as_tensor(weight_of(self.decay, self.updates)) * applied
            for master, average in zip(masters, averages, strict=True):
                average.lerp_(master, weight)
        elif applied:
            self.updates += 1
            torch._foreach_lerp_(averages, masters, float(weight_of(self.decay, self.updates)))

    @contextmanager
    def in_use(self, engine) -> Iterator[None]:
        """Inside, the model computes with the averages; afterwards it goes on with the same bits as before. Called on every rank."""
        _exchange(engine)
        patches.refresh(engine)
        try:
            yield
        finally:
            _exchange(engine)
        # not after an error, for ranks exchange weights here, and the others may not come
        patches.refresh(engine)


def _pairs(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (fp32 masters, their averages)."""
    for master in patches.masters(engine):
        yield master.detach(), engine.basic_optimizer.state[master][KEY]


def _exchange(engine) -> None:
    """Let masters and averages change places, without a copy."""
    state = engine.basic_optimizer.state
    for master in patches.masters(engine):
        master.data, state[master][KEY].data = state[master][KEY].data, master.data

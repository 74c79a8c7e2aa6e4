"""What a step came to, read from the device only when it is asked for."""

from functools import cached_property

import torch
from torch import Tensor


class Outcome:
    """One step over all ranks. Its numbers are copied to the host behind the step, and reading one waits for that copy.

    So a loop that reads the numbers of step N after it has launched step N + 1 never leaves a GPU without work.

    lr: of the head. logit_bias: of the sigmoid loss, None for others. applied: whether the weights were changed, a bool on the device where the host does not know (see
    c4c.zero.skipping). answers: to the caller's questions, whether any rank said yes.
    """

    def __init__(self, loss_sum: Tensor, pairs: Tensor, logit_scale: Tensor, grad_norm: Tensor | float | None, *,
                 world: int, lr: float, applied: bool | Tensor, answers: tuple[bool, ...],
                 logit_bias: Tensor | None = None):  # fmt: skip
        self.lr, self.answers = lr, answers
        self._world, self._applied = world, applied
        numbers = {"loss": loss_sum, "pairs": pairs, "logit_scale": logit_scale}
        self._norm: float | None = None
        if isinstance(grad_norm, Tensor) and grad_norm.device == loss_sum.device:
            numbers["grad_norm"] = grad_norm
        else:
            self._norm = float(grad_norm or 0.0)
        if isinstance(applied, Tensor):
            numbers["applied"] = applied
        if logit_bias is not None:
            numbers["logit_bias"] = logit_bias
        self._names = list(numbers)
        on_device = torch.stack([number.detach().double().reshape(()) for number in numbers.values()])
        self._copied: torch.cuda.Event | None = None
        if on_device.is_cuda:
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._numbers = on_device

    @cached_property
    def _values(self) -> dict[str, float]:
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))

    @property
    def applied(self) -> bool:
        """Whether the weights were changed."""
        return bool(self._values["applied"]) if isinstance(self._applied, Tensor) else self._applied

    @property
    def loss(self) -> float:
        """The mean over the global batch."""
        return self._values["loss"] / self._world

    @property
    def pairs(self) -> int:
        """Pairs in the global batch, without padding."""
        return round(self._values["pairs"])

    @property
    def logit_scale(self) -> float:
        """What scores are multiplied by after the step."""
        return self._values["logit_scale"]

    @property
    def logit_bias(self) -> float | None:
        """What the sigmoid loss adds to them after the step; None for other losses."""
        return self._values.get("logit_bias")

    @property
    def grad_norm(self) -> float:
        """The norm of the whole gradient before clipping; 0 where DeepSpeed reports none."""
        return self._values["grad_norm"] if self._norm is None else self._norm

"""Steps that are not finite change nothing, and the host waits for the device as seldom as possible to see to that.

A host that reads a value from a GPU has waited for all its work, and the GPU then waits for the host's next. In each step
DeepSpeed 0.19.8 reads
- under ZeRO 1 and 2 whether a gradient is not finite, whether their norm is, and the latter again for each group of weights
  (pull requests 5632 and 4436 removed other such reads);
- without ZeRO in 16 bits whether the gradient is finite, weight by weight, and the norm of each group (no issue was found);
- without ZeRO in fp32 nothing: it does not look for gradients that are not finite, nor does it report their norm (issue 7255).

Here the norm is read once a step, and tells of any gradient. It is not read at all where torch's fused AdamW updates weights in bf16, or
in fp32 without ZeRO: its kernel takes the verdict as a tensor, and then changes neither weights nor moments nor its count of steps. In
fp16 the host has to know, as the next loss scale depends on it; ZeRO 3 and offloaded optimizers are left as DeepSpeed has them, and so is
the arithmetic of stage 0 in 16 bits where that was asked for, which reads the norm of each group.
tests/c4c/zero/test_skipping.py counts the reads with and without this.
"""

import math

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors


def skip_bad_steps(engine, for_zero: bool = False) -> None:
    """Make steps of a new engine that are not finite change nothing; `was_applied` tells which.

    for_zero: it runs without ZeRO where ZeRO 1 or 2 was asked for, and is to come to the same bits.
    """
    verdict = _Verdict(engine)
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        _without_zero_in_fp32(engine, verdict)
    elif hasattr(wrapper, "fp32_groups_flat"):
        if engine.bfloat16_enabled() and (for_zero or verdict.on_device):
            _without_zero_in_bf16(engine, verdict)
        else:
            # the norm, which is read next, is not finite either then
            wrapper.overflow_checker.has_overflow = lambda *_, **__: False
    elif (
        engine.zero_optimization_stage() in (1, 2)
        and hasattr(wrapper, "scaled_global_norm")
        and not wrapper.cpu_offload
    ):
        _with_zero(wrapper, verdict)


def was_applied(engine) -> bool | Tensor:
    """Whether the engine's last step changed the weights; a bool on the device where the host has not asked."""
    bad: Tensor | None = getattr(engine, "step_is_bad", None)
    return bool(engine.was_step_applied()) if bad is None else ~bad


class _Verdict:
    """Whether a step is to be skipped."""

    def __init__(self, engine):
        self._engine, self._adam = engine, engine.basic_optimizer
        # torch.amp.GradScaler's way to tell an optimizer
        takes_it = getattr(self._adam, "_step_supports_amp_scaling", False)
        self.on_device = takes_it and not engine.fp16_enabled()

    def __call__(self, norm: Tensor) -> bool:
        """Whether the host knows that it is; norm: of all gradients. It does not where the optimizer's kernel decides."""
        if not self.on_device:
            return not math.isfinite(norm.item())
        bad = ~norm.isfinite()
        self._engine.step_is_bad, self._adam.found_inf = bad, bad.float()
        return False


def _without_zero_in_fp32(engine, verdict: _Verdict) -> None:
    """Gradients are clipped here as well, with the same norm."""
    optimizer, step, clip = engine.optimizer, engine.optimizer.step, engine.gradient_clipping()

    def checked(*args, **kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        optimizer.overflow = verdict(norm)
        optimizer._global_grad_norm = norm if verdict.on_device else norm.item()
        if optimizer.overflow:
            return
        if clip > 0:
            torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
        step(*args, **kwargs)

    engine.clip_fp32_gradients = lambda: None
    optimizer.step = checked


def _without_zero_in_bf16(engine, verdict: _Verdict) -> None:
    """The whole step, with the arithmetic of ZeRO 1 and 2, so that one rank comes to the same bits at each of these stages."""
    wrapper, adam, clip = engine.optimizer, engine.basic_optimizer, engine.gradient_clipping()

    @torch.no_grad()
    def step(closure=None) -> None:
        norms = []
        for weights, master in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
            each = torch.stack(torch._foreach_norm(grads, 2, torch.double))
            norms.append(each.pow(2).sum().float().pow(0.5))
            master.grad = _flatten_dense_tensors(grads).to(master.dtype)
            for p in weights:
                p.grad = None
        norm = torch.linalg.vector_norm(torch.stack(norms))
        wrapper.overflow = verdict(norm)
        wrapper._global_grad_norm = math.inf if wrapper.overflow else norm
        if not wrapper.overflow:
            for master in wrapper.fp32_groups_flat if clip > 0 else ():
                master.grad.mul_(1.0 / ((norm + 1e-6) / clip).clamp(min=1.0))
            adam.step()
            torch._foreach_copy_(wrapper.fp16_groups_flat, wrapper.fp32_groups_flat)  # the weights are views of these
        for master in wrapper.fp32_groups_flat:
            master.grad = None

    wrapper.step = step


def _with_zero(zero, verdict: _Verdict) -> None:
    """Leave out what asks the host a second time; the arithmetic is DeepSpeed's."""

    def unscale_and_clip_grads(grads: list[Tensor], norm: Tensor | None) -> None:
        combined: float | Tensor = zero.loss_scale
        if zero.clip_grad > 0.0:
            assert norm is not None
            combined = (((norm / zero.loss_scale) + 1e-6) / zero.clip_grad).clamp(min=1.0) * zero.loss_scale
        elif zero.loss_scale == 1.0:
            return
        for grad in grads:
            grad.data.mul_(1.0 / combined)

    zero.unscale_and_clip_grads = unscale_and_clip_grads
    if not zero.compute_grad_norm:
        return
    if zero.check_grad_overflow:
        zero.has_overflow = lambda *_, **__: False  # the norm, which is asked next, is not finite either then
        if verdict.on_device and zero.dtype == torch.bfloat16:
            zero.check_grad_overflow = False
            measure = zero.scaled_global_norm

            def scaled_global_norm(*args, **kwargs) -> Tensor:
                norm = measure(*args, **kwargs)
                verdict(norm)
                return norm

            zero.scaled_global_norm = scaled_global_norm

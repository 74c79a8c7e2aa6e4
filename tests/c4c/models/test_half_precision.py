"""A step in fp16: what is small is scaled before it is rounded, with gradient caching too."""

import pytest
import torch
from torch import Tensor

from c4c.training import step
from c4c.training.step import Learner
from tests.c4c.models.plain_engine import Engine
from tests.c4c.models.small import tiny

pytestmark = pytest.mark.slow  # imports open_clip
ROWS, SCALE = 64, 65536.0


class Scaled(Engine):
    """An engine in fp16, whose losses are scaled."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        (loss * self.module.gradient_scale).backward()


def learner() -> Learner:
    """Of the head that itself computes in the engine's precision, at a temperature as in a first epoch."""
    model = tiny("tightTransf")
    model.clip.logit_scale.data.fill_(2.66)
    return Learner(model).train()


def inputs() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 900, (ROWS, 8), generator=random)
    tokens[:, 0], tokens[:, -1] = 998, 999
    frames = torch.randn(ROWS, 4, 3, 32, 32, generator=random)
    return frames, torch.ones(ROWS, 4, dtype=torch.bool), tokens, torch.ones(ROWS, dtype=torch.bool)


def gradients(module: Learner) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.double() / module.gradient_scale for name, grad in found.items()}


def test_gradient_caching_loses_no_small_gradients():
    plain, half = learner(), learner().half()
    plain(*inputs()).backward()
    half.gradient_scale = SCALE
    step._cached_step(Scaled(half), inputs(), 16)
    wanted, found = gradients(plain), gradients(half)
    for part in ("clip.visual.", "clip.transformer."):
        names = [name for name in wanted if part in name]
        error = sum(float(((found[name] - wanted[name]) ** 2).sum()) for name in names)
        assert (error / sum(float((wanted[name] ** 2).sum()) for name in names)) ** 0.5 < 0.06

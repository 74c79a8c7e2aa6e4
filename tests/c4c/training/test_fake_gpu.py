"""A training step on a GPU that is not there: devices, dtypes and shapes of every operation are checked, without computing.

The forward pass runs on fake tensors of a cuda device. torch 2.15's autograd engine asks for the device itself, so the backward pass
runs with it on the meta device; `test_the_backward_pass_needs_a_gpu` tells when it need not.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.training.outcome import Outcome
from c4c.training.step import Learner

pytestmark = pytest.mark.slow

ROWS, FRAMES, WORDS, BAG = 4, 3, 12, 2
SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}


def learner(head: str, patch: str, loss: str, dtype: torch.dtype, device: str = "cuda") -> Learner:
    """As DeepSpeed has it: every weight in the precision of the engine."""
    whole = Learner(CLIP4Clip(SPEC, head, patch, blocks=2, segments=FRAMES), loss)
    for module in whole.modules():  # fake tensors do not stand Module.to
        for name, weight in module._parameters.items():
            if weight is not None:
                moved = weight.detach().to(device, dtype)
                module._parameters[name] = nn.Parameter(moved, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return whole


def inputs(loss: str, device: str = "cuda") -> tuple:
    shape = (ROWS, BAG, WORDS) if loss == "mil_nce" else (ROWS, WORDS)
    with torch.device(device):
        frames, mask = torch.randn(ROWS, FRAMES, 3, 32, 32), torch.ones(ROWS, FRAMES, dtype=torch.bool)
        return frames, mask, torch.ones(shape, dtype=torch.long), torch.ones(shape[:-1], dtype=torch.bool)


WAYS = [(head, "2d", "cross_entropy") for head in sorted(HEADS)] + [
    ("meanP", "3d", "cross_entropy"),
    ("meanP", "2d", "mil_nce"),
]


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


@DTYPES
@pytest.mark.parametrize(("head", "patch", "loss"), WAYS)
def test_forward(head, patch, loss, dtype):
    """A host that waited for a value would raise: fake tensors have none."""
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):  # cuDNN would be asked what it can do
        value = learner(head, patch, loss, dtype)(*inputs(loss))
        assert value.device.type == "cuda" and value.dtype == torch.float32 and value.numel() == 1


@DTYPES
@pytest.mark.parametrize(("head", "patch", "loss"), WAYS)
def test_forward_and_backward(head, patch, loss, dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the branch that a GPU takes
    module = learner(head, patch, loss, dtype, "meta")
    module(*inputs(loss, "meta")).backward()
    for name, weight in module.named_parameters():
        if weight.requires_grad and (module.model.head.scaled or name != "model.clip.logit_scale"):
            assert weight.grad is not None, name
            assert (weight.grad.dtype, weight.grad.shape) == (dtype, weight.shape), name


def test_the_backward_pass_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.nn.Parameter(torch.ones(2, device="cuda")).sum().backward()


def test_a_step_on_a_mixture_of_devices_would_be_seen():
    with FakeTensorMode():
        module = learner("meanP", "2d", "cross_entropy", torch.bfloat16)
        frames, mask, tokens, valid = inputs("cross_entropy")
        with pytest.raises(Exception, match="device"):
            module(frames, mask, tokens.cpu(), valid)


def test_a_host_that_waits_would_be_seen():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        learner("meanP", "2d", "cross_entropy", torch.bfloat16)(*inputs("cross_entropy")).item()


def test_what_a_step_came_to_is_read_when_it_is_asked_for():
    """On the CPU; a GPU's copy is read in the same way after its event."""
    numbers = [torch.tensor(v) for v in (3.0, 7.0, 14.25, 0.1)]
    outcome = Outcome(*numbers, world=2, lr=0.5, applied=True, answers=(True, False))
    assert (outcome.loss, outcome.pairs, outcome.logit_scale, outcome.lr) == (1.5, 7, 14.25, 0.5)
    assert outcome.grad_norm == numbers[3].item()
    for norm, shown in ((None, 0.0), (0.25, 0.25), (0.0, 0.0)):
        assert Outcome(*numbers[:3], norm, world=1, lr=0.5, applied=True, answers=()).grad_norm == shown

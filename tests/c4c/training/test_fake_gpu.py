"""A training step on a GPU that is not there: devices, dtypes and shapes of every operation are checked, without computing.

The forward pass runs on fake tensors of a cuda device. torch 2.15's autograd engine asks for the device itself, so the backward pass
runs with it on the meta device; `test_the_backward_pass_needs_a_gpu` tells when it need not.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from c4c.models import caption_rows, clip4clip
from c4c.models.attention import attend_directly
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.objective import LossOptions
from c4c.settings import TrainConfig
from c4c.training.outcome import Outcome
from c4c.training.step import Learner, train_step
from c4c.zero.skipping import skip_bad_steps, was_applied
from pipelines.stages.pixels import Pixels
from tests.c4c.waits import Waits
from tests.often import cases

pytestmark = pytest.mark.slow

ROWS, FRAMES, WORDS, BAG = 4, 3, 12, 2
SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}


def learner(
    head: str, patch: str, loss: str, dtype: torch.dtype, device: str = "cuda", options: LossOptions | None = None
) -> Learner:
    """As DeepSpeed has it on a GPU: every weight in the precision of the engine."""
    whole = Learner(CLIP4Clip(SPEC, head, patch, blocks=2, segments=FRAMES), loss, options=options)
    attend_directly(whole)
    for module in whole.modules():  # fake tensors do not stand Module.to
        for name, weight in module._parameters.items():
            if weight is not None:
                moved = weight.detach().to(device, dtype)
                module._parameters[name] = nn.Parameter(moved, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return whole


def inputs(loss: str, device: str = "cuda", bags: bool = False) -> tuple:
    shape = (ROWS, BAG, WORDS) if loss == "mil_nce" or bags else (ROWS, WORDS)
    with torch.device(device):
        frames, mask = torch.randn(ROWS, FRAMES, 3, 32, 32), torch.ones(ROWS, FRAMES, dtype=torch.bool)
        return frames, mask, torch.ones(shape, dtype=torch.long), torch.ones(shape[:-1], dtype=torch.bool)


WAYS = [(head, "2d", "cross_entropy") for head in sorted(HEADS)] + [
    ("meanP", "3d", "cross_entropy"),
    ("meanP", "2d", "mil_nce"),
]


# its forward pass holds backward passes, which fake tensors of a GPU do not run
SIGMOID = [(head, "2d", "sigmoid") for head in ("meanP", "wti", "tightTransf")]
MORE = [("wti", "2d", "mil_nce"), ("tightTransf", "2d", "mil_nce")]

RARE = pytest.mark.nightly
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=RARE), pytest.param(torch.float32, marks=RARE)], ids=["bf16", "fp16", "fp32"],
)  # fmt: skip


@DTYPES
@pytest.mark.parametrize(("head", "patch", "loss"), WAYS)
def test_forward(head, patch, loss, dtype):
    """A host that waited for a value would raise: fake tensors have none. One that waited for a copy is counted."""
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):  # cuDNN would be asked what it can do
        module, given = learner(head, patch, loss, dtype), inputs(loss)
        with Waits() as waits:
            value = module(*given)
        assert value.device.type == "cuda" and value.dtype == torch.float32 and value.numel() == 1
        assert waits.seen == []


@DTYPES
@pytest.mark.parametrize(("head", "patch", "loss"), [*WAYS, *SIGMOID])
def test_forward_and_backward(head, patch, loss, dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the branch that a GPU takes
    module = learner(head, patch, loss, dtype, "meta")
    module(*inputs(loss, "meta")).backward()
    for name, weight in module.named_parameters():
        if weight.requires_grad and (module.model.head.scaled or name != "model.clip.logit_scale"):
            assert weight.grad is not None, name
            assert (weight.grad.dtype, weight.grad.shape) == (dtype, weight.shape), name


@DTYPES
@pytest.mark.parametrize("bags", [False, True], ids=["pairs", "several captions"])
@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_the_settings_of_the_loss_wait_for_nothing(head, bags, dtype, monkeypatch):
    options = LossOptions(label_smoothing=0.1, mask_equal_captions=True, decorrelation=0.01)
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):
        module, given = learner(head, "2d", "cross_entropy", dtype, options=options), inputs("cross_entropy", bags=bags)
        with Waits() as waits:
            value = module(*given)
        assert value.device.type == "cuda" and value.dtype == torch.float32 and value.numel() == 1
        assert waits.seen == []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    module = learner(head, "2d", "cross_entropy", dtype, "meta", options)
    module(*inputs("cross_entropy", "meta", bags)).backward()
    assert all(weight.grad is not None for weight in module.parameters())


class Engine:
    """What a step asks of DeepSpeed's engine, on tensors without values."""

    average = None

    def __init__(self, module: Learner):
        self.module, self.updates = module, 0
        module.peak_lrs, module.parts = [1.0], ["towers"]
        self.optimizer = self.basic_optimizer = SimpleNamespace(
            param_groups=[{"params": list(module.parameters()), "lr": 0.0}], state={}
        )

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.updates += 1

    def zero_optimization_stage(self) -> int:
        return 0


def whole_step(head: str, patch: str, loss: str, train: dict, short: bool = False) -> tuple[list[str], Engine]:
    """What the host waits for in one step on the meta device, but for what DeepSpeed does in its own. short: by the shorter ways."""
    engine = Engine(learner(head, patch, loss, torch.bfloat16, "meta"))
    frames, mask, tokens, valid = inputs(loss, "meta")
    batch = SimpleNamespace(
        frames=frames,
        frame_mask=mask,
        tokens=tokens,
        caption_mask=valid if valid.dim() > 1 else valid[:, None],
        valid=valid.flatten(1).any(1) if valid.dim() > 1 else valid,
        tokens_on_host=torch.ones(tokens.shape, dtype=torch.long),
    )
    if short:
        batch.frames = torch.zeros(ROWS, FRAMES, 32, 32, 3, dtype=torch.uint8, device="meta")
        assert not engine.module.model.use_shortcuts(fold_pixels=True, trim_captions=True, share_captions=True)
    config = TrainConfig(batch_size=ROWS, loss=loss, **train)
    with Waits() as waits:
        value = train_step(engine, batch, 1.0, config)
    assert value.numel() == 1 and value.is_meta
    return waits.seen, engine


STEPS = pytest.mark.parametrize(
    ("train", "passes"),
    [({}, 1), ({"accumulate": 2}, 2), ({"micro_batch_size": 2}, 2)],
    ids=["plain", "accumulated", "cached"],
)


@STEPS
@pytest.mark.parametrize(
    ("head", "patch", "loss"), cases([*WAYS, *MORE, *SIGMOID], lambda head, patch, loss: head in ("meanP", "wti"))
)
def test_a_whole_step_waits_for_nothing(head, patch, loss, train, passes, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the branch that a GPU takes
    waits, engine = whole_step(head, patch, loss, train)
    assert waits == []
    assert engine.updates == passes
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad and (engine.module.model.head.scaled or name != "model.clip.logit_scale"):
            assert weight.grad is not None and weight.grad.is_meta, name


@STEPS
@pytest.mark.parametrize(("head", "patch"), [("meanP", "2d"), ("wti", "3d")])
def test_the_shorter_ways_wait_for_nothing_either(head, patch, train, passes, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(caption_rows, "MULTIPLE", 1)  # all captions are equal, and one token long
    shapes = []
    encode = CLIP4Clip.encode_text
    monkeypatch.setattr(CLIP4Clip, "encode_text", lambda self, t: shapes.append(tuple(t.shape)) or encode(self, t))
    pixels = Pixels((0.5,) * 3, (0.5,) * 3)
    pixels._on[torch.device("meta")] = (torch.ones(3, device="meta"),) * 2  # as from the first step on
    monkeypatch.setattr(clip4clip, "Pixels", lambda *_: pixels)
    waits, engine = whole_step(head, patch, "cross_entropy", train, short=True)
    assert waits == [] and engine.updates == passes and set(shapes) == {(1, 1)}
    assert all(w.grad is not None for n, w in engine.module.named_parameters() if w.requires_grad)


DELIBERATE = {
    "a value": lambda text, valid: text.sum().item(),
    "a choice": lambda text, valid: bool(valid.any()),
    "rows that a mask picks": lambda text, valid: text[valid.flatten()[: len(text)]],
    "their numbers": lambda text, valid: valid.nonzero(),
    "a copy to the host": lambda text, valid: text.cpu(),
    "a copy from the host": lambda text, valid: torch.tensor([1.0, 2.0]).to(text.device),
    "a tensor made on the host": lambda text, valid: torch.tensor([1.0, 2.0], device=text.device),
    "a list": lambda text, valid: valid.tolist(),
}


def with_a_wait(monkeypatch, wait) -> None:
    """As if someone put that into the step's loss."""
    plain = Learner._loss

    def loss(self, text, video, valid, tokens, teacher):
        wait(text, valid)
        return plain(self, text, video, valid, tokens, teacher)

    monkeypatch.setattr(Learner, "_loss", loss)


@STEPS
@pytest.mark.parametrize("wait", DELIBERATE)
def test_a_step_that_waits_would_be_seen(wait, train, passes, monkeypatch):
    """By the test above: the operation is counted, or has no result for a tensor without values."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with_a_wait(monkeypatch, DELIBERATE[wait])
    try:
        seen, _ = whole_step("meanP", "2d", "cross_entropy", train)
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error).lower()
    else:
        assert seen


@pytest.mark.parametrize("wait", DELIBERATE)
def test_a_forward_pass_that_waits_would_be_seen(wait, monkeypatch):
    with_a_wait(monkeypatch, DELIBERATE[wait])
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):
        module, given = learner("meanP", "2d", "cross_entropy", torch.bfloat16), inputs("cross_entropy")
        try:
            with Waits() as waits:
                module(*given)
        except (DynamicOutputShapeException, DataDependentOutputException):
            pass
        else:
            assert waits.seen


def test_the_optimizers_part_of_a_step_waits_for_nothing_with_torchs_adamw():
    """In bf16 without ZeRO. With an Adam that cannot skip by itself the host has to ask, which fake tensors refuse."""

    def engine_of(fused: bool):
        flats = [torch.ones(12, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        masters = [nn.Parameter(flat.float()) for flat in flats]
        weights = [[nn.Parameter(part) for part in flat.view(3, 4)] for flat in flats]
        for group in weights:
            for weight in group[1:]:
                weight.grad = torch.ones_like(weight)
        adam = torch.optim.AdamW(
            [{"params": [m]} for m in masters], lr=0.1, fused=fused, foreach=None if fused else True
        )
        wrapper = SimpleNamespace(fp16_groups=weights, fp16_groups_flat=flats, fp32_groups_flat=masters, optimizer=adam)
        return SimpleNamespace(
            optimizer=wrapper, basic_optimizer=adam, bfloat16_enabled=lambda: True, fp16_enabled=lambda: False,
            gradient_clipping=lambda: 1.0,
        )  # fmt: skip

    with FakeTensorMode():
        engine = engine_of(True)
        skip_bad_steps(engine)
        with Waits() as waits:
            engine.optimizer.step()
            applied = was_applied(engine)
        assert waits.seen == []
        for tensor in (applied, engine.optimizer._global_grad_norm, *engine.optimizer.fp32_groups_flat):
            assert tensor.device.type == "cuda"
        assert {value.device.type for state in engine.basic_optimizer.state.values() for value in state.values()} == {
            "cuda"
        }
        engine = engine_of(False)
        skip_bad_steps(engine, for_zero=True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            engine.optimizer.step()


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
    assert outcome.logit_bias is None
    assert outcome.grad_norm == numbers[3].item()
    for bad in (False, True):  # the device alone knew
        outcome = Outcome(*numbers, world=1, lr=0.5, applied=~torch.tensor(bad), answers=())
        assert outcome.applied is not bad and outcome.grad_norm == numbers[3].item()
        bias = {"applied": ~torch.tensor(bad), "logit_bias": torch.tensor([-9.5])}
        outcome = Outcome(*numbers, world=1, lr=0.5, answers=(), **bias)
        assert (outcome.applied, outcome.logit_bias, outcome.logit_scale) == (not bad, -9.5, 14.25)
        outcome = Outcome(*numbers[:3], None, world=1, lr=0.5, applied=~torch.tensor(bad), answers=())
        assert outcome.applied is not bad and outcome.grad_norm == 0.0
    for norm, shown in ((None, 0.0), (0.25, 0.25), (0.0, 0.0)):
        assert Outcome(*numbers[:3], norm, world=1, lr=0.5, applied=True, answers=()).grad_norm == shown

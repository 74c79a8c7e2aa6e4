"""Steps that are not finite: what DeepSpeed reads from the device in a step, what is left of it, and that nothing else changes."""

import math

import deepspeed
import pytest
import torch
from torch import nn

from c4c.zero import patches, skipping, state
from c4c.zero.distributed import start_distributed
from tests.c4c.waits import Waits

pytestmark = pytest.mark.slow  # imports DeepSpeed

LR, DECAY, GROUPS, WEIGHTS, ALONE = 0.1, 0.5, 3, 6, -1


@pytest.fixture(autouse=True)
def one_rank(no_rank):
    """DeepSpeed keeps the process group that it first sees, so it stays for the tests after these."""
    start_distributed()


class Sums(nn.Module):
    """Weights in as many groups; the loss is a number whose gradient depends on them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(n, 5)) for n in (3, 1, 7, 2, 4, 9))

    def forward(self, x):
        return sum((w.square() * x.to(w.dtype)).sum() for w in self.weights)


def made(stage: int, precision: str, torchs: bool = False, mended: bool = True, clip: float = 1.0, **extra):
    """stage ALONE: 0 where ZeRO was asked for."""
    for_zero, stage = stage == ALONE, max(stage, 0)
    if precision == "fp16":
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # it is, only slow
    adam = {"torch_adam": True, "fused": True} if torchs else {}
    settings = {
        "train_batch_size": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16", "initial_scale_power": 4},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY} | adam}, "steps_per_print": 10**12,
    }  # fmt: skip
    module = Sums()
    weights = list(module.parameters())
    groups = [{"params": weights[i::GROUPS]} for i in range(GROUPS)]
    with patches.flat_masters():
        engine = deepspeed.initialize(model=module, model_parameters=groups, config=settings | extra)[0]
    if mended:
        patches.repair(engine, 1, for_zero)
    return engine


def step(engine, x: float = 1.0) -> list[str]:
    """One step; what the host read from the device meanwhile."""
    with Waits() as waits:
        loss = engine(torch.full((5,), x))
        patches.backward(engine, loss)
        engine.step()
    return waits.seen


def applied(engine) -> bool:
    return bool(skipping.was_applied(engine))


def weights_of(engine) -> list[torch.Tensor]:
    return [tensor for _, tensor in state.weights(engine)] + [tensor for *_, tensor in state.moments(engine)]


# stage, precision: (reads of DeepSpeed in a step, of c4c, of c4c with torch's AdamW)
READS = {
    (0, "fp32"): (0, 2, 0),  # and DeepSpeed does not skip
    (0, "bf16"): (WEIGHTS + GROUPS + 2, GROUPS + 1, 0),
    (0, "fp16"): (WEIGHTS + GROUPS + 2, GROUPS + 1, GROUPS + 1),
    (ALONE, "bf16"): (WEIGHTS + GROUPS + 2, 1, 0),
    (1, "bf16"): (2 + GROUPS, 1, 0),
    (2, "bf16"): (2 + GROUPS, 1, 0),
    (1, "fp32"): (1 + GROUPS, 1, 1),
    (1, "fp16"): (2 + GROUPS, 1, 1),
}
WAYS = pytest.mark.parametrize(("stage", "precision"), READS)


@WAYS
def test_what_the_host_reads_in_a_step(stage, precision):
    found = []
    for torchs, mended in ((False, False), (False, True), (True, True)):
        engine = made(stage, precision, torchs, mended)
        step(engine), step(engine)
        found.append(step(engine))
        assert all("to" not in name for name in found[-1])  # no copy from or to another device
    assert tuple(map(len, found)) == READS[stage, precision], found


@WAYS
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_come_to_the_same_as_deepspeeds(stage, precision, clip):
    """Bit for bit; to those of ZeRO 1 where one rank takes its place."""
    ours = made(stage, precision, clip=clip)
    theirs = made(1 if stage == ALONE else stage, precision, mended=False, clip=clip)
    if stage == 0 and precision != "fp32":
        patches._undo_first_step(theirs)
    for _ in range(5):
        step(ours), step(theirs)
        if not (stage == 0 and precision == "fp32"):
            assert float(ours.get_global_grad_norm()) == float(theirs.get_global_grad_norm())
    patches.link_moments(theirs)
    for a, b in zip(weights_of(ours), weights_of(theirs), strict=True):
        if stage == 0 and precision == "fp32":  # which clips with another rounding
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@WAYS
def test_torchs_adamw_comes_to_the_same_to_rounding(stage, precision):
    ours, theirs = made(stage, precision, torchs=True), made(stage, precision)
    for _ in range(5):
        step(ours), step(theirs)
    for a, b in zip(weights_of(ours), weights_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if precision == "fp32" else 2e-2)


@WAYS
@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_changes_nothing(stage, precision, torchs, bad):
    engine, unbroken = (made(stage, precision, torchs) for _ in range(2))
    step(engine), step(unbroken)
    assert applied(engine)
    before, computes = weights_of(engine), [p.detach().clone() for p in engine.module.parameters()]
    step(engine, bad)
    assert not applied(engine)
    assert not math.isfinite(float(engine.get_global_grad_norm()))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), computes, strict=True))
    assert state.updates(engine) == 1
    step(engine), step(unbroken)
    assert applied(engine) and state.updates(engine) == 2
    if precision != "fp16":  # where the loss scale has changed
        assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(unbroken), strict=True))


def test_who_turns_the_check_off_has_it_off():
    engine = made(1, "bf16", bf16={"enabled": True, "check_grad_overflow": False})
    step(engine, math.nan)
    assert applied(engine)


def test_16_bits_without_zero_are_not_flat_for_torchs_adamw():
    settings = {"bf16": {"enabled": True}, "train_batch_size": 1, "zero_optimization": {"stage": 0},
                "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}  # fmt: skip
    engine = deepspeed.initialize(model=Sums(), config=settings)[0]
    assert not hasattr(engine.optimizer, "fp32_groups_flat")
    assert len(step(engine)) > len(list(engine.module.parameters()))
    assert hasattr(made(0, "bf16", torchs=True).optimizer, "fp32_groups_flat")


def test_its_timer_waits_for_the_device_in_each_step(monkeypatch):
    from c4c.settings import EngineConfig, TrainConfig
    from c4c.zero.config import deepspeed_config

    device, waited = deepspeed.accelerator.get_accelerator(), []
    monkeypatch.setattr(device, "synchronize", lambda *_: waited.append("synchronize"))
    engine = made(1, "bf16")
    for _ in range(4):
        step(engine)
    assert len(waited) == 2 * 2  # from the third step on, at its start and its end
    waited.clear()
    ours = deepspeed_config(EngineConfig(), TrainConfig(), 1, {})
    engine = made(1, "bf16", timers=ours["timers"])
    for _ in range(4):
        step(engine)
    assert not waited


def test_an_engine_with_torchs_adamw_goes_on_from_deepspeeds_and_back(tmp_path, monkeypatch):
    """What a run without nvcc does: the note is for its start, and checkpoints fit either optimizer."""
    from c4c.models.clip4clip import build
    from c4c.settings import EngineConfig, ModelConfig, TrainConfig
    from c4c.training.step import Learner
    from c4c.zero import engine as engines
    from c4c.zero.snapshot import restore, save

    def engine_of(torchs: bool):
        monkeypatch.setattr(engines, "use_torchs_adam", lambda *_: (torchs, "there is no nvcc" * torchs))
        model = build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 2)
        return engines.build_engine(Learner(model), EngineConfig(), TrainConfig(batch_size=2), 1, {})

    given = torch.randn(2, 2, 3, 64, 64), torch.ones(2, 2).bool(), torch.randint(1, 49407, (2, 9)), torch.ones(2).bool()
    for first in (False, True):
        engine = engine_of(first)
        assert engine.module.notes == ["there is no nvcc"] * first
        assert isinstance(engine.basic_optimizer, torch.optim.AdamW) is first
        for _ in range(2):
            patches.backward(engine, engine(*given))
            engine.step()
        save(engine, tmp_path / str(first), 2)
        other = engine_of(not first)
        restore(other, tmp_path / str(first))
        assert state.updates(other) == 2
        assert all(torch.equal(a, b) for a, b in zip(weights_of(other), weights_of(engine), strict=True))
        for one in (engine, other):
            patches.backward(one, one(*given))
            one.step()
        for a, b in zip(weights_of(other), weights_of(engine), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

"""What DeepSpeed lacks or gets wrong: each defect without its workaround in c4c.zero.patches, and that the workaround mends it.

Where a test fails because the defect is gone, its workaround can go too.
"""

import math
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from c4c.zero import patches
from c4c.zero.distributed import start_distributed

patches.quiet_libraries()
import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

pytestmark = pytest.mark.slow  # imports DeepSpeed

LR, DECAY = 0.1, 0.5


@pytest.fixture(autouse=True)
def one_rank(no_rank):
    """DeepSpeed keeps the process group that it first sees, so it stays for the tests after these."""
    start_distributed()


class Sums(nn.Module):
    """Two weights, each in a group of its own; the loss is their sum times the input."""

    def __init__(self, shape: tuple[int, ...] = (3,)):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return ((self.a + self.b) * x.to(self.a.dtype)).sum()


def made(stage: int, precision: str = "fp32", passes: int = 1, module: nn.Module | None = None, **extra):
    """DeepSpeed's engine as it comes."""
    if precision == "fp16":
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # it is, only slow
    module = module or Sums()
    settings = {
        "train_batch_size": passes, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": passes,
        "zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 4},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}},
        "gradient_clipping": 0.0, "steps_per_print": 10**12,
    }  # fmt: skip
    groups = [{"params": [p]} for p in module.parameters()]
    return deepspeed.initialize(model=module, model_parameters=groups, config=settings | extra)[0]


def step(engine, x: float = 1.0) -> None:
    patches.backward(engine, engine(torch.full((3,), x)))
    engine.step()


# ---- at its start ----


def test_it_warns_that_there_is_no_gpu(monkeypatch):
    from deepspeed.accelerator import real_accelerator

    if torch.cuda.is_available():
        pytest.skip("there is one")
    warnings: list[str] = []
    monkeypatch.setattr(real_accelerator, "accel_logger", SimpleNamespace(warning=warnings.append, info=lambda _: None))

    def again() -> list[str]:
        monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
        warnings.clear()
        real_accelerator.get_accelerator()
        return warnings

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert any("Setting accelerator to CPU" in text for text in again())
    patches.quiet_libraries()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert not again()


def test_an_exchange_in_shared_memory_is_loaded_though_only_inference_uses_it(monkeypatch):
    import deepspeed.comm.torch

    backend = sys.modules["deepspeed.comm.torch"]

    loaded = []
    builder = SimpleNamespace(NAME="deepspeed_shm_comm", load=lambda: loaded.append("shm"), absolute_name=lambda: "")
    monkeypatch.setattr(backend, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda _: builder))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    backend.build_shm_op()
    assert loaded == ["shm"]
    patches.without_shared_memory()
    backend.build_shm_op()
    assert loaded == ["shm"]


def test_a_scalar_weight_cannot_be_broadcast():
    with pytest.raises(RuntimeError, match="cannot be 0"):
        made(0, module=Sums(()))
    module = Sums(())
    module.a, module.b = patches.with_an_axis(module.a), patches.with_an_axis(module.b)
    assert made(0, module=module).module.a.shape == (1,)


# ---- the engine ----


def test_one_rank_exchanges_gradients_with_itself(monkeypatch):
    engine, exchanged = made(0), []
    monkeypatch.setattr("deepspeed.runtime.engine.dist.all_reduce", lambda tensor, **_: exchanged.append(tensor))
    engine.backward(engine(torch.ones(3)))
    assert exchanged
    exchanged.clear()
    patches.repair(engine, 1)
    engine.step()
    engine.backward(engine(torch.ones(3)))
    assert not exchanged


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_zero_a_bad_gradient_reaches_the_weights_in_fp32(bad):
    engine = made(0)
    step(engine, bad)
    assert not engine.module.a.isfinite().all()
    assert engine.was_step_applied()
    engine = made(0)
    patches.repair(engine, 1)
    step(engine, bad)
    assert torch.equal(engine.module.a, torch.ones(3))
    assert not engine.was_step_applied()
    assert not math.isfinite(engine.get_global_grad_norm())


def test_without_zero_there_is_no_norm_in_fp32():
    engine = made(0)
    step(engine)
    assert engine.get_global_grad_norm() is None
    engine = made(0, gradient_clipping=1.0)
    patches.repair(engine, 1)
    step(engine)
    assert engine.get_global_grad_norm() == pytest.approx(6**0.5)


def test_without_zero_decay_is_applied_at_the_start_in_16_bits():
    engine = made(0, "bf16")
    assert not torch.equal(engine.optimizer.fp32_groups_flat[0], torch.ones(3))
    patches.repair(engine, 1)
    assert torch.equal(engine.optimizer.fp32_groups_flat[0], torch.ones(3))
    assert torch.equal(patches.unpartitioned(engine, engine.module.a, "exp_avg"), torch.zeros(3))
    step(engine)
    expected = 1 - LR * DECAY - LR  # AdamW's first step is one of the learning rate
    assert patches.unpartitioned(engine, engine.module.a, None).tolist() == pytest.approx([expected] * 3, rel=1e-3)


def adam(offloaded: bool, mended: bool, restarts: bool) -> list[list[float]]:
    """A weight after each of 60 steps of DeepSpeed's Adam on the CPU; restarts: every 20th is taken by a new process's."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    random, values = torch.Generator().manual_seed(0), []
    weight = nn.Parameter(torch.ones(64))
    optimizer = (DeepSpeedCPUAdam if offloaded else FusedAdam)([weight], lr=LR)
    kernel = None if offloaded else optimizer.multi_tensor_adam
    for number in range(60):
        again = restarts and number and not number % 20
        if again and offloaded:
            state = optimizer.state[weight]
            optimizer = DeepSpeedCPUAdam([weight], lr=LR)
            optimizer.state[weight] = state
        elif again:  # all of a process share one set of powers, so what it holds has to be that of no step near
            nothing = [[torch.zeros(1)] for _ in range(4)]
            kernel(2048, torch.zeros(1, dtype=torch.int), nothing, LR, 0.9, 0.999, 1e-8, 10**6, 1, True, 0.0)
        if mended and (again or not number):
            if not offloaded:
                optimizer.multi_tensor_adam = kernel
            patches._power_at_each_step(optimizer)
        weight.grad = torch.rand(64, generator=random)
        optimizer.step()
        values.append(weight.tolist())
    return values


# on the host, of an offloaded optimizer: it takes minutes to compile
@pytest.mark.parametrize("offloaded", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_adam_on_the_cpu_rounds_otherwise_after_a_restart(offloaded):
    if torch.cuda.is_available() and not offloaded:
        pytest.skip("that Adam is on the GPU here")
    assert adam(offloaded, False, False) != adam(offloaded, False, True)
    assert adam(offloaded, True, False) == adam(offloaded, True, True)


# ---- in a step ----


def test_without_zero_fp16s_scale_is_left_out():
    """Of the loss, but not of the step, which divides by it."""
    engine = made(0, "fp16")
    scale = engine.optimizer.loss_scale_config.cur_scale
    assert scale > 1
    engine.backward(engine(torch.ones(3)) * 1.0)
    assert engine.module.a.grad.tolist() == [1.0] * 3
    engine = made(0, "fp16")
    patches.backward(engine, engine(torch.ones(3)))
    assert engine.module.a.grad.tolist() == [scale] * 3


def test_it_divides_by_the_passes_even_if_told_not_to():
    engine = made(0, passes=2)
    engine.backward(engine(torch.ones(3)), scale_wrt_gas=False)
    assert engine.module.a.grad.tolist() == [0.5] * 3
    engine = made(0, passes=2)
    patches.backward(engine, engine(torch.ones(3)))
    assert engine.module.a.grad.tolist() == [1.0] * 3


# ---- state ----


def test_moments_of_the_first_group_alone_are_found():
    engine = made(1, "bf16")
    step(engine)
    assert safe_get_full_optimizer_state(engine.module.a, "exp_avg") is not None
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        safe_get_full_optimizer_state(engine.module.b, "exp_avg")
    patches.link_moments(engine)
    for weight in (engine.module.a, engine.module.b):
        assert safe_get_full_optimizer_state(weight, "exp_avg").tolist() == pytest.approx([0.1] * 3)


def test_parts_of_zero_3_that_do_not_divide_a_weight_evenly_cannot_be_set(monkeypatch):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    part = torch.zeros(3)  # of the second of two ranks, the last element being padding
    optimizer = SimpleNamespace(
        _get_fp32_opt_state_partition=lambda *_, **__: (part, 0), _get_param_partition_rank=lambda _: 1,
        _swappable_optimizer_subgroup=lambda _: False,
    )  # fmt: skip
    optimizer.set_local_hp_param = lambda *args: Stage3.set_local_hp_param(optimizer, *args)
    weight = SimpleNamespace(requires_grad=True, ds_id=0, ds_numel=5, ds_tensor=torch.zeros(3), _z3_optimizer=optimizer)
    value = torch.arange(5.0)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        Stage3.set_full_hp_param(optimizer, value, weight)
    patches.set_uneven(weight, value, None)
    assert part.tolist() == [3.0, 4.0, 0.0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_zero_the_accessors_find_nothing(precision):
    engine = made(0, precision)
    step(engine)
    weight = engine.module.a
    assert safe_get_full_fp32_param(weight) is None
    assert safe_get_full_optimizer_state(weight, "exp_avg") is None
    assert patches.unpartitioned(engine, weight, None).shape == (3,)
    assert patches.unpartitioned(engine, weight, "exp_avg").tolist() == pytest.approx([0.1] * 3, rel=1e-2)


def test_accessors_to_a_part_are_for_zero_3_alone():
    weight = made(1, "bf16").module.a
    with pytest.raises(AssertionError, match="only defined for ZeRO-3"):
        deepspeed.utils.safe_get_local_fp32_param(weight)
    assert patches.local_master(weight).tolist() == [1.0] * 3


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_cannot_be_set_before_the_first_step(stage):
    engine = made(stage, "bf16")
    weight, value = engine.module.a, torch.full((3,), 7.0)
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        safe_set_full_optimizer_state(weight, value, "exp_avg")
    patches.make_moments(engine, ["exp_avg", "exp_avg_sq"], 5)
    safe_set_full_optimizer_state(weight, value, "exp_avg")
    assert torch.equal(safe_get_full_optimizer_state(weight, "exp_avg"), value)
    assert {int(state["step"]) for state in engine.basic_optimizer.state.values()} == {5}


@pytest.mark.parametrize("stage", [1, 3])
def test_setting_the_master_leaves_the_weight_that_computes(stage):
    engine = made(stage, "bf16")
    safe_set_full_fp32_param(engine.module.a, torch.full((3,), 7.0))

    def computes() -> float:
        with torch.no_grad():
            return float(engine(torch.ones(3)))

    assert computes() == 6.0
    patches.refresh(engine)
    assert computes() == 24.0


def test_the_engine_tells_the_loss_scale_of_the_configuration_alone():
    engine = made(1, "fp16")
    state = patches.loss_scaler(engine)
    assert state["cur_scale"] == 2**4 != engine.loss_scale()
    patches.set_loss_scaler(engine, state | {"cur_scale": 8.0, "cur_iter": 9, "last_overflow_iter": 8})
    assert patches.loss_scaler(engine) == state | {"cur_scale": 8.0, "cur_iter": 9, "last_overflow_iter": 8}


# ---- its checkpoints ----


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_it_runs_what_a_checkpoint_asks_for(tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    went_off, folder = tmp_path / "went off", tmp_path / "run" / "tag"
    folder.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"a": Bomb(went_off)}, folder / name)
    with pytest.raises(Exception), patches.silent():  # noqa: B017 it is no checkpoint, whatever kind that makes
        get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag="tag")
    assert went_off.exists()
    went_off.unlink()
    with pytest.raises(pickle.UnpicklingError), patches.safe_loading(), patches.silent():
        get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag="tag")
    assert not went_off.exists()


class Gets:
    """Pickled as getattr of two things, as Python 3.11.2 pickles the members of enumerations."""

    def __init__(self, owner: object, name: str):
        self.parts = owner, name

    def __reduce__(self):
        return getattr, self.parts


def test_members_that_an_older_python_stored_are_read_and_nothing_else_is_got(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with patches.safe_loading():
        torch.save(Gets(ZeroStageEnum, "weights"), tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt") is ZeroStageEnum.weights
        for owner, name in ((ZeroStageEnum, "__init_subclass__"), (LossScaler, "backward"), (ZeroStageEnum, "mro")):
            torch.save(Gets(owner, name), tmp_path / "b.pt")
            with pytest.raises(pickle.UnpicklingError, match=f"getattr of '{name}' is not allowed"):
                torch.load(tmp_path / "b.pt")


def test_it_prints_while_it_reads_a_checkpoint(tmp_path, capsys):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = made(1, "bf16")
    step(engine)
    engine.save_checkpoint(str(tmp_path), tag="tag")
    capsys.readouterr()
    get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="tag")
    assert "".join(capsys.readouterr())
    with patches.silent(), patches.safe_loading():
        get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="tag")
    assert not "".join(capsys.readouterr())

"""Every workaround for DeepSpeed: what it lacks, gets wrong or prints too much of, and what c4c does about it.

No other files but c4c.zero.skipping and c4c.zero.compiling change DeepSpeed, set its environment or use its private attributes. All of it was seen with DeepSpeed
0.19.8 and torch 2.15. Where an issue or pull request of deepspeedai/DeepSpeed describes it, its number stands with the workaround.
tests/c4c/zero/test_patches.py shows each defect without its workaround. A test there that fails says that DeepSpeed no longer has the defect and
the workaround can go.
"""

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn

from c4c.zero import compiling
from c4c.zero.skipping import skip_bad_steps

# ---- before DeepSpeed is imported, and at its start ----


def quiet_libraries() -> None:
    """Called before DeepSpeed is imported: no warning about what it finds, and one folder of compiled optimizers an environment."""
    if not torch.cuda.is_available():
        # the same choice that DeepSpeed makes, without its warning that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    compiling.choose_folder()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no nvcc


def without_shared_memory() -> None:
    """Do not load the all-reduce in shared memory, which only inference uses: each rank leaves 66 MiB in /dev/shm at every start.

    It came with pull request 5391. No issue about the files was found.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def with_an_axis(scalar: nn.Parameter) -> nn.Parameter:
    """A parameter of shape [1] for one of shape []: weights are broadcast as views of bytes, which a scalar has none of.

    No issue was found.
    """
    return nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)


@contextmanager
def flat_masters() -> Iterator[None]:
    """Engines that are built inside keep flat fp32 masters for torch's AdamW too, without ZeRO in 16 bits.

    DeepSpeed keeps them flat for its own Adam alone; for others it has a master a weight, and asks the host about each of them in a
    step (FP16_UnfusedOptimizer, which is from Lamb's times). No issue was found.
    """
    from deepspeed.runtime import engine

    own = engine.FusedAdam  # the classes that it tells apart by isinstance
    engine.FusedAdam = (own, torch.optim.AdamW)
    try:
        yield
    finally:
        engine.FusedAdam = own


# ---- the engine, once it is built ----


def repair(engine, world: int, for_zero: bool = False) -> None:
    """Apply every workaround that a new engine needs; for_zero: see `skip_bad_steps`."""
    if world == 1:
        # stage 0 averages gradients over ranks even if there is only one: a copy there and back. No issue was found
        engine.buffered_allreduce_fallback = lambda *_, **__: None
    skip_bad_steps(engine, for_zero)
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        _undo_first_step(engine)
    _power_at_each_step(engine.basic_optimizer)


def _undo_first_step(engine) -> None:
    """Stage 0 in 16 bits takes a step at its start, with gradients of 0 but with weight decay (issue 5151, pull request 5104)."""
    for flat, initial in zip(engine.optimizer.fp32_groups_flat, engine.optimizer.fp16_groups_flat, strict=True):
        flat.data.copy_(initial)
    make_moments(engine, ["exp_avg", "exp_avg_sq"], 0)


_FAR = 2**30  # a step that no real one follows


def _power_at_each_step(optimizer) -> None:
    """Make DeepSpeed's Adam on the CPU compute beta ** step anew at every step.

    From one step to the next it multiplies, and after a restart it takes the power. The two round differently, so a resumed
    run would differ from the unbroken one. A step far away in between leaves nothing to multiply on from. Pull request 7859
    changed that code for ZeRO 3's groups, and not this.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    if hasattr(optimizer, "multi_tensor_adam") and not torch.cuda.is_available():
        kernel = optimizer.multi_tensor_adam

        def fused(chunk, noop, tensors, lr, beta1, beta2, eps, step, *rest):
            kernel(chunk, noop, [[t] for t in nothing], lr, beta1, beta2, eps, _FAR, *rest)
            kernel(chunk, noop, tensors, lr, beta1, beta2, eps, step, *rest)

        optimizer.multi_tensor_adam = fused
    elif hasattr(optimizer, "ds_opt_adam"):
        optimizer.ds_opt_adam = _Powers(optimizer.ds_opt_adam, nothing)


class _Powers:
    """The same for DeepSpeed's Adam of offloaded states."""

    def __init__(self, kernel, nothing: list[Tensor]):
        self._kernel, self._nothing = kernel, nothing

    def __getattr__(self, name: str):
        return getattr(self._kernel, name)

    def adam_update(self, which: int, step: int, *rest) -> None:
        self._kernel.adam_update(which, _FAR, *rest[:-4], *self._nothing)
        self._kernel.adam_update(which, step, *rest)


# ---- in a step ----


def backward(engine, loss: Tensor) -> None:
    """Gradients of `loss` as it is, times fp16's loss scale.

    Stage 0 in fp16 divides by that scale and never multiplies by it (pull request 8393). And given the very tensor that the
    module returned, DeepSpeed divides by the number of passes even with scale_wrt_gas=False (pull request 7724 is about another
    case of that), so it is given a product.
    """
    config = getattr(engine.optimizer, "loss_scale_config", None)
    scale = float(config.cur_scale) if config is not None and engine.zero_optimization_stage() == 0 else 1.0
    engine.backward(loss * scale, scale_wrt_gas=False)


def has_flat_master(parameter: Tensor) -> bool:
    """Whether ZeRO 1 or 2 keeps the weight's fp32 master; to ask an accessor would exchange the whole weight."""
    return hasattr(parameter, "_hp_mapping")


def local_master(parameter: Tensor) -> Tensor | None:
    """ZeRO 1 and 2: the part of a weight's fp32 master that this rank has, as a view; None if it has no part.

    The public accessors for a part are for ZeRO 3 alone, and those for the whole add an exchange to every step.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    return None if mapping is None else mapping.get_hp_fragment()


# ---- state that the public accessors do not reach ----

# where DeepSpeed's optimizers keep the fp32 masters: stage 3; 1 and 2; 1 in bf16 with fp32 gradients; 0 in 16 bits
_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
)
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def masters(engine) -> list[Tensor]:
    """This rank's fp32 masters, flat tensors of many weights each in all but fp32 without ZeRO: the keys of Adam's state."""
    for name in _MASTERS:
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def unpartitioned(engine, parameter: Tensor, key: str | None) -> Tensor:
    """Stage 0: a weight's fp32 master (key None) or moment, as a view; the accessors return None there.

    A weight that no loss has used yet has no state: its moments are zeros, which no view of anything shows.
    """
    state = engine.basic_optimizer.state
    if not hasattr(engine.optimizer, "fp32_groups_flat"):
        if key is not None and key not in state.get(parameter, {}):
            return torch.zeros_like(parameter.detach())
        return parameter if key is None else state[parameter][key]
    for flat, group in zip(engine.optimizer.fp32_groups_flat, engine.optimizer.fp16_groups, strict=True):
        for candidate, (begin, end) in _places(group):
            if candidate is parameter:
                return (flat if key is None else state[flat][key]).data[begin:end]
    raise KeyError("the weight is not in the optimizer")


def _places(group: list[Tensor]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    begin = 0
    for parameter in group:
        yield parameter, (begin, begin + parameter.numel())
        begin += parameter.numel()


def link_moments(engine) -> None:
    """Let the accessors find the moments of all weights under ZeRO 1 and 2.

    DeepSpeed links weights and moments once, in the first step after its first group was updated, when the other groups have
    no moments yet (since pull request 5104). No issue was found.
    """
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def set_uneven(parameter: Tensor, value: Tensor, key: str | None) -> None:
    """ZeRO 3's safe_set_full_fp32_param and safe_set_full_optimizer_state (key), for any number of ranks.

    Those fail where ranks' parts do not divide the weight evenly (they came with pull request 4192). Here each rank sets its own
    part, padded.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
    rank = parameter._z3_optimizer._get_param_partition_rank(parameter)  # type: ignore[attr-defined]  # DeepSpeed's
    own = value.flatten()[size * rank :][:size]
    part = value.new_zeros(size)
    part[: len(own)] = own
    if key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


def make_moments(engine, names: list[str], count: int) -> None:
    """Give the optimizer the state that it has after `count` updates, with zeros for moments.

    It makes its state in its first step, and the accessors can only overwrite what exists.
    """
    optimizer = engine.basic_optimizer
    as_tensor = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    # torch counts steps on the device of the weights where its Adam is fused or capturable
    on_device = as_tensor and bool(optimizer.defaults["fused"] or optimizer.defaults["capturable"])
    for tensor in masters(engine):
        state = optimizer.state[tensor]
        for name in names:
            state[name] = torch.zeros_like(tensor.detach())
        if names or "step" in state:
            device = tensor.device if on_device else "cpu"
            state["step"] = torch.tensor(float(count), device=device) if as_tensor else count
    for group in optimizer.param_groups:
        group.pop("step", None)  # from which FusedAdam counts new states
    link_moments(engine)


@torch.no_grad()
def refresh(engine) -> None:
    """Copy the fp32 masters into the weights that the model computes with: the accessors set the masters alone."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        optimizer._partition_all_parameters()  # weights that are whole by now would stay so, with the old numbers
        flats, parts = optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups
        for flat, fp32, group in zip(flats, optimizer.fp32_partitioned_groups_flat, parts, strict=True):
            flat.data.copy_(fp32.data)
            for part, fresh in zip(group, optimizer.unflatten(flat, group), strict=True):
                part.data = fresh.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups_flat"):  # stage 0 in 16 bits
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            for parameter, (begin, end) in _places(group):
                parameter.data.copy_(flat.data[begin:end].view_as(parameter))


def loss_scaler(engine) -> dict[str, float]:
    """The state of fp16's loss scale; empty in other precisions. The engine's own loss_scale() is the configuration's."""
    scaler = _scaler(engine)
    return {k: getattr(scaler, k) for k in _SCALER if isinstance(getattr(scaler, k, None), (int, float))}


def set_loss_scaler(engine, state: dict[str, float]) -> None:
    """Put back what `loss_scaler` returned."""
    scaler = _scaler(engine)
    for key, value in state.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _scaler(engine):
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return config if config is not None else getattr(engine.optimizer, "loss_scaler", None)


# ---- DeepSpeed's own checkpoints ----


def _member(owner: object, name: str) -> object:
    """What stands for getattr in a file: Python 3.11.2 stores the member of an enumeration by it. Nothing else is given."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    members = {name: member for name, member in vars(ZeroStageEnum).items() if isinstance(member, ZeroStageEnum)}
    if owner is not ZeroStageEnum or name not in members:
        raise pickle.UnpicklingError(f"getattr of {name!r} is not allowed")
    return members[name]


@contextmanager
def safe_loading() -> Iterator[None]:
    """Make every `torch.load` inside refuse to run code from the file; DeepSpeed's own ask for the opposite (pull request 6751).

    DeepSpeed pickles a few plain classes of its own beside the tensors; those alone are allowed.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals(
            [*classes, (_member, "__builtin__.getattr"), (_member, "builtins.getattr")]
        ):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


@contextmanager
def silent() -> Iterator[None]:
    """Drop what zero_to_fp32 prints, progress bars and all; errors come as exceptions."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield

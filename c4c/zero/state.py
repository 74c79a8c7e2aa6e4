"""A DeepSpeed engine's weights and optimizer state as whole fp32 tensors, wherever its ZeRO stage has put the parts.

What is read under one stage and number of ranks can be written under any other: names and shapes are the model's own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# where DeepSpeed's optimizers keep the fp32 masters: stage 3; 1 and 2; 1 in bf16 with fp32 gradients; 0 in 16 bits
_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
)
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def weights(engine) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor of the model's shape) of every weight and stored buffer; call it on every rank."""
    for name, parameter in engine.module.named_parameters():
        yield name, master(engine, parameter)
    known = dict(engine.module.named_parameters())
    for name, tensor in engine.module.state_dict().items():
        if name not in known:
            yield name, tensor.detach()


def moments(engine) -> Iterator[tuple[str, str, Tensor]]:
    """(name of the weight, name of the moment, tensor) of every trained weight; none before the first update."""
    names = _moment_names(engine)
    _link(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in names:
                yield name, key, _whole(engine, parameter, key)


def master(engine, parameter: Tensor) -> Tensor:
    """The fp32 master copy of a weight, whole; of a frozen one the weight itself. Call it on every rank."""
    if parameter.requires_grad:
        return _whole(engine, parameter)
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()


@torch.no_grad()
def clamp(engine, parameter: Tensor, most: float) -> None:
    """Bound a trained weight from above, in the master copy and in the one the model computes with, without exchange."""
    if hasattr(parameter, "ds_id"):  # each rank has a part, which may be padding
        optimizer = parameter._z3_optimizer
        part = optimizer.get_local_fp32_param(parameter)
        optimizer.set_local_hp_param(part.clamp(max=most), parameter)
        return
    if hasattr(parameter, "_hp_mapping"):
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.get_hp_fragment().data.clamp_(max=most)
    else:
        _here(engine, parameter, None).data.clamp_(max=most)
    parameter.data.clamp_(max=most)


def updates(engine) -> int:
    """How often the optimizer has changed the weights: Adam's own count of steps."""
    counts = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@torch.no_grad()
def write(engine, read: Callable[[str, str | None], Tensor], moment_names: list[str], count: int) -> None:
    """Put weights and moments into the engine; call it on every rank.

    read(name of a weight, name of a moment or None for the weight itself) -> the whole tensor.
    """
    make_moments(engine, moment_names, count)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in (None, *moment_names):
                _set(engine, parameter, read(name, key).to(parameter.device), key)
        else:
            _set_frozen(parameter, read(name, None))
    own = dict(engine.module.named_parameters())
    for name, tensor in engine.module.state_dict().items():
        if name not in own:
            tensor.copy_(read(name, None))
    refresh(engine)


def make_moments(engine, names: list[str], count: int) -> None:
    """The optimizer's state as it is after `count` updates, with zeros for moments: it makes its own only in a step."""
    optimizer = engine.basic_optimizer
    as_tensor = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for tensor in _masters(engine):
        state = optimizer.state[tensor]
        for name in names:
            state[name] = torch.zeros_like(tensor.detach())
        if names or "step" in state:
            state["step"] = torch.tensor(float(count)) if as_tensor else count
    for group in optimizer.param_groups:
        group.pop("step", None)  # what FusedAdam starts new states from
    _link(engine)


@torch.no_grad()
def refresh(engine) -> None:
    """Copy the masters into the weights that the model computes with."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        for flat, fp32 in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            flat.data.copy_(fp32.data)
        for flat, parts in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True):
            for part, fresh in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = fresh.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            for parameter, (begin, end) in _places(group):
                parameter.data.copy_(flat.data[begin:end].view_as(parameter))


def loss_scaler(engine) -> dict[str, float]:
    """State of fp16's loss scale; empty in other precisions."""
    scaler = _scaler(engine)
    return {k: getattr(scaler, k) for k in _SCALER if isinstance(getattr(scaler, k, None), (int, float))}


def set_loss_scaler(engine, state: dict[str, float]) -> None:
    scaler = _scaler(engine)
    for key, value in state.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def missing_scale(engine) -> float:
    """What the loss has to be multiplied by before DeepSpeed's backward: fp16's scale at stage 0, which it leaves out."""
    scaler = getattr(engine.optimizer, "loss_scale_config", None)
    return float(scaler.cur_scale) if scaler is not None and engine.zero_optimization_stage() == 0 else 1.0


def _scaler(engine):
    found = getattr(engine.optimizer, "loss_scale_config", None)
    return found if found is not None else getattr(engine.optimizer, "loss_scaler", None)


def _link(engine) -> None:
    """Stages 1 and 2 look moments up through the weights, but DeepSpeed 0.19 links those of the first group only."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _masters(engine) -> list[Tensor]:
    for name in _MASTERS:
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def _moment_names(engine) -> list[str]:
    """Of one of this rank's masters; every rank has some, and the same."""
    for tensor in _masters(engine):
        state = engine.basic_optimizer.state.get(tensor, {})
        return [k for k, v in state.items() if torch.is_tensor(v) and v.shape == tensor.shape and tensor.dim()]
    return []


def _whole(engine, parameter: Tensor, key: str | None = None) -> Tensor:
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_full_hp_param(parameter, key).view(parameter.ds_shape)
    if hasattr(parameter, "_hp_mapping"):
        return parameter.get_full_hp_param(key)
    return _here(engine, parameter, key).detach().clone().view_as(parameter)


def _set(engine, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
    if hasattr(parameter, "ds_id"):
        # not set_full_hp_param, which wants ranks' parts to divide the weight evenly
        optimizer, size = parameter._z3_optimizer, parameter.ds_tensor.numel()
        mine = value.flatten()[size * optimizer._get_param_partition_rank(parameter) :][:size]
        part = value.new_zeros(size)
        part[: len(mine)] = mine
        optimizer.set_local_hp_param(part, parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, key)
    else:
        found = _here(engine, parameter, key)
        found.data.copy_(value.view_as(found))


def _here(engine, parameter: Tensor, key: str | None) -> Tensor:
    """Stage 0: the master or moment, whole on this rank; a part of a flat tensor in 16 bits."""
    state = engine.basic_optimizer.state
    if not hasattr(engine.optimizer, "fp32_groups_flat"):
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


def _set_frozen(parameter: Tensor, value: Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        if parameter.numel() == value.numel():
            parameter.data.copy_(value)

"""A DeepSpeed engine's weights and optimizer state as whole fp32 tensors, at any ZeRO stage, by DeepSpeed's accessors.

What is read under one stage and number of ranks can be written under any other: names and shapes are the model's own.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from c4c.zero import patches


def weights(engine, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor of the model's shape) of every weight and stored buffer but those `without`; called on every rank."""
    known = dict(engine.module.named_parameters())
    for name, parameter in known.items():
        if name not in without:
            yield name, master(engine, parameter)
    for name, tensor in engine.module.state_dict().items():
        if name not in known and name not in without:
            yield name, engine.module.exact_buffers.get(name, tensor).detach()


def moments(engine) -> Iterator[tuple[str, str, Tensor]]:
    """(name of the weight, name of the moment, tensor) of every trained weight; none before the first update. With `train.ema` the
    weights' average is one of them (see c4c.zero.ema).

    Called on every rank.
    """
    # every rank has a part of some master, and all that were updated have the same moments
    names = next(filter(None, (_moment_names(engine, flat) for flat in patches.masters(engine))), [])
    patches.link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in names:
                yield name, key, _whole(engine, parameter, key)


def _moment_names(engine, flat: Tensor) -> list[str]:
    state = engine.basic_optimizer.state.get(flat, {})
    return [k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape and flat.dim()]


def master(engine, parameter: nn.Parameter) -> Tensor:
    """The fp32 master copy of a weight, whole; of a frozen one the weight itself. Called on every rank."""
    if parameter.requires_grad:
        return _whole(engine, parameter)
    with gathered(parameter):
        return parameter.detach().float().clone()


def size(parameter: nn.Parameter) -> int:
    """Elements of a whole weight. (Under ZeRO 3 the parameter itself is empty between passes.)"""
    return getattr(parameter, "ds_numel", parameter.numel())


def gathered(parameter: nn.Parameter, modifier_rank: int | None = None):
    """A context in which the weight is whole on every rank; modifier_rank: whose changes to it all take over."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank, enabled=_is_partitioned(parameter)
    )


@torch.no_grad()
def clamp(engine, parameter: nn.Parameter, most: float) -> None:
    """Bound a trained weight from above, in the master copy and in the one the model computes with, without exchange."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    if _is_partitioned(parameter):  # each rank has a part, which may be padding
        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(max=most))
        return
    if patches.has_flat_master(parameter):
        if (part := patches.local_master(parameter)) is not None:
            part.data.clamp_(max=most)
    else:
        patches.unpartitioned(engine, parameter, None).data.clamp_(max=most)
    parameter.data.clamp_(max=most)


def updates(engine) -> int:
    """How often the optimizer has changed the weights: Adam's own count of steps."""
    counts = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@torch.no_grad()
def write(
    engine,
    read: Callable[[str, str | None], Tensor],
    moment_names: list[str],
    count: int,
    without: Collection[str] = (),
) -> None:
    """Put weights and moments into the engine; called on every rank. Frozen weights and buffers `without` stay as they are.

    read(name of a weight, name of a moment or None for the weight itself) -> the whole tensor.
    """
    patches.make_moments(engine, moment_names, count)
    known = dict(engine.module.named_parameters())
    for name, parameter in known.items():
        if parameter.requires_grad:
            for key in (None, *moment_names):
                _set(engine, parameter, read(name, key).to(parameter.device), key)
        elif name not in without:
            value = read(name, None)
            with gathered(parameter, modifier_rank=0):
                if parameter.numel() == value.numel():  # under ZeRO 3 only where it is whole
                    parameter.data.copy_(value)
    for name, tensor in engine.module.state_dict().items():
        if name not in known and name not in without:
            value = read(name, None)
            tensor.copy_(value)
            if name in engine.module.exact_buffers:
                engine.module.exact_buffers[name] = value
    patches.refresh(engine)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 has partitioned it."""
    return hasattr(parameter, "ds_id")


def _whole(engine, parameter: nn.Parameter, key: str | None = None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensor = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
    if tensor is None:  # stage 0
        return patches.unpartitioned(engine, parameter, key).detach().clone().view_as(parameter)
    return tensor.view(getattr(parameter, "ds_shape", parameter.shape))


def _set(engine, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if _is_partitioned(parameter):
        patches.set_uneven(parameter, value, key)
    elif patches.has_flat_master(parameter):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        place = patches.unpartitioned(engine, parameter, key)
        place.data.copy_(value.view_as(place))

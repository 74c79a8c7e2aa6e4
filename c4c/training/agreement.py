"""What the ranks of a run decide alike."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def agree(values: dict[str, object], world: int) -> None:
    """Raise ValueError, on every rank alike, if ranks differ in one of these values; it names ranks and values."""
    if world == 1:
        return
    all_ranks: list = [None] * world
    dist.all_gather_object(all_ranks, values)
    differing = []
    for key in sorted(set().union(*all_ranks)):
        for rank, others in enumerate(all_ranks[1:], 1):
            if others.get(key) != all_ranks[0].get(key):
                differing.append(f"{key} is {all_ranks[0].get(key)} on rank 0 and {others.get(key)} on rank {rank}")
                break
    if differing:
        raise ValueError(
            f"the ranks do not agree: {'; '.join(differing)}. All must run the same code on the same data with the same settings"
        )


def on_first_rank(call: Callable[[], Any], rank: int, world: int) -> Any:
    """What `call` returns on rank 0, or the ValueError or OSError that it raises there, raised on every rank alike."""
    outcome: list = [None, None]  # result, error
    if rank == 0:
        try:
            outcome[0] = call()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if world > 1:
        dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def any_rank(answers: tuple[bool, ...], group: dist.ProcessGroup | None = None) -> tuple[bool, ...]:
    """Which of these questions any rank answers with yes; called on every rank.

    group: of CPU tensors; None: the default one, if that is of CPU tensors or there is one rank.
    """
    if not answers or not dist.is_initialized() or dist.get_world_size() == 1:
        return answers
    counts = torch.tensor(answers, dtype=torch.int64)
    dist.all_reduce(counts, group=group)
    return tuple(count > 0 for count in counts.tolist())

"""A training step without DeepSpeed: its three ways, their gradients beside a formula's, and two ranks of it."""

import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from c4c.training import step
from c4c.training.step import Learner

SPEC: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 1, "layers": 1},
}
ROWS = 8  # of a batch; the last one is padding
VALID = range(ROWS - 1)
WAYS = {"plain": 0, "cached": 3, "accumulated": 2}  # pairs that are encoded at once; parts
Taken = tuple[Tensor | float, dict[str, Tensor]]  # the loss, and the gradient of every weight


class Engine:
    """As much of a DeepSpeed engine as a step asks for: gradients add up in the weights."""

    optimizer = average = None

    def __init__(self, module: Learner):
        self.module = module

    def __call__(self, *args) -> Tensor:
        return self.module(*args)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def zero_optimization_stage(self) -> int:
        return 1


def taken(way: str, module: Learner, inputs: tuple, taught_rows: Any = None) -> Taken:
    """A step of c4c. taught_rows: of a teacher in a file."""
    if way == "plain":
        loss = module(*inputs, teacher_rows=taught_rows)
        loss.backward()
    elif way == "cached":
        loss = step._cached_step(Engine(module), inputs, WAYS[way], taught_rows=taught_rows)
    else:
        loss = step._accumulated_step(Engine(module), inputs, WAYS[way], taught_rows=taught_rows)
    return loss.detach(), _gradients(module)


def by_formula(way: str, module: nn.Module, formula: Callable[[list[int]], Tensor]) -> Taken:
    """The same by a formula of the loss over some rows of the whole batch."""
    if way == "accumulated":  # each half of a rank's rows has only its own negatives; halves count by their rows
        parts = [[i for i in VALID if i % 2 == k] for k in range(2)]
        loss = sum((formula(part) * len(part) for part in parts), torch.zeros(())) / len(VALID)
    else:
        loss = formula(list(VALID))
    loss.backward()
    return loss.item(), _gradients(module)


def same(found: Taken, wanted: Taken, rtol: float, atol: float) -> None:
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def on_two_ranks(took: Callable[..., Taken], cases: Iterable[tuple], folder: Path) -> dict[tuple, Taken]:
    """What `took(*case, rows)` comes to with half of the rows on each of two ranks: the mean over them. took: of a module, by its name."""
    multiprocessing.set_forkserver_preload([took.__module__])
    mp.start_processes(_rank, (took, list(cases), str(folder)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    found = {}
    for case, (loss, grads) in ranks[0].items():
        other_loss, others = ranks[1][case]
        found[case] = (loss + other_loss) / 2, {name: (grads[name] + others[name]) / 2 for name in grads}
    return found


def _rank(rank: int, took: Callable[..., Taken], cases: list[tuple], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    torch.save({case: took(*case, rows) for case in cases}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

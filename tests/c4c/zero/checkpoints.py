"""A small engine, and what is done to its checkpoints."""

from pathlib import Path

import pytest
import torch

from c4c.zero.checkpoint import CheckpointError
from c4c.zero.snapshot import save


class Engine:
    """As DeepSpeed's without ZeRO: a module and its optimizer."""

    world_size = 1

    def __init__(self, rank: int = 0):
        torch.manual_seed(0)
        self.global_rank, self.module = rank, torch.nn.Linear(3, 2)
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def zero_optimization_stage(self) -> int:
        return 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.module(torch.randn(4, 3)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def refused(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_of(path: Path, *steps: int) -> list[dict]:
    """Checkpoints after these steps; the weights and moments of each."""
    engine, states = Engine(), []
    for step in steps:
        engine.train(2)
        save(engine, path, step, keep_last=len(steps))
        states.append({k: v.clone() for k, v in engine.module.state_dict().items()})
    return states


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)

"""Timing on a GPU by events, without waiting in between, and on a CPU by the clock."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

LEAST = {"cuda": 6, "cpu": 3}  # steps that are timed at least
WARM = {"cuda": 4, "cpu": 1}  # steps before, which allocate, choose kernels and compile
AHEAD = 3  # steps that the host may be ahead of the device, so that the time ends when it should


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Moments in the order of the device's work."""

    def __init__(self, device: torch.device):
        self._on_gpu, self._moments = device.type == "cuda", []

    def set(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def wait(self, but: int) -> None:
        """Wait until the device is past all moments but the last few."""
        if self._on_gpu and len(self._moments) > but:
            self._moments[-1 - but].synchronize()

    def between(self) -> list[float]:
        """Seconds from each to the next; the device has to be done with them."""
        if self._on_gpu:
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(self._moments)]
        return [b - a for a, b in pairwise(self._moments)]


def timed(step: Callable[[], object], seconds: float, device: torch.device) -> dict:
    """Steps for about so many seconds. Nothing but the steps is done in that time.

    `step_s`: median, by the device's clock. `mean_s`: all of the time over the steps.
    """
    marks = Marks(device)
    synchronise(device)
    began, steps = time.perf_counter(), 0
    marks.set()
    while steps < LEAST[device.type] or time.perf_counter() - began < seconds:
        step()
        marks.set()
        steps += 1
        marks.wait(AHEAD)
    synchronise(device)
    spent = time.perf_counter() - began
    return {"step_s": statistics.median(marks.between()), "mean_s": spent / steps, "steps": steps}


def rate_twice(work: Callable[[], object], amount: float, seconds: float, device: torch.device) -> list[float]:
    """Two measurements of how much a second `work` does, which does `amount` in a call, each of about half the seconds."""
    work(), synchronise(device)
    began = time.perf_counter()
    work(), synchronise(device)
    calls = max(3, round(seconds / 2 / max(1e-6, time.perf_counter() - began)))
    found = []
    for _ in range(2):
        marks = Marks(device)
        marks.set()
        for _ in range(calls):
            work()
        marks.set()
        synchronise(device)
        found.append(amount * calls / marks.between()[0])
    return found

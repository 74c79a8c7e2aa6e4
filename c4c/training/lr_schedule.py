"""The learning rate's course over a run, as a factor of its peak: mmaction2's by default, the official CLIP4Clip's by choice."""

import math


def lr_factor(step: int, total: int, warmup: int, start: float) -> float:
    """mmaction2's: linear from `start` over `warmup` steps, then half a cosine to 0 over the rest."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def official_lr_factor(step: int, total: float, warmup: float) -> float:
    """CLIP4Clip's (modules/optimization.py): x = step / total; x / warmup below it, then (1 + cos(pi x)) / 2.

    As written there: the cosine is of the whole progress, so the rate drops a little where the warm-up ends, and the
    first step has rate 0.
    """
    x = step / total
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))

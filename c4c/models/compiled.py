"""torch.compile of the towers, where it can."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from c4c.models.clip4clip import CLIP4Clip


def compile_towers(model: CLIP4Clip, stage: int) -> bool:
    """torch.compile both towers in place; where that is not possible, warn and leave them as they are."""
    why = "ZeRO 3 fetches weights inside them" if stage == 3 else _cannot_compile(model.clip.logit_scale.device)
    if why:
        warnings.warn(f"engine.compile: the towers run uncompiled ({why})", stacklevel=2)
        return False
    torch._dynamo.config.suppress_errors = True  # a part that cannot be compiled runs as it is
    for tower in (model.clip.visual, model.clip.transformer):
        tower.compile(backend=or_as_it_is)
    return True


def or_as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """What inductor makes of a part of a tower; where it fails, the part as it is, and one line instead of dynamo's pages."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(f"engine.compile: a part of a tower runs uncompiled ({reason})", stacklevel=2)
        return graph.forward


def _cannot_compile(device: torch.device) -> str:
    """Why not, by trying; empty if it works."""
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x) + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, an unsupported device, ...: any of dynamo's and inductor's errors
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return ""

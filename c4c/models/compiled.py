"""torch.compile of the towers, where it can, and what became of it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from c4c.models.clip4clip import CLIP4Clip
from pipelines.stages.pixels import normalised
from shards import first_line


def compile_towers(model: CLIP4Clip, stage: int) -> "CompiledTowers | None":
    """torch.compile both towers in place, and the normalisation of bytes, which becomes one pass over them.

    Where that is not possible, warn, leave them as they are, and return None.
    """
    why = "ZeRO 3 fetches weights inside them" if stage == 3 else _cannot_compile(model.clip.logit_scale.device)
    if why:
        warnings.warn(f"engine.compile: the towers run uncompiled ({why})", stacklevel=2)
        return None
    torch._dynamo.config.suppress_errors = True  # a part that cannot be compiled runs as it is
    model.pixels.normalise = torch.compile(normalised, backend=or_as_it_is)
    torch._dynamo.utils.counters.clear()  # of the trial above and earlier models
    return CompiledTowers(
        {"video": model.clip.visual, "text": getattr(model.clip, "text", None) or model.clip.transformer}
    )


class CompiledTowers:
    """Towers that torch.compile compiles when they are first called; each should become one graph.

    Dynamo says nothing where it gives up (suppress_errors): a tower may run uncompiled, in whole or in parts, at the speed of
    one that never was compiled. `problem` tells, once a step was taken.
    """

    def __init__(self, towers: dict[str, nn.Module]):
        self.graphs = dict.fromkeys(towers, 0)  # that inductor was given; a new shape, or no_grad, adds one
        for name, tower in towers.items():
            tower.compile(backend=self._backend(name))

    def _backend(self, name: str) -> Callable:
        def compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            self.graphs[name] += 1
            return or_as_it_is(graph, inputs)

        return compiled

    @staticmethod
    @contextmanager
    def paused() -> Iterator[None]:
        """Inside, nothing is compiled, and nothing that is compiled is used: towers run as they are."""
        with torch.compiler.set_stance("force_eager"):
            yield

    @property
    def problem(self) -> str:
        """Why a tower is not one compiled graph, in one line, '' if each is; to be asked after a step."""
        counters = torch._dynamo.utils.counters
        eager = [name for name, graphs in self.graphs.items() if not graphs]
        breaks = sum(counters["graph_break"].values())
        frames = counters["frames"]
        failed = frames["total"] - frames["ok"]
        if not (eager or breaks or failed):
            return ""
        what = [f"the {' and '.join(eager)} tower{'s' * (len(eager) > 1)} ran uncompiled"] if eager else []
        what += [f"{breaks} graph breaks cut a tower into parts"] if breaks else []
        what += [f"{failed} of {frames['total']} parts could not be compiled"] if failed and not eager else []
        reasons = sorted(counters["graph_break"], key=counters["graph_break"].__getitem__, reverse=True)
        reason = f" ({reasons[0].strip().partition(chr(10))[0][:200]})" if reasons else ""
        return (
            f"engine.compile: {', and '.join(what)}{reason}: steps are slower than they could be. TORCH_LOGS=graph_breaks,recompiles "
            "prints where"
        )


def or_as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """What inductor makes of a part of a tower; where it fails, the part as it is, and one line instead of dynamo's pages."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:
        reason = first_line(error)
        warnings.warn(f"engine.compile: a part of a tower runs uncompiled ({reason})", stacklevel=2)
        return graph.forward


def _cannot_compile(device: torch.device) -> str:
    """Why not, by trying; empty if it works."""
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x) + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, an unsupported device, ...: any of dynamo's and inductor's errors
        return first_line(error, named=True)
    return ""

"""The training step on one batch that stays on the device: no loader, no trainer."""

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu_parts.clock import LEAST, WARM, Marks, synchronise, timed
from bench.gpu_parts.parts import Given, training_settings
from c4c.config import Config, load
from c4c.models.backbone import settled, spec_of
from c4c.models.clip4clip import build
from c4c.models.flops import peak, per_pair
from c4c.training.step import Learner, train_step
from c4c.zero.distributed import start_distributed, stop_distributed
from c4c.zero.engine import build_engine
from pipelines.tokens import Tokenizer

PAIRS = 900_000  # five epochs of MSR-VTT 9k
PHASES = ("forward", "backward", "step")  # of DeepSpeed's engine


@contextmanager
def started(given: Given, *, stored: str = "intra", words: Sequence[str] = ()) -> Iterator[tuple[Config, torch.device]]:
    """The configuration of a training part and its device, with a process group of one rank."""
    data = given.folder / f"{stored}-{given.clips}"
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as folder:
        (Path(folder) / "bench.yaml").write_text("{}")
        settings = [*training_settings(data, given.batch_size), f"run.dir={folder}/run"]
        config = settled(load("bench.yaml", [*settings, *given.overrides, *words], [Path(folder)]))
        _, _, device = start_distributed()
        try:
            yield config, device
        finally:
            stop_distributed()


@dataclass(frozen=True)
class Fixed:
    """An engine, a batch, and the step that one takes on the other."""

    engine: Any
    batch: SimpleNamespace
    step: Callable[[], object]


def build_fixed(config: Config, device: torch.device) -> Fixed:
    """The engine that a run with this configuration has, and a batch of noise with real captions."""
    torch.manual_seed(config.run.seed)
    model = build(config.model, config.data.num_frames, config.data.image_size)
    engine = build_engine(Learner(model, config.train.loss), config.engine, config.train, 1, config.deepspeed)
    tokenizer = Tokenizer(model.spec.get("tokenizer"))
    rows, frames, side = config.train.batch_size, config.data.num_frames, config.data.image_size
    tokens = tokenizer([f"a dog catches frisbee number {i}" for i in range(rows)], config.data.max_words)
    batch = SimpleNamespace(
        # bytes, as the loader hands them over on a GPU
        frames=torch.randint(0, 256, (rows, frames, side, side, 3), dtype=torch.uint8, device=device),
        frame_mask=torch.ones(rows, frames, dtype=torch.bool, device=device),
        tokens=tokens.to(device),
        tokens_on_host=tokens,
        caption_mask=torch.ones(rows, 1, dtype=torch.bool, device=device),
        valid=torch.ones(rows, dtype=torch.bool, device=device),
    )
    return Fixed(engine, batch, lambda: train_step(engine, batch, 1.0, config.train))


def fixed(given: Given, *, words: Sequence[str] = (), plain: bool = False) -> None:
    """Rate, MFU and memory of the step, its phases, and dynamo's counters. plain: without fused attention."""
    with (
        started(given, words=words) as (config, device),
        _attention(plain),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        made = build_fixed(config, device)
        for _ in range(WARM[device.type]):
            made.step()
        given.note(**rates(config, device, timed(made.step, given.seconds, device)))
        given.note(phases_ms=phases(made, device), notes=list(getattr(made.engine.module, "notes", [])))
        if config.engine.compile:
            given.note(
                dynamo=dynamo_counters(), uncompiled=[str(w.message) for w in said if "compile" in str(w.message)]
            )


def rates(config: Config, device: torch.device, times: dict) -> dict:
    """What the times of steps come to."""
    clips = config.train.batch_size / times["mean_s"]
    flops = 3 * per_pair(spec_of(config.model), config.data.num_frames, config.data.max_words)
    most = peak(device, config.engine.precision)
    return times | {
        "clips_per_s": clips,
        "tflop_per_s": flops * clips / 1e12,
        "mfu_pct": 100 * flops * clips / most if most else None,
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "minutes_for_900000_clips": PAIRS / clips / 60,
    }


def phases(made: Fixed, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step on the device's clock: forward, backward, the optimizer's step, and the rest between them.

    It comes last: the engine keeps the marks that it sets.
    """
    kept: dict[str, list[Marks]] = defaultdict(list)
    steps = LEAST[device.type]

    def marked(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            marks = Marks(device)
            marks.set()
            outcome = function(*args, **kwargs)
            marks.set()
            kept[name].append(marks)
            return outcome

        return call

    for name in PHASES:
        setattr(made.engine, name, marked(name, getattr(made.engine, name)))
    whole = marked("whole", lambda: [made.step() for _ in range(steps)])
    whole()
    synchronise(device)
    each = {name: 1000 * sum(m.between()[0] for m in marks) / steps for name, marks in kept.items()}
    return {name: each.get(name, 0.0) for name in PHASES} | {
        "rest": each["whole"] - sum(each.get(name, 0.0) for name in PHASES),
        "whole": each["whole"],
    }


def dynamo_counters() -> dict[str, dict[str, int]]:
    """What torch._dynamo counted: graphs, breaks, and parts that fell back to running as they are."""
    from torch._dynamo.utils import counters

    return {group: {str(key): int(n) for key, n in counts.items()} for group, counts in counters.items() if counts}


def _attention(plain: bool):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH]) if plain else nullcontext()

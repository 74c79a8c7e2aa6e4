"""What fits a 24 GB card: memory of a rank for each way to train a model, as `launch/train.py --check` prints it.

Everything is counted on torch's meta device or follows from settings, so it needs no GPU, and no GPU has confirmed it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from c4c.config import Config
from c4c.performance.assumptions import Assumptions
from c4c.performance.counts import count
from c4c.performance.hardware import gpu_named
from c4c.performance.predict import memory_of, shape_of
from c4c.performance.work import StepCounts
from c4c.settings import LORA_ON, TrainConfig

_CARD = "L4"  # of the cards of 24 GB the one that leaves a program least
_RANKS = 8  # that share, where one rank is asked about
_STAGES = (0, 1, 3)
_COUNTED = 64  # pairs; each further one takes as much again, and beside them a gradient of one weight counts little
_LORA = 16  # rank, where the run has none
_MANY = 9999  # pairs; that more fit is of no interest


@dataclass(frozen=True)
class Way:
    """A way to train. activations: bytes for each pair that is encoded at once, without and with engine.activation_checkpointing;
    in_zero_3: the same there, where DeepSpeed keeps the inputs of frozen matrices too. scores: bytes for the scores of a whole batch."""

    name: str
    weights: int
    trained: int
    activations: tuple[float, float]
    in_zero_3: tuple[float, float]
    scores: float


def memory_table(config: Config, world: int) -> list[str]:
    """Lines of text. world: ranks that share a ZeRO stage; for one rank, what 8 would need. Raises ValueError where the model cannot be
    counted."""
    ranks, assumed, gpu = world if world > 1 else _RANKS, Assumptions(), gpu_named(_CARD)
    usable = gpu.memory_gib * (1 - assumed.fragments)
    decoder = "cpu" if config.data.decode == "cpu" else "gpu"
    lines = [
        f"what fits a card of 24 GB ({usable:.1f} GiB for a program) in bf16: GiB of a rank without activations, and the most pairs of "
        f"{config.data.num_frames} frames",
        "that it can encode at once (train.micro_batch_size), in brackets with engine.activation_checkpointing. * is this run. These are",
        "counts, not measurements on a GPU.",
        f"  {'':24}{'trained':>10}{'MiB a pair':>16}"
        + "".join(f"{_stage_name(stage, ranks):>22}" for stage in _STAGES),
    ]
    for way in _ways(config):
        cells = []
        for stage in _STAGES:
            engine = replace(config.engine, precision="bf16", zero_stage=stage, offload="none")
            batch = -(-config.train.batch_size // ranks) * ranks  # a number that they can divide
            whole = replace(config.train, accumulate=1, micro_batch_size=0, batch_size=batch)
            asked = replace(config, engine=engine, train=whole, deepspeed={})
            shape = shape_of(asked, 1 if stage == 0 else ranks)
            fixed = sum(asdict(memory_of(asked, shape, way.weights, way.trained, 0, decoder, assumed)).values())
            most = [
                _most(usable - fixed, per_pair, way.scores)
                for per_pair in (way.in_zero_3 if stage == 3 else way.activations)
            ]
            cells.append(f"{fixed:>8.1f}{f'{_number(most[0])} ({_number(most[1])})':>14}")
        plain, recomputing = (size / 2**20 for size in way.activations)
        size = f"{plain:.1f} ({recomputing:.1f})"
        lines.append(f"  {way.name:24}{way.trained / 1e6:>8.2f} M{size:>16}{''.join(cells)}")
    return lines


def _stage_name(stage: int, ranks: int) -> str:
    return f"ZeRO {stage}" + (f" x {ranks} GPUs" if stage else "")


def _number(pairs: int) -> str:
    return str(pairs) if pairs <= _MANY else f">{_MANY}"


def _most(free_gib: float, per_pair: float, scores: float) -> int:
    """Pairs that fit; 0 where the scores of a batch alone do not."""
    free = free_gib * 2**30
    return max(0, int(free / per_pair)) if free >= scores else 0


def _ways(config: Config) -> Iterator[Way]:
    train = config.train
    full = replace(train, lora=0, lora_also=(), prompts=0, freeze=())
    lora = replace(train, lora=train.lora or _LORA, prompts=train.prompts if train.lora else 0)
    named: list[tuple[str, list[TrainConfig]]] = [
        ("full", [full]),
        (f"LoRA, rank {lora.lora}", [replace(lora, lora_on=on) for on in (train.lora_on, *LORA_ON)]),
        ("text tower frozen", [replace(full, freeze="text")]),
        ("both towers frozen", [replace(full, freeze=("text", "video"))]),
    ]
    if train not in [settings for _, choices in named for settings in choices[:1]]:
        named.insert(1, ("this run", [train]))
    scores, of_full = None, (0.0, 0.0)
    for name, choices in named:
        if (counted := _first_possible(config, choices)) is None:
            continue
        settings, first, again = counted
        if scores is None:
            rows = config.train.batch_size
            scores = float(count(_with(config, settings, False), encoded=1, scored=rows).activations)
        if first.trained > 2:  # more than the temperature and its bias
            on = f", {settings.lora_on}" if settings.lora and settings != train else ""
            own = " *" if settings == train else ""
            sizes = (first.activations / _COUNTED, again.activations / _COUNTED)
            of_full = sizes if settings == full else of_full
            # LoRA's inputs are those of the matrices beside it: in ZeRO 3 about as many are kept as in full training
            in_zero_3 = (max(sizes[0], of_full[0]), max(sizes[1], of_full[1])) if settings.lora else sizes
            yield Way(f"{name}{on}{own}", first.weights, first.trained, sizes, in_zero_3, scores)


def _first_possible(config: Config, choices: list[TrainConfig]) -> tuple[TrainConfig, StepCounts, StepCounts] | None:
    """The first of these settings that the model can be trained with, counted without and with recomputation."""
    for settings in choices:
        try:
            first = count(_with(config, settings, False), encoded=_COUNTED, scored=_COUNTED)
            return settings, first, count(_with(config, settings, True), encoded=_COUNTED, scored=_COUNTED)
        except ValueError:
            if settings is choices[-1] and len(choices) == 1 and not settings.freeze:
                raise
    return None


def _with(config: Config, train: TrainConfig, recomputing: bool) -> Config:
    engine = replace(config.engine, precision="bf16", activation_checkpointing=recomputing)
    return replace(config, train=train, engine=engine)

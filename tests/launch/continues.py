"""Ways to train, to stop in the middle, and to go on from the checkpoint of another way. See engines.py.

Every number of ranks takes `COMMON`'s; two ranks those of `TWO` as well. `saved` ways write a checkpoint in the middle
and go on; `AGAIN` says which ways of which number of ranks go on from whose checkpoint.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from c4c.models.clip4clip import CLIP4Clip
from c4c.settings import EngineConfig, TrainConfig
from c4c.training.step import Learner, train_step
from c4c.zero.engine import build_engine
from c4c.zero.skipping import was_applied
from c4c.zero.snapshot import restore, save
from tests.launch.every_head import FRAMES, ROWS, SPEC, batch

HALF, STEPS = 2, 4
LINEAR = torch.nn.functional.linear
COMMON = {
    f"ZeRO {stage}{kind}": {"zero_stage": stage} | more
    for stage in range(4)
    for kind, more in {"": {}, ", cached": {"passes": 2}, ", accumulated": {"accumulate": 2}}.items()
}
BF16 = {f"ZeRO {stage}, bf16": {"zero_stage": stage, "precision": "bf16"} for stage in range(4)}
FP16 = {f"ZeRO {stage}, fp16": {"zero_stage": stage, "precision": "fp16", "scale": 4} for stage in range(4)}
TORCHS = {
    "torch's, ZeRO 0": {"zero_stage": 0, "torchs": True},
    "torch's, ZeRO 2": {"zero_stage": 2, "torchs": True},
    "torch's, ZeRO 3": {"zero_stage": 3, "torchs": True},
    "torch's, ZeRO 1, bf16": {"zero_stage": 1, "precision": "bf16", "torchs": True},
    "torch's, ZeRO 2, bf16": {"zero_stage": 2, "precision": "bf16", "torchs": True},
}
ONE = {  # in bf16, where one rank runs without ZeRO
    "alone, bf16": {"zero_stage": 1, "precision": "bf16"},
    "alone, bf16, cached": {"zero_stage": 1, "precision": "bf16", "passes": 2},
    "alone, bf16, torch's": {"zero_stage": 1, "precision": "bf16", "torchs": True},
    "ZeRO kept, bf16": {"zero_stage": 1, "precision": "bf16", "kept": True},
    "ZeRO kept, bf16, cached": {"zero_stage": 1, "precision": "bf16", "passes": 2, "kept": True},
    "bad, alone, bf16": {"zero_stage": 1, "precision": "bf16", "bad": True},
    "bad, alone, bf16, torch's": {"zero_stage": 1, "precision": "bf16", "torchs": True, "bad": True},
}
TWO = BF16 | FP16 | TORCHS | {
    "offload": {"zero_stage": 2, "offload": "optimizer"},
    "offload all": {"zero_stage": 3, "offload": "all"},
    "frozen": {"zero_stage": 3, "frozen": True},
    "activation checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
    **{f"bad, ZeRO {stage}": {"zero_stage": stage, "bad": True} for stage in range(4)},
    **{f"search, ZeRO {stage}, fp16": {"zero_stage": stage, "precision": "fp16", "scale": 15} for stage in range(4)},
    **{f"bad, ZeRO {stage}, bf16": {"zero_stage": stage, "precision": "bf16", "bad": True} for stage in (0, 1, 3)},
    "bad, torch's, ZeRO 1, bf16": TORCHS["torch's, ZeRO 1, bf16"] | {"bad": True},
}  # fmt: skip
SAVED = {
    1: ["ZeRO 1", "alone, bf16", "alone, bf16, torch's"],
    2: [*(f"ZeRO {stage}" for stage in range(4)), *BF16, *FP16, *TORCHS, "offload", "offload all", "frozen", "ZeRO 1, cached",
        "ZeRO 2, accumulated"],
    4: [],
}  # fmt: skip
# ranks: {name: (ranks of the checkpoint, its way, the way to go on)}
AGAIN: dict[int, dict[str, tuple[int, str, str]]] = {
    1: {f"2 -> 1, {way}": (2, way, way) for way in ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 2, accumulated")}
    | {f"again, {way}": (1, way, way) for way in SAVED[1]}
    | {
        "alone, bf16 -> torch's": (1, "alone, bf16", "alone, bf16, torch's"),
        "torch's -> alone, bf16": (1, "alone, bf16, torch's", "alone, bf16"),
        "2 -> alone, bf16": (2, "ZeRO 1, bf16", "alone, bf16"),
    },
    2: {f"again, {way}": (2, way, way) for way in SAVED[2]}
    | {
        f"{a} -> {b}": (2, a, b)
        for a, b in (("ZeRO 1", "ZeRO 3"), ("ZeRO 3", "ZeRO 0"), ("ZeRO 0", "ZeRO 2"), ("ZeRO 2", "offload"),
                     ("ZeRO 1, bf16", "ZeRO 0, bf16"), ("ZeRO 1, bf16", "torch's, ZeRO 1, bf16"),
                     ("torch's, ZeRO 2, bf16", "ZeRO 2, bf16"), ("torch's, ZeRO 3", "ZeRO 0"), ("ZeRO 0", "torch's, ZeRO 3"))
    },
    4: {
        "1 -> 4, ZeRO 1": (1, "ZeRO 1", "ZeRO 1"),
        "1 -> 4, ZeRO 1 -> ZeRO 3": (1, "ZeRO 1", "ZeRO 3"),
        "1 -> 4, alone, bf16 -> ZeRO 1, bf16": (1, "alone, bf16", "ZeRO 1, bf16"),
        "2 -> 4, ZeRO 3 -> ZeRO 2": (2, "ZeRO 3", "ZeRO 2"),
    },
}  # fmt: skip


def ways(world: int) -> dict[str, dict]:
    return COMMON | {1: ONE, 2: TWO}.get(world, {})


def engine_of(way: dict, world: int):
    torch.nn.functional.linear = LINEAR  # DeepSpeed's stage 3 leaves one in its place that rounds otherwise
    torch.manual_seed(3)
    model = CLIP4Clip(SPEC, "seqTransf", "2d", blocks=2, segments=FRAMES)
    if way.get("frozen"):
        model.clip.visual.requires_grad_(False)
    micro = ROWS // world // way["passes"] if "passes" in way else 0
    train = TrainConfig(batch_size=ROWS, micro_batch_size=micro, lr=1e-3, accumulate=way.get("accumulate", 1))
    known = {
        k: v for k, v in way.items() if k not in ("passes", "accumulate", "frozen", "bad", "scale", "torchs", "kept")
    }
    config = EngineConfig(**{"precision": "fp32"} | known)
    get_accelerator().is_fp16_supported = lambda: True  # it is, only slow
    extra: dict = {"fp16": {"initial_scale_power": way["scale"], "hysteresis": 1}} if "scale" in way else {}
    extra |= {"optimizer": {"params": {"torch_adam": True}}} if "torchs" in way else {}
    extra |= {"zero_optimization": {"stage": way["zero_stage"]}} if "kept" in way else {}
    return build_engine(Learner(model), config, train, world, extra), train


def go(engine, train: TrainConfig, rank: int, world: int, first: int, last: int, bad: bool = False) -> list:
    """[loss, norm of the gradient before clipping] of each step; Adam and clipping hide a gradient of wrong size."""
    data, found = batch(rank, world), []
    whole = data.frames.clone()
    for step in range(first, last):
        broken = bad and step == 1
        if broken and rank == world - 1:  # on one rank only
            data.frames[0] = float("nan")
        loss = train_step(engine, data, 1.0 - step / 10, train)
        dist.all_reduce(loss)
        found.append([loss.item() / world, float(engine.get_global_grad_norm())])
        assert bool(was_applied(engine)) is not broken
        data.frames.copy_(whole)
    return found


def search(engine, train: TrainConfig, rank: int, world: int) -> list[bool]:
    """Which of so many steps counted, from a loss scale on that is too high."""
    data, counted = batch(rank, world), []
    for _ in range(6):
        train_step(engine, data, 1.0, train)
        counted.append(bool(was_applied(engine)))
    return counted


def results(folder: Path, rank: int, world: int) -> dict[str, list]:
    """By way; called on every rank."""
    found = {}
    for name, way in ways(world).items():
        engine, train = engine_of(way, world)
        if way.get("scale", 0) > 10:
            found[name] = search(engine, train, rank, world)
            engine.destroy()
            continue
        if way.get("bad"):
            found[name] = go(engine, train, rank, world, 0, 3, bad=True)
            engine.destroy()
            continue
        first = go(engine, train, rank, world, 0, HALF)
        if name in SAVED[world]:
            save(engine, folder / f"{world} {name}", HALF)
        found[name] = first + go(engine, train, rank, world, HALF, STEPS)
        engine.destroy()
    dist.barrier()
    for name, (ranks, source, way) in AGAIN[world].items():
        engine, train = engine_of((ways(2) | ways(1))[way], world)
        torch.manual_seed(99)
        state = restore(engine, folder / f"{ranks} {source}")
        found[name] = go(engine, train, rank, world, state["step"], STEPS)
        engine.destroy()
    return found

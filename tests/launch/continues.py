"""Started by DeepSpeed's launcher: runs that stop, and go on from their checkpoint under other ranks, stages and options.

    deepspeed --num_accelerators N tests/launch/continues.py FOLDER

With 2 ranks: every way of `WAYS` trains unbroken, and saves in the middle; every way of `AGAIN` goes on from the
checkpoint of another. With 1 and 4 ranks: only the latter. Writes FOLDER/N.json: the losses of each.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from c4c import checkpoint
from c4c.engine import EngineConfig, Learner, applied, build_engine, start_distributed, stop_distributed, train_step
from c4c.model import CLIP4Clip
from c4c.optim import TrainConfig
from tests.launch.every_head import FRAMES, ROWS, SPEC, batch

HALF, STEPS = 3, 6
WAYS = {
    **{f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"ZeRO {stage}, bf16": {"zero_stage": stage, "precision": "bf16"} for stage in range(4)},
    "offload": {"zero_stage": 2, "offload": "optimizer"},
    "offload all": {"zero_stage": 3, "offload": "all"},
    "cached": {"zero_stage": 1, "micro": 3},
    "accumulated": {"zero_stage": 2, "accumulate": 2},
    "activation checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
    "frozen": {"zero_stage": 3, "frozen": True},
    "bad": {"zero_stage": 1, "bad": True},
    **{f"bad, ZeRO {stage}, {p}": {"zero_stage": stage, "precision": p, "bad": True} for stage in (0, 2, 3) for p in ("fp32", "bf16")},
}  # fmt: skip
AGAIN = {
    **{f"{way} again": (way, WAYS[way]) for way in WAYS if "bad" not in way},
    "ZeRO 1 as 3": ("ZeRO 1", {"zero_stage": 3}),
    "ZeRO 3 as 0": ("ZeRO 3", {"zero_stage": 0}),
    "ZeRO 0 as 2": ("ZeRO 0", {"zero_stage": 2}),
    "ZeRO 2 as offload": ("ZeRO 2", {"zero_stage": 2, "offload": "optimizer"}),
    "ZeRO 1, bf16 as 0": ("ZeRO 1, bf16", {"zero_stage": 0, "precision": "bf16"}),
}
OTHER_RANKS = {
    **{f"ZeRO {stage}": (f"ZeRO {stage}", {"zero_stage": stage}) for stage in range(4)},
    "ZeRO 1 as 3": ("ZeRO 1", {"zero_stage": 3}),
    "accumulated": ("accumulated", {"zero_stage": 2, "accumulate": 2}),
}


def engine_of(way: dict, world: int):
    torch.manual_seed(3)
    model = CLIP4Clip(SPEC, "seqTransf", "2d", blocks=2, segments=FRAMES)
    if way.get("frozen"):
        model.clip.visual.requires_grad_(False)
    rows = ROWS // world
    train = TrainConfig(
        batch_size=ROWS, micro_batch_size=way.get("micro", 0), lr=1e-3,
        accumulate=min(rows, way.get("accumulate", 1)),
    )  # fmt: skip
    known = {k: v for k, v in way.items() if k not in ("micro", "accumulate", "frozen", "bad")}
    config = EngineConfig(**{"precision": "fp32"} | known)
    return build_engine(Learner(model), config, train, world, {}), train


def go(engine, train: TrainConfig, rank: int, world: int, first: int, last: int, bad: bool = False) -> list:
    data, losses = batch(rank, world), []
    for step in range(first, last):
        broken = bad and step == 1
        if broken:  # on one rank only
            frames = data.frames.clone()
            data.frames[0] = float("nan") if rank == world - 1 else data.frames[0]
        loss = train_step(engine, data, 1.0 - step / 10, train)
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
        if broken:
            data.frames = frames
            assert not applied(engine)
        elif bad:
            assert applied(engine)
    return losses


def main() -> None:
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("-")))
    rank, world, _ = start_distributed()
    results = {}
    for name, way in WAYS.items() if world == 2 else ():
        engine, train = engine_of(way, world)
        losses = go(engine, train, rank, world, 0, HALF, way.get("bad", False))
        checkpoint.save(engine, folder / name, HALF)
        results[name] = losses + go(engine, train, rank, world, HALF, STEPS)
        engine.destroy()
        dist.barrier()
    for name, (source, way) in (AGAIN if world == 2 else OTHER_RANKS).items():
        engine, train = engine_of(way, world)
        torch.manual_seed(99)
        state = checkpoint.restore(engine, folder / source)
        results[name] = go(engine, train, rank, world, state["step"], STEPS)
        engine.destroy()
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(results))
    stop_distributed()


if __name__ == "__main__":
    main()

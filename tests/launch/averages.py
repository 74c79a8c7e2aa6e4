"""Engines with train.ema, at every stage: the averages beside a direct evaluation in float64, and what stops and validations leave of them.

See engines.py. `AGAIN` says which ways of which number of ranks go on from whose checkpoint. `OFTEN` is as in continues.py.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from c4c.training.step import train_step
from c4c.zero import ema, patches, state
from c4c.zero.checkpoint import EMA, FROZEN, tag_of
from c4c.zero.skipping import was_applied
from c4c.zero.snapshot import restore, save
from tests.launch import continues
from tests.launch.continues import HALF, STEPS, engine_of
from tests.launch.every_head import batch

DECAY = 0.3  # reached by the third update: those before take 2/11 and 3/12
TWO = [*(f"ZeRO {stage}" for stage in range(4)), "ZeRO 1, bf16", "ZeRO 3, bf16", "ZeRO 2, fp16", "torch's, ZeRO 3",
       "torch's, ZeRO 1, bf16", "offload all", "ZeRO 1, cached", "LoRA, ZeRO 0", "LoRA, ZeRO 3", "bad, ZeRO 1", "bad, ZeRO 3",
       "bad, torch's, ZeRO 1, bf16"]  # fmt: skip
ONE = ["ZeRO 0", "ZeRO 3", "alone, bf16", "alone, bf16, torch's", "bad, alone, bf16", "bad, alone, bf16, torch's"]
WAYS = {1: ONE, 2: TWO, 4: []}
# ranks: {name: (ranks of the checkpoint, its way, the way to go on)}
AGAIN: dict[int, dict[str, tuple[int, str, str]]] = {
    1: {f"again, {way}": (1, way, way) for way in ("ZeRO 0", "alone, bf16", "alone, bf16, torch's")}
    | {"2 -> 1, ZeRO 3 -> ZeRO 0": (2, "ZeRO 3", "ZeRO 0"), "2 -> alone, bf16": (2, "ZeRO 1, bf16", "alone, bf16")},
    2: {f"again, {way}": (2, way, way) for way in (*TWO[:4], "ZeRO 3, bf16", "ZeRO 2, fp16", "torch's, ZeRO 1, bf16", "offload all")}
    | {
        f"{a} -> {b}": (2, a, b)
        for a, b in (("ZeRO 1", "ZeRO 3"), ("ZeRO 3", "ZeRO 0"), ("ZeRO 0", "offload"), ("LoRA, ZeRO 0", "LoRA, ZeRO 3"))
    },
    4: {"2 -> 4, ZeRO 3 -> ZeRO 2": (2, "ZeRO 3", "ZeRO 2"), "1 -> 4, ZeRO 0 -> ZeRO 1": (1, "ZeRO 0", "ZeRO 1")},
}  # fmt: skip
OFTEN = {
    1: {"alone, bf16"},
    2: {"ZeRO 1", "ZeRO 3", "bad, ZeRO 3", "again, ZeRO 3", "ZeRO 1 -> ZeRO 3"},
    4: set(),
}  # fmt: skip


def averaging(name: str, world: int):
    """An engine of one of continues.py's ways, with an average, and its way."""
    way = (continues.COMMON | continues.TWO | continues.ONE)[name]
    return *engine_of(way | {"train": way.get("train", {}) | {"ema": DECAY}}, world), way


def parts(engine) -> tuple[list, list]:
    """This rank's masters and averages."""
    masters = [master.detach().cpu().clone() for master in patches.masters(engine)]
    averages = [engine.basic_optimizer.state[master][ema.KEY].cpu().clone() for master in patches.masters(engine)]
    return masters, averages


def averages_of(engine) -> dict[str, torch.Tensor]:
    """Whole, on every rank."""
    return {name: tensor.cpu().clone() for name, key, tensor in state.moments(engine) if key == ema.KEY}


def computing(engine) -> dict[str, torch.Tensor]:
    """What the model computes with."""
    out = {}
    for name, weight in engine.module.named_parameters():
        with state.gathered(weight):
            out[name] = weight.detach().cpu().clone()
    return out


def differ_by(found: list, expected: list) -> float:
    """The largest difference, relative for numbers above 1: ZeRO 3 pads masters with whatever was in memory."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        known = b.isfinite()
        difference = (a[known].double() - b[known].double()).abs() / b[known].double().abs().clamp(min=1)
        worst = max(worst, difference.max().item())
    return worst


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What padding holds may be no number, which equals nothing."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def largest(value: float) -> float:
    """Of all ranks'."""
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


class Direct:
    """The same average in float64."""

    def __init__(self, engine):
        self.average = [master.double() for master in parts(engine)[0]]
        self.updates, self.differs_by = 0, 0.0

    def step(self, engine) -> None:
        masters, averages = parts(engine)
        if was_applied(engine):
            self.updates += 1
            decay = min(DECAY, (1 + self.updates) / (10 + self.updates))
            self.average = [
                decay * own + (1 - decay) * master.double() for own, master in zip(self.average, masters, strict=True)
            ]
        self.differs_by = max(self.differs_by, differ_by(averages, self.average))


def go(engine, train, rank: int, world: int, steps: range, direct: Direct | None = None, bad: bool = False) -> list:
    """As continues.py's."""
    data, found = batch(rank, world), []
    frames = data.frames.clone()
    for step in steps:
        if bad and step == 1 and rank == world - 1:
            data.frames[0] = float("nan")
        loss = train_step(engine, data, 1.0 - step / 10, train)
        dist.all_reduce(loss)
        found.append([loss.item() / world, float(engine.get_global_grad_norm())])
        data.frames.copy_(frames)
        if direct:
            direct.step(engine)
    return found


def tried(engine) -> dict[str, float | bool]:
    """What the model computes with in a validation, and whether that leaves everything as it was."""
    averages, before = averages_of(engine), (*parts(engine), list(computing(engine).values()))
    with engine.average.in_use(engine):
        inside = computing(engine)
    after = (*parts(engine), list(computing(engine).values()))
    same = all(
        torch.equal(bits(a), bits(b))
        for now, then in zip(after, before, strict=True)
        for a, b in zip(now, then, strict=True)
    )
    rounded = [averages[name].to(inside[name].dtype) for name in averages]
    return {
        "inside_differs_by": differ_by([inside[name] for name in averages], rounded),
        "changed": largest(not same),
        "moved_by": largest(differ_by(*before[:2])),
    }


def results(folder: Path, rank: int, world: int, whole: bool) -> dict[str, dict]:
    """By way; called on every rank. whole: not only what is run often."""
    found: dict[str, dict] = {}
    for name in WAYS[world]:
        if not (whole or name in OFTEN[world]):
            continue
        engine, train, way = averaging(name, world)
        direct, bad, steps = Direct(engine), way.get("bad", False), 3 if way.get("bad") else STEPS
        losses = go(engine, train, rank, world, range(HALF), direct, bad)
        found[name] = tried(engine)
        if not bad:
            frozen = {FROZEN: {}} if engine.module.left_out else {}
            save(engine, folder / f"averages {world} {name}", HALF, extra=frozen)
        losses += go(engine, train, rank, world, range(HALF, steps), direct)
        found[name] |= {
            "losses": losses,
            "differs_by": largest(direct.differs_by),
            "updates": int(engine.average.updates),
        }
        last = averages_of(engine)
        if rank == 0:
            torch.save(last, folder / f"last {world} {name}.pt")
        engine.destroy()
    dist.barrier()
    for name, (ranks, source, own) in AGAIN[world].items():
        if not (whole or name in OFTEN[world]):
            continue
        engine, train, _ = averaging(own, world)
        run = folder / f"averages {ranks} {source}"
        at = restore(engine, run)["step"]
        stored = load_file(run / "checkpoints" / tag_of(HALF) / EMA)
        read = {n.removeprefix("model."): tensor for n, tensor in averages_of(engine).items()}
        same = all(torch.equal(read[n].reshape(tensor.shape), tensor) for n, tensor in stored.items())
        go(engine, train, rank, world, range(at, STEPS))
        expected, last = torch.load(folder / f"last {ranks} {source}.pt"), averages_of(engine)
        found[name] = {
            "read": same and read.keys() == stored.keys(),
            "differs_by": differ_by([last[n] for n in expected], list(expected.values())),
        }
        engine.destroy()
    return found

"""Ways to train, to stop in the middle, and to go on from the checkpoint of another way. See engines.py.

Two ranks take `COMMON`'s and `TWO`'s, one and four some of `COMMON`'s (`SOME`); one rank also `ONE`'s. `saved` ways write a checkpoint in the middle
and go on; `AGAIN` says which ways of which number of ranks go on from whose checkpoint. `OFTEN` has what is not left to the nightly tests.
"""

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from c4c.merging import NO_MERGING, Merging
from c4c.models.clip4clip import CLIP4Clip
from c4c.objective import LossOptions
from c4c.settings import EngineConfig, TrainConfig
from c4c.training.param_groups import choose_trained
from c4c.training.step import Learner, train_step
from c4c.zero.checkpoint import FROZEN
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
COMMON |= {
    f"ZeRO {stage}{kind}, sigmoid": {"zero_stage": stage, "loss": "sigmoid"} | more
    for stage, kind, more in ((0, "", {}), (1, "", {}), (3, "", {}), (2, ", cached", {"passes": 2}))
}
# what train.* says beside the loss: two captions a video, smoothed, without false negatives, with decorrelated channels
OPTIONS = {"captions_per_video": 2, "label_smoothing": 0.1, "mask_equal_captions": True, "decorrelation": 0.02}
COMMON |= {
    f"ZeRO {stage}{kind}, options": {"zero_stage": stage, "train": OPTIONS} | more
    for stage, kind, more in ((0, "", {}), (1, ", cached", {"passes": 2}), (2, "", {}), (3, ", cached", {"passes": 2}))
}
COMMON |= {
    f"ZeRO {stage}, seqWTI": {"zero_stage": stage, "head": "seqWTI", "train": OPTIONS} | more
    for stage, more in ((0, {}), (3, {"passes": 2}))
}
MERGING = Merging(tokens=1, joins=(1,))
COMMON |= {
    f"ZeRO {stage}{kind}, merging": {"zero_stage": stage, "merging": MERGING} | more
    for stage, kind, more in (
        (0, "", {}), (1, ", cached", {"passes": 2}), (2, "", {}), (3, "", {}), (3, ", cached", {"passes": 2, "activation_checkpointing": True})
    )
}  # fmt: skip
# what one rank takes: what others are compared with, and the ends of the scale; what four take: each kind once at least
SOME = {
    1: ["ZeRO 0", "ZeRO 1", "ZeRO 3", "ZeRO 2, cached", "ZeRO 0, accumulated", "ZeRO 0, sigmoid", "ZeRO 3, sigmoid", "ZeRO 0, options",
        "ZeRO 3, cached, options", "ZeRO 0, merging", "ZeRO 3, merging", "ZeRO 0, seqWTI"],
    2: list(COMMON),
    4: ["ZeRO 0", "ZeRO 1", "ZeRO 3", "ZeRO 1, cached", "ZeRO 3, cached", "ZeRO 2, accumulated", "ZeRO 3, sigmoid", "ZeRO 2, cached, sigmoid",
        "ZeRO 2, options", "ZeRO 3, cached, options", "ZeRO 3, cached, merging"],
}  # fmt: skip
BF16 = {f"ZeRO {stage}, bf16": {"zero_stage": stage, "precision": "bf16"} for stage in range(4)}
FP16 = {f"ZeRO {stage}, fp16": {"zero_stage": stage, "precision": "fp16", "scale": 4} for stage in range(4)}
TORCHS = {
    "torch's, ZeRO 0": {"zero_stage": 0, "torchs": True},
    "torch's, ZeRO 2": {"zero_stage": 2, "torchs": True},
    "torch's, ZeRO 3": {"zero_stage": 3, "torchs": True},
    "torch's, ZeRO 1, bf16": {"zero_stage": 1, "precision": "bf16", "torchs": True},
    "torch's, ZeRO 2, bf16": {"zero_stage": 2, "precision": "bf16", "torchs": True},
}
LORA = {"lora": 4, "lora_on": "all", "freeze": ("video.blocks.0",)}
PROMPTS = {"prompts": 3}
CHEAP = {  # checkpoints without what is frozen
    **{f"LoRA, ZeRO {stage}": {"zero_stage": stage, "train": LORA} for stage in range(4)},
    "LoRA, ZeRO 1, bf16": {"zero_stage": 1, "train": LORA, "precision": "bf16"},
    "LoRA, ZeRO 2, cached": {"zero_stage": 2, "train": LORA, "passes": 2},
    "LoRA, ZeRO 3, cached": {"zero_stage": 3, "train": LORA, "passes": 2},
    "LoRA, ZeRO 3, checkpointing": {"zero_stage": 3, "train": LORA, "activation_checkpointing": True},
    "LoRA, ZeRO 3, bf16": {"zero_stage": 3, "train": LORA, "precision": "bf16"},
    "LoRA, ZeRO 2, fp16": {"zero_stage": 2, "train": LORA, "precision": "fp16", "scale": 4},
    **{f"prompts, ZeRO {stage}": {"zero_stage": stage, "train": PROMPTS} for stage in range(4)},
    "prompts, ZeRO 2, cached": {"zero_stage": 2, "train": PROMPTS, "passes": 2},
    "prompts, ZeRO 3, checkpointing": {"zero_stage": 3, "train": PROMPTS, "activation_checkpointing": True},
    "prompts, ZeRO 1, bf16": {"zero_stage": 1, "train": PROMPTS, "precision": "bf16"},
    "text frozen, ZeRO 0": {"zero_stage": 0, "train": {"freeze": "text"}},
    "text frozen, ZeRO 3": {"zero_stage": 3, "train": {"freeze": "text"}},
    "by layer, ZeRO 0": {"zero_stage": 0, "train": {"layer_decay": 0.5}},
    "by layer, ZeRO 1": {"zero_stage": 1, "train": {"layer_decay": 0.5}},
    "by layer, ZeRO 3": {"zero_stage": 3, "train": {"layer_decay": 0.5}},
}
ONE = {  # in bf16, where one rank runs without ZeRO
    "alone, bf16": {"zero_stage": 1, "precision": "bf16"},
    "alone, bf16, cached": {"zero_stage": 1, "precision": "bf16", "passes": 2},
    "alone, bf16, torch's": {"zero_stage": 1, "precision": "bf16", "torchs": True},
    "alone, tightTransf": {"zero_stage": 1, "head": "tightTransf"},  # no temperature, so one weight has no gradient
    "ZeRO kept, bf16": {"zero_stage": 1, "precision": "bf16", "kept": True},
    "ZeRO kept, bf16, cached": {"zero_stage": 1, "precision": "bf16", "passes": 2, "kept": True},
    "bad, alone, bf16": {"zero_stage": 1, "precision": "bf16", "bad": True},
    "bad, alone, bf16, torch's": {"zero_stage": 1, "precision": "bf16", "torchs": True, "bad": True},
}
TWO = BF16 | FP16 | TORCHS | CHEAP | {
    "offload": {"zero_stage": 2, "offload": "optimizer"},
    "offload all": {"zero_stage": 3, "offload": "all"},
    "frozen": {"zero_stage": 3, "frozen": True},
    "ZeRO 1, fp16, sigmoid": {"zero_stage": 1, "precision": "fp16", "scale": 4, "loss": "sigmoid"},
    "unused bias": {"zero_stage": 3, "bias": True},
    "activation checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
    **{f"bad, ZeRO {stage}": {"zero_stage": stage, "bad": True} for stage in range(4)},
    **{f"search, ZeRO {stage}, fp16": {"zero_stage": stage, "precision": "fp16", "scale": 15} for stage in range(4)},
    **{f"bad, ZeRO {stage}, bf16": {"zero_stage": stage, "precision": "bf16", "bad": True} for stage in (0, 1, 3)},
    "bad, torch's, ZeRO 1, bf16": TORCHS["torch's, ZeRO 1, bf16"] | {"bad": True},
}  # fmt: skip
SAVED = {
    1: ["ZeRO 1", "alone, bf16", "alone, bf16, torch's", "alone, tightTransf"],
    2: [*(f"ZeRO {stage}" for stage in range(4)), *BF16, *FP16, *TORCHS, "offload", "offload all", "frozen", "ZeRO 1, cached",
        "ZeRO 2, accumulated", "LoRA, ZeRO 0", "LoRA, ZeRO 3", "LoRA, ZeRO 1, bf16", "prompts, ZeRO 3", "text frozen, ZeRO 3", "by layer, ZeRO 1",
        "ZeRO 1, sigmoid", "ZeRO 3, sigmoid", "unused bias", "ZeRO 2, options", "ZeRO 3, merging", "ZeRO 3, seqWTI"],
    4: [],
}  # fmt: skip
# ranks: {name: (ranks of the checkpoint, its way, the way to go on)}
AGAIN: dict[int, dict[str, tuple[int, str, str]]] = {
    1: {f"2 -> 1, {way}": (2, way, way) for way in ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 2, accumulated")}
    | {f"again, {way}": (1, way, way) for way in SAVED[1]}
    | {
        "alone, bf16 -> torch's": (1, "alone, bf16", "alone, bf16, torch's"),
        "torch's -> alone, bf16": (1, "alone, bf16, torch's", "alone, bf16"),
        "2 -> 1, LoRA, ZeRO 3": (2, "LoRA, ZeRO 3", "LoRA, ZeRO 2"),
        "2 -> alone, bf16": (2, "ZeRO 1, bf16", "alone, bf16"),
    },
    2: {f"again, {way}": (2, way, way) for way in SAVED[2]}
    | {
        f"{a} -> {b}": (2, a, b)
        for a, b in (("ZeRO 1", "ZeRO 3"), ("ZeRO 3", "ZeRO 0"), ("ZeRO 0", "ZeRO 2"), ("ZeRO 2", "offload"),
                     ("ZeRO 1, bf16", "ZeRO 0, bf16"), ("ZeRO 1, bf16", "torch's, ZeRO 1, bf16"),
                     ("LoRA, ZeRO 0", "LoRA, ZeRO 3"), ("LoRA, ZeRO 3", "LoRA, ZeRO 1"), ("prompts, ZeRO 3", "prompts, ZeRO 0"), ("text frozen, ZeRO 3", "text frozen, ZeRO 0"),
                     ("torch's, ZeRO 2, bf16", "ZeRO 2, bf16"), ("torch's, ZeRO 3", "ZeRO 0"), ("ZeRO 0", "torch's, ZeRO 3"),
                     ("ZeRO 1, sigmoid", "ZeRO 3, sigmoid"))
    },
    4: {
        "1 -> 4, ZeRO 1": (1, "ZeRO 1", "ZeRO 1"),
        "1 -> 4, ZeRO 1 -> ZeRO 3": (1, "ZeRO 1", "ZeRO 3"),
        "1 -> 4, alone, bf16 -> ZeRO 1, bf16": (1, "alone, bf16", "ZeRO 1, bf16"),
        "2 -> 4, ZeRO 3 -> ZeRO 2": (2, "ZeRO 3", "ZeRO 2"),
        "2 -> 4, options": (2, "ZeRO 2, options", "ZeRO 3, cached, options"),
        "2 -> 4, sigmoid": (2, "ZeRO 3, sigmoid", "ZeRO 1, sigmoid"),
    },
}  # fmt: skip
# by ranks: the ways and continuations that make test runs, of most kinds one; the nightly tests run all
OFTEN = {
    1: {"ZeRO 0", "ZeRO 0, accumulated", "ZeRO 0, sigmoid", "ZeRO 0, options", "ZeRO 0, merging", "ZeRO 0, seqWTI", "alone, bf16", "alone, bf16, cached", "alone, bf16, torch's",
        "ZeRO kept, bf16", "ZeRO kept, bf16, cached", "bad, alone, bf16", "2 -> 1, ZeRO 3", "again, alone, bf16"},
    2: {*(f"ZeRO {stage}" for stage in range(4)), "ZeRO 3, cached", "ZeRO 2, accumulated", "ZeRO 3, sigmoid", "ZeRO 2, options", "ZeRO 3, seqWTI",
        "ZeRO 1, cached, merging", "ZeRO 1, bf16", "ZeRO 3, bf16", "ZeRO 2, fp16", "torch's, ZeRO 1, bf16", "LoRA, ZeRO 0", "LoRA, ZeRO 3",
        "activation checkpointing", "bad, ZeRO 1", "bad, ZeRO 3", "again, ZeRO 1", "again, ZeRO 3", "again, ZeRO 2, fp16", "again, LoRA, ZeRO 3",
        "ZeRO 3 -> ZeRO 0"},
    4: {"ZeRO 3, cached", "2 -> 4, ZeRO 3 -> ZeRO 2"},
}  # fmt: skip


def ways(world: int) -> dict[str, dict]:
    return {name: COMMON[name] for name in SOME[world]} | {1: ONE, 2: TWO}.get(world, {})


def engine_of(way: dict, world: int):
    torch.nn.functional.linear = LINEAR  # DeepSpeed's stage 3 leaves one in its place that rounds otherwise
    torch.manual_seed(3)
    model = CLIP4Clip(
        SPEC, way.get("head", "seqTransf"), "2d", blocks=2, segments=FRAMES, merging=way.get("merging", NO_MERGING)
    )
    if way.get("bias"):
        model.add_bias()
    if way.get("frozen"):
        model.clip.visual.requires_grad_(False)
    micro = ROWS // world // way["passes"] if "passes" in way else 0
    more = {"accumulate": way.get("accumulate", 1), "loss": way.get("loss", "cross_entropy")} | way.get("train", {})
    train = TrainConfig(batch_size=ROWS, micro_batch_size=micro, lr=1e-3, **more)
    choose_trained(model, train)
    learner = Learner(model, train.loss, options=LossOptions.of(train))
    if train.partial:
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        learner.left_out = frozenset(model.state_dict()) - trained
    own = (
        "passes",
        "accumulate",
        "frozen",
        "bad",
        "scale",
        "torchs",
        "kept",
        "train",
        "loss",
        "bias",
        "head",
        "merging",
    )
    known = {k: v for k, v in way.items() if k not in own}
    config = EngineConfig(**{"precision": "fp32"} | known)
    get_accelerator().is_fp16_supported = lambda: True  # it is, only slow
    extra: dict = {"fp16": {"initial_scale_power": way["scale"], "hysteresis": 1}} if "scale" in way else {}
    extra |= {"optimizer": {"params": {"torch_adam": True}}} if "torchs" in way else {}
    extra |= {"zero_optimization": {"stage": way["zero_stage"]}} if "kept" in way else {}
    gc.freeze()  # DeepSpeed collects for each engine, and would look through all that there is
    return build_engine(learner, config, train, world, extra), train


def go(engine, train: TrainConfig, rank: int, world: int, first: int, last: int, bad: bool = False) -> list:
    """[loss, norm of the gradient before clipping] of each step; Adam and clipping hide a gradient of wrong size."""
    data, found = batch(rank, world, train.captions_per_video), []
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


def results(folder: Path, rank: int, world: int, whole: bool) -> dict[str, list]:
    """By way; called on every rank. whole: not only what is run often."""
    found = {}
    for name, way in ways(world).items():
        if not (whole or name in OFTEN[world]):
            continue
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
            frozen = {FROZEN: {}} if engine.module.left_out else {}
            save(engine, folder / f"{world} {name}", HALF, extra=frozen)
        found[name] = first + go(engine, train, rank, world, HALF, STEPS)
        engine.destroy()
    dist.barrier()
    for name, (ranks, source, way) in AGAIN[world].items():
        if not (whole or name in OFTEN[world]):
            continue
        engine, train = engine_of((COMMON | TWO | ONE)[way], world)
        torch.manual_seed(99)
        state = restore(engine, folder / f"{ranks} {source}")
        found[name] = go(engine, train, rank, world, state["step"], STEPS)
        engine.destroy()
    return found

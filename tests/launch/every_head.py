"""Every head at every ZeRO stage, and gradient caching with those that need it most, on tensors drawn here.

For each way: the losses and norms of the gradient of all steps, and how far the checkpoint's scores are from the engine's. See engines.py.
"""

import gc
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml
from deepspeed.accelerator import get_accelerator

from c4c.models import caption_rows
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.objective import LossOptions
from c4c.settings import EngineConfig, TrainConfig
from c4c.training.run_folder import save_description
from c4c.training.step import MAX_LOGIT, Learner, train_step
from c4c.training.teacher import Teacher
from c4c.zero.engine import build_engine
from c4c.zero.snapshot import save

ROWS, FRAMES, STEPS = 8, 3, 4
SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}


def batch(rank: int, world: int, captions: int = 1) -> SimpleNamespace:
    """This rank's share of one global batch whose last row is padding, on its device. captions: a row, 1 or 2."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=random)
    mask = torch.arange(FRAMES) < torch.randint(1, FRAMES + 1, (ROWS, 1), generator=random)
    tokens = torch.randint(1, 998, (ROWS, 6), generator=random)
    tokens[:, 4], tokens[:, 5] = 999, 0
    more = torch.randint(1, 998, tokens.shape, generator=random)
    more[:, 3], more[:, 4:] = 999, 0
    more[1], more[5] = tokens[4], tokens[6]  # words that were also said of other videos
    several = torch.stack([tokens, more], dim=1)
    valid = torch.arange(ROWS) < ROWS - 1
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    tensors = {"frames": frames, "frame_mask": mask, "tokens": tokens, "valid": valid}
    if captions > 1:
        present = valid[:, None] & (torch.arange(captions) < torch.tensor([2, 2, 1, 2, 2, 2, 1, 2])[:, None])
        tensors |= {"tokens": several, "caption_mask": present}
    device = get_accelerator().current_device_name()
    return SimpleNamespace(**{name: tensor[mine].to(device) for name, tensor in tensors.items()})


def with_bytes(data: SimpleNamespace) -> SimpleNamespace:
    """The same with bytes for frames, and captions that have padding and are equal in part."""
    device, random = data.frames.device, torch.Generator().manual_seed(4)
    shape = (*data.frame_mask.shape, 32, 32, 3)
    data.frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(device)
    data.tokens = torch.nn.functional.pad(data.tokens, (0, 14))
    data.tokens[1] = data.tokens[0]
    data.tokens_on_host = data.tokens.cpu()
    return data


def train(way: dict, folder: Path, rank: int, world: int) -> dict:
    torch.manual_seed(3)
    model = CLIP4Clip(SPEC, way["head"], way.get("patch", "2d"), blocks=2, segments=FRAMES)
    with torch.no_grad():
        model.clip.logit_scale.fill_(way.get("logit_scale", model.clip.logit_scale.item()))
    loss = way.get("loss", "cross_entropy")
    settings = TrainConfig(
        batch_size=ROWS,
        micro_batch_size=way.get("micro", 0),
        lr=1e-3,
        warmup_epochs=0,
        loss=loss,
        **way.get("train", {}),
    )
    config = EngineConfig(precision="fp32", zero_stage=way["stage"], **way.get("engine", {}))
    learner = Learner(model, loss, -4.0, LossOptions.of(settings))
    if "teacher" in way:
        teacher = Teacher(way["teacher"], CLIP4Clip(SPEC, way["teacher"], blocks=2, segments=FRAMES))
        learner.teacher = teacher.to(get_accelerator().current_device_name(), torch.float32)
    gc.freeze()  # DeepSpeed collects for each engine, and would look through all that there is
    engine = build_engine(learner, config, settings, world, way.get("deepspeed", {}))
    data, losses, norms = batch(rank, world, settings.captions_per_video), [], []
    data = with_bytes(data) if way.get("bytes") else data
    for _ in range(STEPS):
        loss = train_step(engine, data, 1.0, settings)
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
        norms.append(float(engine.get_global_grad_norm()))
    out = {"losses": losses, "norms": norms}
    if way.get("save"):
        engine.eval()
        with torch.no_grad():
            text, video = engine(data.frames, data.frame_mask, data.tokens)
            scores = engine.module.model.head.score(text, video)
        save(engine, folder, STEPS, keep_last=1)
        if rank == 0:
            settings = {
                "model": {"backbone": "ViT-demo-16", "head": way["head"], "linear_patch": "2d", "head_layers": 2}
            }
            save_description(folder, yaml.safe_dump(settings | {"data": {"num_frames": FRAMES}}), model.spec)
            again = CLIP4Clip.from_checkpoint(folder)
            out["logit_scale"] = again.clip.logit_scale.item()
            out["logit_bias"] = None if again.clip.logit_bias is None else again.clip.logit_bias.item()
            with torch.no_grad():
                texts, videos = again(data.frames.cpu(), data.frame_mask.cpu(), data.tokens.cpu())
                out["checkpoint_differs_by"] = float((again.head.score(texts, videos) - scores.cpu()).abs().max())
        dist.barrier()
    engine.destroy()
    return out


def _ways() -> dict[str, dict]:
    ways = {
        f"{head}, ZeRO {stage}": {"head": head, "stage": stage, "save": True}
        for head in sorted(HEADS)
        for stage in range(4)
    }
    for head in ("tightTransf", "wti"):  # their own weights score pairs
        for stage in range(4):
            ways[f"{head}, ZeRO {stage}, cached"] = {"head": head, "stage": stage, "micro": 3}
    ways["meanP 3d, ZeRO 2"] = {"head": "meanP", "stage": 2, "patch": "3d"}
    few = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    for name, more in {
        "tightTransf": {f"ZeRO {stage}": {"stage": stage} for stage in range(4)}
        | {"ZeRO 2, cached": {"stage": 2, "micro": 3}},
        "wti": {"ZeRO 0": {"stage": 0}, "ZeRO 1, cached": {"stage": 1, "micro": 3}},
    }.items():  # few: weights at once
        more |= {f"ZeRO 3, few{cached}": {"stage": 3, "micro": micro, "deepspeed": {"zero_optimization": few}}
                 for cached, micro in (("", 0), (", cached", 3))}  # fmt: skip
        for kind, way in more.items():
            ways[f"{name}, {kind}, sigmoid"] = {"head": name, "loss": "sigmoid", "save": "cached" not in kind} | way
    options = {"captions_per_video": 2, "label_smoothing": 0.1, "mask_equal_captions": True, "decorrelation": 0.02}
    for stage in range(4):
        for cached, micro in (("", 0), (", cached", 3)):
            ways[f"wti, ZeRO {stage}, options{cached}"] = {
                "head": "wti",
                "stage": stage,
                "micro": micro,
                "train": options,
            }
    for stage, micro in ((0, 0), (1, 3), (2, 0), (3, 0), (3, 3)):
        way = {"head": "meanP", "stage": stage, "micro": micro, "teacher": "wti"}
        ways[f"meanP, ZeRO {stage}, taught{', cached' * bool(micro)}"] = way
    short = dict.fromkeys(("fold_pixels", "trim_captions", "share_captions"), True)
    for kind in ("2d", "3d"):
        plain = {"head": "wti", "patch": kind, "bytes": True, "train": options}
        ways[f"{kind}, long"] = plain | {"stage": 0}
        for stage in range(4):
            for cached, micro in (("", 0), (", cached", 3)):
                ways[f"{kind}, short, ZeRO {stage}{cached}"] = plain | {"stage": stage, "micro": micro, "engine": short}
    for stage in range(4):
        ways[f"hot, ZeRO {stage}"] = {"head": "meanP", "stage": stage, "logit_scale": MAX_LOGIT + 1, "save": True}
    return ways


WAYS = _ways()
# what is not left to the nightly tests: most kinds without ZeRO, and at the stage that differs most from that
OFTEN = {f"{head}, ZeRO {stage}" for head in ("meanP", "tightTransf", "wti") for stage in (0, 3)} | {
    "tightTransf, ZeRO 3, cached", "tightTransf, ZeRO 0, sigmoid", "tightTransf, ZeRO 3, few, sigmoid", "wti, ZeRO 0, options", "wti, ZeRO 2, options, cached",
    "meanP, ZeRO 0, taught", "meanP, ZeRO 3, taught, cached", "2d, long", "2d, short, ZeRO 3", "hot, ZeRO 3",
}  # fmt: skip


def results(folder: Path, rank: int, world: int, whole: bool) -> dict[str, dict]:
    """By way; called on every rank. whole: not only what is run often."""
    ways = {name: way for name, way in WAYS.items() if whole or name in OFTEN}
    with patch.object(caption_rows, "MULTIPLE", 2):  # small batches have something to gain then
        return {name: train(way, folder / name, rank, world) for name, way in ways.items()}

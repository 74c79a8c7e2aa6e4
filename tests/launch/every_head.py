"""Every head at every ZeRO stage, and gradient caching with those that need it most, on tensors drawn here.

For each way: the losses of all steps and how far the checkpoint's scores are from the engine's. See engines.py.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import yaml
from deepspeed.accelerator import get_accelerator

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.settings import EngineConfig, TrainConfig
from c4c.training.run_folder import save_description
from c4c.training.step import MAX_LOGIT, Learner, train_step
from c4c.zero.engine import build_engine
from c4c.zero.snapshot import save

ROWS, FRAMES, STEPS = 8, 3, 4
SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}


def batch(rank: int, world: int) -> SimpleNamespace:
    """This rank's share of one global batch whose last row is padding, on its device."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=random)
    mask = torch.arange(FRAMES) < torch.randint(1, FRAMES + 1, (ROWS, 1), generator=random)
    tokens = torch.randint(1, 998, (ROWS, 6), generator=random)
    tokens[:, 4], tokens[:, 5] = 999, 0
    valid = torch.arange(ROWS) < ROWS - 1
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    tensors = {"frames": frames, "frame_mask": mask, "tokens": tokens, "valid": valid}
    device = get_accelerator().current_device_name()
    return SimpleNamespace(**{name: tensor[mine].to(device) for name, tensor in tensors.items()})


def train(way: dict, folder: Path, rank: int, world: int) -> dict:
    torch.manual_seed(3)
    model = CLIP4Clip(SPEC, way["head"], way.get("patch", "2d"), blocks=2, segments=FRAMES)
    with torch.no_grad():
        model.clip.logit_scale.fill_(way.get("logit_scale", model.clip.logit_scale.item()))
    settings = TrainConfig(batch_size=ROWS, micro_batch_size=way.get("micro", 0), lr=1e-3, warmup_epochs=0)
    config = EngineConfig(precision="fp32", zero_stage=way["stage"])
    engine = build_engine(Learner(model), config, settings, world, {})
    data, losses = batch(rank, world), []
    for _ in range(STEPS):
        loss = train_step(engine, data, 1.0, settings)
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
    out = {"losses": losses}
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
            save_description(folder, yaml.safe_dump(settings | {"data": {"num_frames": FRAMES}}), SPEC)
            again = CLIP4Clip.from_checkpoint(folder)
            out["logit_scale"] = again.clip.logit_scale.item()
            with torch.no_grad():
                texts, videos = again(data.frames.cpu(), data.frame_mask.cpu(), data.tokens.cpu())
                out["checkpoint_differs_by"] = float((again.head.score(texts, videos) - scores.cpu()).abs().max())
        dist.barrier()
    engine.destroy()
    return out


def results(folder: Path, rank: int, world: int) -> dict[str, dict]:
    """By way; called on every rank."""
    ways = {
        f"{head}, ZeRO {stage}": {"head": head, "stage": stage, "save": True}
        for head in sorted(HEADS)
        for stage in range(4)
    }
    for head in ("tightTransf", "wti"):  # their own weights score pairs
        for stage in range(4):
            ways[f"{head}, ZeRO {stage}, cached"] = {"head": head, "stage": stage, "micro": 3}
    ways["meanP 3d, ZeRO 2"] = {"head": "meanP", "stage": 2, "patch": "3d"}
    for stage in range(4):
        ways[f"hot, ZeRO {stage}"] = {"head": "meanP", "stage": stage, "logit_scale": MAX_LOGIT + 1, "save": True}
    return {name: train(way, folder / name, rank, world) for name, way in ways.items()}

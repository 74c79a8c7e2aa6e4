"""Runs whose checkpoints hold what was trained, made without training."""

from pathlib import Path

import torch

from c4c.config import Config, dump
from c4c.models import origin
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.export import files
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.param_groups import choose_trained
from c4c.training.run_folder import save_description
from c4c.zero import checkpoint
from c4c.zero.checkpoint import FROZEN, MODEL, OPTIMIZER
from pipelines.config import DataConfig

BACKBONE = "ViT-demo-16-small"


def write_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    files.write(build(ModelConfig(backbone=BACKBONE, init_from="scratch"), 4), None, path, official=False)
    return path


def config_of(source: object, image_size: int = 64, tag: str = "", **train) -> Config:
    model = ModelConfig(backbone=BACKBONE, init_from=str(source), init_tag=tag)
    data = DataConfig(num_frames=4, image_size=image_size)
    return Config(model=model, train=TrainConfig(**train), data=data)


def trained(run: Path, config: Config, step: int = 1) -> CLIP4Clip:
    """A model as it is after some steps, and its checkpoint in `run`."""
    model = build(config.model, 4, config.data.image_size)
    choose_trained(model, config.train)
    torch.manual_seed(step)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, float(weight.detach().mean()), 0.1)
    names = origin.left_out(model, config)
    about = {"step": step, "updates": step, "loss_scaler": {}}
    about |= {FROZEN: origin.describe(model, names, config.model)} if names else {}
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
    checkpoint.write(run, step, {MODEL: stored, OPTIMIZER: {"random.0.cpu": torch.zeros(1)}}, about)
    save_description(run, dump(config), model.spec)
    return model.eval()

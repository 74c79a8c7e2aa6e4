"""The model inside a DeepSpeed engine: one place derives DeepSpeed's configuration from ours."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.loss import contrastive_loss
from c4c.model import CLIP4Clip
from c4c.optim import TrainConfig, parameter_groups
from pipelines.order import rank_rows

PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    precision: str = "bf16"  # of weights and activations; masters, moments, similarities and losses are fp32
    zero_stage: int = 1  # 0 none, 1 optimizer states, 2 gradients, 3 weights are shared out over ranks
    clip_grad_norm: float = 1.0  # 0: off

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"engine.precision={self.precision}: there are {', '.join(PRECISIONS)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage={self.zero_stage}: there are 0, 1, 2 and 3")


class Learner(nn.Module):
    """Model and loss in one module, so that DeepSpeed's hooks see every weight that is used."""

    def __init__(self, model: CLIP4Clip):
        super().__init__()
        self.model = model
        # DeepSpeed 0.19 broadcasts weights as views of bytes, which a tensor without axes does not allow
        model.clip.logit_scale = nn.Parameter(model.clip.logit_scale.detach().reshape(1))

    def forward(self, frames: Tensor, frame_mask: Tensor, tokens: Tensor, valid: Tensor | None = None):
        """With `valid`: this rank's loss (see c4c.loss). Without: text features and videos, for evaluation."""
        text, video = self.model(frames, frame_mask, tokens)
        if valid is None:
            return text, video
        return contrastive_loss(text, video, valid, self.model.scale(), self.model.head.score)


def start_distributed() -> tuple[int, int, torch.device]:
    """Join the process group the launcher made, or make one of a single rank. Returns rank, world, device."""
    quiet_libraries()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # a virtual environment that is not activated still has ninja, with which DeepSpeed compiles its optimizers
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    else:
        local_world = int(os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """DeepSpeed's log lines are for its developers; its warnings and errors stay."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find, less a warning
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


def deepspeed_config(engine: EngineConfig, train: TrainConfig, world: int, extra: dict) -> dict:
    """DeepSpeed's configuration: ours, with `extra` (the yaml's `deepspeed:` block) on top.

    Raises ValueError where `extra` contradicts what one of our keys decides, and if the batch cannot be shared out evenly.
    """
    derived = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": rank_rows(train.batch_size, 0, world).stop,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": engine.clip_grad_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.lr, "betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay},
        },
    }
    owners = {
        "train_batch_size": "train.batch_size",
        "train_micro_batch_size_per_gpu": "train.batch_size and the number of ranks",
        "gradient_accumulation_steps": "train.batch_size (a contrastive loss cannot be accumulated)",
        "gradient_clipping": "engine.clip_grad_norm",
        "zero_optimization.stage": "engine.zero_stage",
        "bf16.enabled": "engine.precision",
        "fp16.enabled": "engine.precision",
        "optimizer.params.lr": "train.lr",
        "optimizer.params.betas": "train.betas",
        "optimizer.params.eps": "train.eps",
        "optimizer.params.weight_decay": "train.weight_decay",
        "scheduler": "train.lr and train.warmup_epochs",
    }
    for path, owner in owners.items():
        given, ours = _at(extra, path), _at(derived, path)
        if given is not None and given != ours:
            raise ValueError(f"deepspeed.{path}={given} contradicts {owner}, which makes it {ours}: set only {owner}")
    return _over({"steps_per_print": 10**12, "wall_clock_breakdown": False} | derived, extra)


def build_engine(learner: Learner, config: EngineConfig, train: TrainConfig, world: int, extra: dict):
    """A DeepSpeed engine around `learner`, with fused AdamW."""
    import deepspeed

    if config.zero_stage == 3:  # used by CLIP4Clip itself and owned by its `clip`: DeepSpeed has to be told
        for parameter in learner.model.clip.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(learner.model, parameter)
    engine, *_ = deepspeed.initialize(
        model=learner,
        model_parameters=parameter_groups(learner, train.weight_decay),
        config=deepspeed_config(config, train, world, extra),
    )
    return engine


def set_lr(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _at(tree: dict, path: str):
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _over(base: dict, extra: dict) -> dict:
    out = dict(base)
    for key, value in extra.items():
        out[key] = _over(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

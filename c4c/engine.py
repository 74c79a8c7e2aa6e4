"""The model inside a DeepSpeed engine: one place derives DeepSpeed's configuration from ours."""

import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.loss import contrastive_loss
from c4c.model import MAX_SCALE, CLIP4Clip
from c4c.optim import TrainConfig, parameter_groups
from pipelines.order import rank_rows

PRECISIONS = ("bf16", "fp16", "fp32")
MAX_LOGIT = math.log(MAX_SCALE)


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
        temperature = model.clip.logit_scale
        model.clip.logit_scale = nn.Parameter(temperature.detach().reshape(1), requires_grad=temperature.requires_grad)

    def forward(
        self,
        frames: Tensor | None,
        frame_mask: Tensor | None,
        tokens: Tensor | None,
        valid: Tensor | None = None,
        pull: "Pull | None" = None,
    ):
        """With `valid`: this rank's loss (see c4c.loss). Without: what stands for texts and videos, for evaluation.

        With `pull`, a micro-batch of gradient caching: a number whose gradient is the loss's (see `_cached_step`); without
        frames, the loss of `pull.whole`.
        """
        if frames is None:
            return self._loss(*pull.whole)
        text, video = self.model(frames, frame_mask, tokens)
        if valid is None:
            return text, video
        if pull is None:
            return self._loss(text, video, valid)
        pulled = (text * pull.text).sum() + (video * pull.video).sum()
        return pulled if pull.whole is None else pulled + self._loss(*pull.whole)

    def _loss(self, text: Tensor, video: Tensor, valid: Tensor) -> Tensor:
        return contrastive_loss(text, video, valid, self.model.scale(), self.model.head.score)


@dataclass(frozen=True)
class Pull:
    """The loss's gradient at a micro-batch's features; in one of them, all features of this rank and `valid`."""

    text: Tensor | None
    video: Tensor | None
    whole: tuple[Tensor, Tensor, Tensor] | None = None


def train_step(engine, batch, factor: float, micro: int) -> Tensor:
    """One update of the weights, at `factor` times the peak learning rate; returns this rank's loss.

    micro: pairs encoded at once, 0 or at least this rank's share: all of it.
    """
    for group, lr in zip(engine.optimizer.param_groups, engine.module.peak_lrs, strict=True):
        group["lr"] = lr * factor
    if not micro or micro >= len(batch.valid):
        loss = engine(batch.frames, batch.frame_mask, batch.tokens, batch.valid)
        engine.backward(loss)
        engine.step()
    else:
        loss = _cached_step(engine, batch, micro)
    clamp_temperature(engine)
    return loss.detach()


def _cached_step(engine, batch, micro: int) -> Tensor:
    """Gradient caching (https://arxiv.org/abs/2101.06983): the whole global batch's negatives with the memory of `micro`.

    Encode everything without graphs; take the loss's gradient at the features; encode each micro-batch again and pull
    that gradient through. The head's own weights and the temperature get theirs in one of these passes: the last, when ZeRO
    exchanges gradients; under stage 3 the first, which alone overwrites what its buffers hold from the step before.
    """
    parts = [
        tuple(t[i : i + micro] for t in (batch.frames, batch.frame_mask, batch.tokens))
        for i in range(0, len(batch.valid), micro)
    ]
    learner = engine.module
    with torch.no_grad():
        texts, videos = (torch.cat(found) for found in zip(*(learner(*part) for part in parts), strict=True))
    texts.requires_grad_(), videos.requires_grad_()
    loss = learner(None, None, None, pull=Pull(None, None, (texts, videos, batch.valid)))
    text_grad, video_grad = torch.autograd.grad(loss, (texts, videos))
    whole = (texts.detach(), videos.detach(), batch.valid)
    scoring = 0 if engine.zero_optimization_stage() == 3 else len(parts) - 1
    for i, part in enumerate(parts):
        rows = slice(i * micro, (i + 1) * micro)
        pull = Pull(text_grad[rows], video_grad[rows], whole if i == scoring else None)
        engine.backward(engine(*part, batch.valid[rows], pull), scale_wrt_gas=False)
        engine.step()  # updates at the last one only
    return loss


def clamp_temperature(engine) -> None:
    """Keep CLIP's temperature at 1/100 or above in the master copy, wherever ZeRO has put it (CLIP4Clip does each step)."""
    from deepspeed import utils

    scale = engine.module.model.clip.logit_scale
    if not scale.requires_grad:
        return
    if hasattr(scale, "ds_id"):  # stage 3: each rank has a part, which may be padding
        part = utils.safe_get_local_fp32_param(scale)
        utils.safe_set_local_fp32_param(scale, part.clamp(max=MAX_LOGIT))
        return
    master = utils.safe_get_full_fp32_param(scale)
    if master is None:  # stage 0: each rank has its own
        scale.data.clamp_(max=MAX_LOGIT)
    elif float(master.max()) > MAX_LOGIT:
        utils.safe_set_full_fp32_param(scale, master.clamp(max=MAX_LOGIT))


def read_scale(engine) -> float:
    """What scores are multiplied by now; called on every rank, since under ZeRO 3 none has the whole weight."""
    import deepspeed

    model = engine.module.model
    with deepspeed.zero.GatheredParameters([model.clip.logit_scale], enabled=hasattr(model.clip.logit_scale, "ds_id")):
        return model.scale().item()


def start_distributed() -> tuple[int, int, torch.device]:
    """Join the process group the launcher made, or make one of a single rank. Returns rank, world, device."""
    quiet_libraries()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    _find_ninja()
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
    if sys.prefix != sys.base_prefix:  # environments that share compiled optimizers compile them over and over
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


def compile_ops() -> None:
    """Compile what DeepSpeed compiles at the first start on this machine: its exchange between ranks, its fused Adam."""
    quiet_libraries()
    from deepspeed.accelerator import get_accelerator

    _find_ninja()
    for name in ("ShareMemCommBuilder", "FusedAdamBuilder"):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None:
            builder.load(verbose=False)


def _find_ninja() -> None:
    """An environment that is not activated still has ninja, with which DeepSpeed compiles."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def deepspeed_config(engine: EngineConfig, train: TrainConfig, world: int, extra: dict) -> dict:
    """DeepSpeed's configuration: ours, with `extra` (the yaml's `deepspeed:` block) on top.

    Raises ValueError where `extra` contradicts what one of our keys decides, and if the batch cannot be shared out evenly.
    """
    rows = rank_rows(train.batch_size, 0, world).stop
    micro = min(train.micro_batch_size or rows, rows)
    passes = -(-rows // micro)  # of gradient caching; DeepSpeed counts them as accumulation
    derived = {
        "train_batch_size": micro * passes * world,  # our batch size, but for a last micro-batch that is not full
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": engine.clip_grad_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.lr,
                "betas": list(train.betas),
                "eps": train.eps,
                "weight_decay": train.weight_decay,
                "bias_correction": train.bias_correction,
            },
        },
    }
    owners = {
        "train_batch_size": "train.batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.micro_batch_size",
        "gradient_clipping": "engine.clip_grad_norm",
        "zero_optimization.stage": "engine.zero_stage",
        "bf16.enabled": "engine.precision",
        "fp16.enabled": "engine.precision",
        "optimizer.params.lr": "train.lr",
        "optimizer.params.betas": "train.betas",
        "optimizer.params.eps": "train.eps",
        "optimizer.params.weight_decay": "train.weight_decay",
        "optimizer.params.bias_correction": "train.bias_correction",
        "scheduler": "train.schedule",
    }
    for path, owner in owners.items():
        given, ours = _at(extra, path), _at(derived, path)
        if given is not None and given != ours:
            raise ValueError(f"deepspeed.{path}={given} contradicts {owner}, which makes it {ours}: set only {owner}")
    return _over({"steps_per_print": 10**12, "wall_clock_breakdown": False} | derived, extra)


def build_engine(learner: Learner, config: EngineConfig, train: TrainConfig, world: int, extra: dict):
    """A DeepSpeed engine around `learner`, with fused AdamW."""
    import deepspeed

    if config.zero_stage == 3:  # what is used outside the forward of the module that owns it: DeepSpeed has to be told
        model = learner.model
        for owner in (model.clip, model.head):
            for parameter in owner.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(model, parameter)
        deepspeed.zero.register_external_parameter(learner, model.clip.logit_scale)
    groups = parameter_groups(learner, train)
    learner.peak_lrs = [group["lr"] for group in groups]
    engine, *_ = deepspeed.initialize(
        model=learner,
        model_parameters=groups,
        config=deepspeed_config(config, train, world, extra),
    )
    return engine


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

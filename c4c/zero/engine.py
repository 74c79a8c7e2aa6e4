"""The model inside a DeepSpeed engine: one place derives DeepSpeed's configuration from ours."""

import math
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.losses import LOSSES, world_size
from c4c.models.clip4clip import MAX_SCALE, CLIP4Clip
from c4c.models.compiled import compile_towers
from c4c.settings import PRECISIONS, EngineConfig
from c4c.training.optim import TrainConfig, parameter_groups
from c4c.zero import state as zero
from c4c.zero.distributed import compile_ops, quiet_libraries, start_distributed, stop_distributed  # noqa: F401
from pipelines.pair_order import rank_rows

MAX_LOGIT = math.log(MAX_SCALE)


class Learner(nn.Module):
    """Model and loss in one module, so that DeepSpeed's hooks see every weight that is used."""

    def __init__(self, model: CLIP4Clip, loss: str = "cross_entropy"):
        super().__init__()
        self.model, self._criterion = model, LOSSES[loss]
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
        """With `valid`, as `_inputs` gives it: this rank's loss (see c4c.losses). Without: what stands for texts and videos,
        for evaluation.

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
        return self._criterion(text, video, valid, self.model.scale(), self.model.head.score)


def _inputs(batch, loss: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames, mask, tokens, and what of them is not padding: rows, bool [B]; for MIL-NCE captions, bool [B, bag]."""
    if loss != "mil_nce":
        return batch.frames, batch.frame_mask, batch.tokens, batch.valid
    tokens = batch.tokens if batch.tokens.dim() == 3 else batch.tokens[:, None]
    there = tokens[..., 0] != 0  # every caption begins with a start token
    return batch.frames, batch.frame_mask, tokens, batch.valid[:, None] & there


@dataclass(frozen=True)
class Pull:
    """The loss's gradient at a micro-batch's features; in one of them, all features of this rank and `valid`."""

    text: Tensor | None
    video: Tensor | None
    whole: tuple[Tensor, Tensor, Tensor] | None = None


def train_step(engine, batch, factor: float, train: TrainConfig, frozen: Collection[str] = ()) -> Tensor:
    """One update of the weights, at `factor` times the peak learning rate; returns this rank's loss.

    frozen: parts of the model (see c4c.training.optim.part_of) whose learning rate is 0 in this step.

    `applied` then tells whether the weights were changed: not where the loss or a gradient is not finite.
    """
    for group, lr, part in zip(engine.optimizer.param_groups, engine.module.peak_lrs, engine.module.parts, strict=True):
        group["lr"] = 0.0 if part in frozen else lr * factor
    inputs = _inputs(batch, train.loss)
    if train.accumulate > 1:
        loss = _accumulated_step(engine, inputs, train.accumulate)
    elif train.micro_batch_size and train.micro_batch_size < len(batch.valid):
        loss = _cached_step(engine, inputs, train.micro_batch_size)
    else:
        loss = engine(*inputs)
        _backward(engine, loss)
        engine.step()
    temperature = engine.module.model.clip.logit_scale
    if temperature.requires_grad:  # at 1/100 or above, as CLIP4Clip keeps it after each step
        zero.clamp(engine, temperature, MAX_LOGIT)
    return loss.detach()


def applied(engine) -> bool:
    """Whether the last step changed the weights. The same on every rank."""
    return not getattr(engine.optimizer, "overflow", False)


def _backward(engine, loss: Tensor) -> None:
    """Gradients of `loss` as it is, times fp16's loss scale.

    DeepSpeed 0.19 forgets that scale without ZeRO, though it divides by it later. And where it is given what the module
    returned, not something made of it, it divides by the number of passes even if told not to.
    """
    engine.backward(loss * zero.missing_scale(engine), scale_wrt_gas=False)


def _accumulated_step(engine, inputs: tuple, parts: int) -> Tensor:
    """Plain accumulation: `parts` smaller global batches, each with only its own negatives; one update with their mean."""
    rows = [slice(i, None, parts) for i in range(parts)]  # in turn, so that padding at the end is shared out
    valid = inputs[-1].flatten(1).any(dim=1) if inputs[-1].dim() > 1 else inputs[-1]
    counts = torch.stack([valid[r].sum() for r in rows]).float()
    if world_size() > 1:
        dist.all_reduce(counts)
    shares, whole = counts / counts.sum(), 0.0
    for r, share in zip(rows, shares, strict=True):
        loss = engine(*(t[r] for t in inputs)) * share
        _backward(engine, loss)
        engine.step()  # updates at the last one only
        whole = whole + loss.detach()
    return whole


def _cached_step(engine, inputs: tuple, micro: int) -> Tensor:
    """Gradient caching (https://arxiv.org/abs/2101.06983): the whole global batch's negatives with the memory of `micro`.

    Encode everything without graphs; take the loss's gradient at the features; encode each micro-batch again and pull
    that gradient through. The head's own weights and the temperature get theirs in one of these passes: the last, when ZeRO
    exchanges gradients; under stage 3 the first, which alone overwrites what its buffers hold from the step before.
    """
    *encoded, valid = inputs
    parts = [tuple(t[i : i + micro] for t in encoded) for i in range(0, len(valid), micro)]
    learner = engine.module
    with torch.no_grad():
        texts, videos = (torch.cat(found) for found in zip(*(learner(*part) for part in parts), strict=True))
    texts.requires_grad_(), videos.requires_grad_()
    loss = learner(None, None, None, pull=Pull(None, None, (texts, videos, valid)))
    text_grad, video_grad = torch.autograd.grad(loss, (texts, videos))
    whole = (texts.detach(), videos.detach(), valid)
    scoring = 0 if engine.zero_optimization_stage() == 3 else len(parts) - 1
    for i, part in enumerate(parts):
        rows = slice(i * micro, (i + 1) * micro)
        pull = Pull(text_grad[rows], video_grad[rows], whole if i == scoring else None)
        _backward(engine, engine(*part, valid[rows], pull))
        engine.step()  # updates at the last one only
    return loss


def read_scale(engine) -> float:
    """What scores are multiplied by now; called on every rank, since under ZeRO 3 none has the whole weight."""
    import deepspeed

    model = engine.module.model
    with deepspeed.zero.GatheredParameters([model.clip.logit_scale], enabled=hasattr(model.clip.logit_scale, "ds_id")):
        return model.scale().item()


def deepspeed_config(engine: EngineConfig, train: TrainConfig, world: int, extra: dict) -> dict:
    """DeepSpeed's configuration: ours, with `extra` (the yaml's `deepspeed:` block) on top.

    In fp32 and without offload a single rank runs as stage 0 where 1 or 2 is asked for: it is the same, in less time.
    Raises ValueError where `extra` contradicts what one of our keys decides, and if the batch cannot be shared out evenly.
    """
    rows = rank_rows(train.batch_size, 0, world).stop
    if rows % train.accumulate:
        raise ValueError(f"train.accumulate={train.accumulate} does not divide the {rows} pairs of a rank evenly")
    micro = rows // train.accumulate if train.accumulate > 1 else min(train.micro_batch_size or rows, rows)
    passes = -(-rows // micro)  # gradient caching's too are accumulation to DeepSpeed
    held = "train.accumulate" if train.accumulate > 1 else "train.micro_batch_size"
    offload = {"offload_optimizer": {"device": "cpu"}} if engine.offload != "none" else {}
    offload |= {"offload_param": {"device": "cpu"}} if engine.offload == "all" else {}
    # one rank has nobody to share with, and ZeRO would copy every gradient and weight in each step all the same
    alone = world == 1 and engine.precision == "fp32" and engine.offload == "none" and "zero_optimization" not in extra
    stage = 0 if alone and engine.zero_stage < 3 else engine.zero_stage
    derived = {
        "train_batch_size": micro * passes * world,  # our batch size, but for a last micro-batch that is not full
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": engine.clip_grad_norm,
        "zero_optimization": {"stage": stage} | offload,
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
        "train_micro_batch_size_per_gpu": held,
        "gradient_accumulation_steps": held,
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
    if engine.offload != "none":
        owners |= {f"zero_optimization.{part}.device": "engine.offload" for part in offload}
    for key, given in extra.items():
        if isinstance(derived.get(key), dict) and not isinstance(given, dict):
            raise ValueError(
                f"deepspeed.{key}={given}: it is a group of settings, such as deepspeed.{key}.{next(iter(derived[key]))}"
            )
    for path, owner in owners.items():
        given, ours = _at(extra, path), _at(derived, path)
        if given is not None and given != ours:
            raise ValueError(f"deepspeed.{path}={given} contradicts {owner}, which makes it {ours}: set only {owner}")
    return _over({"steps_per_print": 10**12, "wall_clock_breakdown": False} | derived, extra)


def build_engine(learner: Learner, config: EngineConfig, train: TrainConfig, world: int, extra: dict):
    """A DeepSpeed engine around `learner`, with fused AdamW."""
    import deepspeed

    model = learner.model
    if config.zero_stage == 3:  # what is used outside the forward of the module that owns it: DeepSpeed has to be told
        for owner in (model.clip, model.head):
            for parameter in owner.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(model, parameter)
        deepspeed.zero.register_external_parameter(learner, model.clip.logit_scale)
    model.clip.set_grad_checkpointing(config.activation_checkpointing)
    groups = parameter_groups(learner, train)
    learner.peak_lrs = [group["lr"] for group in groups]
    learner.parts = [group.pop("part") for group in groups]
    settings = deepspeed_config(config, train, world, extra)
    _try(settings, config, extra)
    try:
        engine, *_ = deepspeed.initialize(model=learner, model_parameters=groups, config=settings)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        if (said := _not_compiled(error)) is None:
            raise
        raise ValueError(said) from error
    if world == 1:
        engine.buffered_allreduce_fallback = lambda *_, **__: None  # there and back, without a rank to add anything
    if engine.optimizer is engine.basic_optimizer:
        _guard(engine, engine.gradient_clipping())
    if hasattr(engine.optimizer, "fp32_groups_flat"):  # it has taken one step with gradients of 0, decay and all
        for flat, initial in zip(engine.optimizer.fp32_groups_flat, engine.optimizer.fp16_groups_flat, strict=True):
            flat.data.copy_(initial)
        zero.make_moments(engine, ["exp_avg", "exp_avg_sq"], 0)
    _power_each_step(engine.basic_optimizer)
    if config.compile:
        compile_towers(model, config.zero_stage)
    return engine


def _not_compiled(error: BaseException) -> str | None:
    """If that is what `error` is, that DeepSpeed could not compile an optimizer, and what to do about it."""
    text, cause = str(error).strip(), error.__cause__ or error
    words = ("JIT load", "building extension", "Ninja", "CUDA_HOME", "shared object", "torch_extensions")
    if not isinstance(error, subprocess.SubprocessError) and not any(word in text for word in words):
        return None
    lines = [line.strip() for line in f"{text}\n{cause}".splitlines()]
    reason = next((line for line in lines if "rror" in line and "building extension" not in line), lines[0])
    return (
        f"DeepSpeed could not compile or load its optimizer: {reason[:300].rstrip('.')}. It needs g++ (and nvcc for a GPU), Python's headers, and "
        f"room in {os.environ.get('TORCH_EXTENSIONS_DIR', '~/.cache/torch_extensions')}; "
        "python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' does that alone"
    )


def _try(settings: dict, config: EngineConfig, extra: dict) -> None:
    """Raise ValueError for what this device or DeepSpeed does not know, before anything is built."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig

    device = get_accelerator()
    supported = {"bf16": device.is_bf16_supported, "fp16": device.is_fp16_supported, "fp32": lambda: True}
    if not supported[config.precision]():
        others = " or ".join(name for name in PRECISIONS if supported[name]())
        raise ValueError(
            f"engine.precision={config.precision}: {device.device_name()} cannot compute in it here: choose {others}"
        )
    try:
        DeepSpeedConfig(settings)
    except Exception as error:  # its own classes', pydantic's and plain ones
        reason = " ".join(str(error).split())
        raise ValueError(f"DeepSpeed refuses the settings under deepspeed: {extra} ({reason})") from error


def _guard(engine, clip: float) -> None:
    """Without ZeRO in fp32 nothing keeps gradients that are not finite from the weights: clip and look here."""
    optimizer, step = engine.optimizer, engine.optimizer.step

    def guarded(*args, **kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        optimizer._global_grad_norm = norm.item()
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        if optimizer.overflow:
            return
        if clip > 0:
            torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
        step(*args, **kwargs)

    engine.clip_fp32_gradients = lambda: None
    optimizer.step = guarded


_FAR = 2**30  # a step that is never followed by a real one


def _power_each_step(optimizer) -> None:
    """Make DeepSpeed's CPU Adam take beta ** step as a power at every step.

    It multiplies on from the step before where it can and takes the power after a restart, and the two round apart, so
    a continued run would not be the unbroken one bit for bit. A step far away in between leaves it nothing to go on from.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    if hasattr(optimizer, "multi_tensor_adam") and not torch.cuda.is_available():
        kernel = optimizer.multi_tensor_adam

        def fused(chunk, noop, tensors, lr, beta1, beta2, eps, step, *rest):
            kernel(chunk, noop, [[t] for t in nothing], lr, beta1, beta2, eps, _FAR, *rest)
            kernel(chunk, noop, tensors, lr, beta1, beta2, eps, step, *rest)

        optimizer.multi_tensor_adam = fused
    elif hasattr(optimizer, "ds_opt_adam"):
        optimizer.ds_opt_adam = _Powers(optimizer.ds_opt_adam, nothing)


class _Powers:
    """DeepSpeed's Adam for offloaded states, with the same remedy."""

    def __init__(self, kernel, nothing: list[Tensor]):
        self._kernel, self._nothing = kernel, nothing

    def __getattr__(self, name: str):
        return getattr(self._kernel, name)

    def adam_update(self, which: int, step: int, *rest) -> None:
        self._kernel.adam_update(which, _FAR, *rest[:-4], *self._nothing)
        self._kernel.adam_update(which, step, *rest)


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

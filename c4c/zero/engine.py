"""The model inside a DeepSpeed engine."""

import os
import subprocess
from typing import TYPE_CHECKING

from c4c.settings import PRECISIONS, EngineConfig, TrainConfig
from c4c.training.param_groups import parameter_groups, put_odd_sizes_last
from c4c.zero import patches
from c4c.zero.adam import use_torchs_adam
from c4c.zero.config import deepspeed_config
from c4c.zero.ema import WeightAverage, require_averages

if TYPE_CHECKING:
    from c4c.training.step import Learner


def build_engine(learner: "Learner", config: EngineConfig, train: TrainConfig, world: int, extra: dict):
    """A DeepSpeed engine around `learner`, with fused AdamW: DeepSpeed's, or torch's (see c4c.zero.adam). Its `average` is the moving
    average of `train.ema`, or None.

    extra: the yaml's `deepspeed:` block. `learner.notes` then also holds what a person should know of it. Raises ValueError for
    settings that the device or DeepSpeed refuses, and if DeepSpeed cannot compile its optimizer.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from c4c.models.attention import attend_directly
    from c4c.models.towers import match_statistics

    model = learner.model
    if config.zero_stage == 3:  # DeepSpeed has to know what is used outside the forward of the module that owns it
        for owner in (model.clip, model.head):  # (a text tower that is a module of its own uses its weights itself)
            for parameter in owner.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(model, parameter)
        deepspeed.zero.register_external_parameter(learner, model.clip.logit_scale)
        if learner.loss == "sigmoid":  # whose backward pass has gradients for these that no module's own has computed
            for parameter in (model.clip.logit_bias, *model.head.parameters()):
                deepspeed.zero.register_external_parameter(learner, parameter)
    learner.notes += model.use_shortcuts(
        fold_pixels=config.fold_pixels, trim_captions=config.trim_captions, share_captions=config.share_captions
    )
    on_gpu = get_accelerator().device_name() == "cuda"
    if on_gpu:
        attend_directly(model)
    if config.activation_checkpointing:
        model.clip.set_grad_checkpointing()
    # training changes no buffer, such as a batch norm's statistics, but a precision of 16 bits rounds them
    weights = dict(learner.named_parameters())
    learner.exact_buffers = {name: value.clone() for name, value in learner.state_dict().items() if name not in weights}
    groups = parameter_groups(learner, train)
    if on_gpu:
        put_odd_sizes_last(groups)
    learner.peak_lrs = [group["lr"] for group in groups]
    learner.parts = [group.pop("part") for group in groups]
    torchs_adam, note = use_torchs_adam(config, train, world, extra, on_gpu)
    learner.notes += [note] if note else []
    settings = deepspeed_config(config, train, world, extra, torchs_adam)
    require_supported(settings, config, extra)
    require_averages(train.ema, settings)
    try:
        with patches.flat_masters():
            engine, *_ = deepspeed.initialize(model=learner, model_parameters=groups, config=settings)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        if (reason := not_compiled(error)) is None:
            raise
        raise ValueError(reason) from error
    match_statistics(model.clip)
    patches.repair(engine, world, for_zero=config.zero_stage > 0)
    engine.average = WeightAverage(engine, train.ema) if train.ema else None
    if config.compile:
        from c4c.models.compiled import compile_towers

        learner.compiled = compile_towers(model, config.zero_stage)
    return engine


def not_compiled(error: BaseException) -> str | None:
    """What to do about it, if `error` means that DeepSpeed could not compile an optimizer; else None."""
    text, cause = str(error).strip(), error.__cause__ or error
    words = ("JIT load", "building extension", "Ninja", "CUDA_HOME", "shared object", "torch_extensions")
    if not isinstance(error, subprocess.SubprocessError) and not any(word in text for word in words):
        return None
    lines = [line.strip() for line in f"{text}\n{cause}".splitlines()]
    reason = next((line for line in lines if "rror" in line and "building extension" not in line), lines[0])
    return (
        f"DeepSpeed could not compile or load its optimizer: {reason[:300].rstrip('.')}. It needs g++ (and nvcc for a GPU), Python's headers, and "
        f"room in {os.environ.get('TORCH_EXTENSIONS_DIR', '~/.cache/torch_extensions')}; "
        "python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' does that alone, and "
        "deepspeed.optimizer.params.torch_adam=true takes torch's optimizer instead"
    )


def require_supported(settings: dict, config: EngineConfig, extra: dict) -> None:
    """Raise ValueError for what this device or DeepSpeed does not support, before anything is built."""
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

"""Which weights are trained, at which learning rate, with or without decay."""

from typing import TYPE_CHECKING

from c4c.settings import TrainConfig

if TYPE_CHECKING:
    from torch import nn


def freeze(model: "nn.Module", layers: int) -> None:
    """CLIP4Clip's --freeze_layer_num, in place: with N >= 0, what is not named below gets no gradient.

    Trained: blocks N and above of both towers, the towers' last norms and projections, the temperature, a 3d patch
    kernel, the head. (The official script freezes nothing at all with 3d patches, by a slip.)
    """
    if layers < 0:
        return
    always = ("ln_final.", "text_projection", "logit_scale", "visual.ln_post.", "visual.proj", "visual.conv2.")
    for name, parameter in model.named_parameters():
        tower, _, rest = name.partition(".")
        if tower != "clip" or rest.startswith(always):
            continue
        _, in_block, after = rest.partition("transformer.resblocks.")
        if not (in_block and int(after.split(".")[0]) >= layers):
            parameter.requires_grad_(False)


def parameter_groups(model: "nn.Module", config: TrainConfig) -> list[dict]:
    """Parts of the model, with and without decay: up to eight groups, each with its `part`, `lr` and `weight_decay`."""
    groups: dict[tuple, list] = {}
    apart = (config.lr_text, config.lr_video, config.freeze_text_epochs, config.freeze_video_epochs) != (1, 1, 0, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            part = part if apart or part == "head" else "towers"
            groups.setdefault((part != "head", decays(name, parameter, config.decay), part), []).append(parameter)
    factors = {"head": 1.0, "text": config.coef_lr * config.lr_text, "video": config.coef_lr * config.lr_video}
    return [
        {
            "params": groups[tower, decayed, part],
            "part": part,
            "lr": config.lr * factors.get(part, config.coef_lr),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for tower, decayed, part in sorted(groups, reverse=True)
    ]


def part_of(name: str) -> str:
    """Which part of the model a weight belongs to: text, video, head, or temperature."""
    tower, _, rest = name.removeprefix("model.").partition(".")
    if tower != "clip":
        return "head"
    return "video" if rest.startswith("visual.") else "temperature" if rest == "logit_scale" else "text"


def decays(name: str, parameter: "nn.Parameter", rule: str) -> bool:
    """Whether weight decay applies: official, to all whose name lacks `bias`; mmaction2, to matrices and kernels."""
    if rule == "official":
        return "bias" not in name
    return parameter.ndim > 1

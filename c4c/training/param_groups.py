"""Which weights are trained, at which learning rate, with or without decay."""

import difflib
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from c4c.settings import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from c4c.models.depth import Tower

_PARTS = ("text", "video", "head", "temperature")
_FINER = re.compile(r"(text|video)\.(?:embeddings|blocks\.(\d+)(?:-(\d+))?)")
_WIDE = 64  # weights; in 16 bits the 128 bytes of a GPU's cache line


def choose_trained(model: "nn.Module", train: TrainConfig) -> None:
    """Freeze what `train.freeze` and `train.freeze_layers` name and, with `train.lora` or `train.prompts`, the towers, in place: it gets
    no gradient.

    model: a CLIP4Clip as it was built. Raises ValueError for a word that names nothing, a tower that has no blocks to count, no
    matrices for LoRA or no place for prompts, and if nothing is left to be trained.
    """
    from c4c.models.depth import towers_in

    _require_its_prompts(model, train)
    if not (train.partial or train.freeze_layers >= 0):
        return
    towers = towers_in(model)
    frozen = _named(model, towers, train.freeze, "train.freeze")
    if train.freeze_layers >= 0:
        frozen |= _below(model, towers, train.freeze_layers)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad} - frozen
    if train.lora or train.prompts:
        beside = _named(model, towers, train.lora_also, "train.lora_also") - frozen
        # a 3d patch kernel starts as the 2d one, and neither LoRA nor prompts are in it: frozen, it would stay that
        trained = {name for name in trained if part_of(name) not in towers or name in _kernel(model)} | beside
    if train.lora:
        trained |= _add_lora(towers, frozen, train)
    if train.prompts:
        trained |= _add_prompts(model, frozen, train)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    if not trained:
        raise ValueError(f"train.freeze={_listed(train.freeze)} freezes every weight: nothing is left to be trained")


def _below(model: "nn.Module", towers: dict[str, "Tower"], layers: int) -> set[str]:
    """CLIP4Clip's --freeze_layer_num: both towers' embeddings and blocks below `layers`.

    A 3d patch kernel is trained. (The official script freezes nothing at all with 3d patches, by a slip.)
    """
    below = set()
    for part, tower in towers.items():
        _require_blocks(part, tower, f"train.freeze_layers={layers}")
        below |= {name for name, place in tower.places.items() if place <= min(layers, tower.blocks)}
    return below - _kernel(model)


def _kernel(model: "nn.Module") -> set[str]:
    """The weight of 3d patches."""
    return {"clip.visual.conv2.weight"} if getattr(model, "linear_patch", "2d") == "3d" else set()


def _named(model: "nn.Module", towers: dict[str, "Tower"], words: str | tuple[str, ...], key: str) -> set[str]:
    """Weights that these words name: parts, embeddings and blocks of a tower, patterns of names or of how they end. Raises ValueError."""
    names = [name for name, _ in model.named_parameters()]
    found = set()
    for word in (words,) if isinstance(words, str) else words:
        if word in _PARTS:
            hits = {name for name in names if part_of(name) == word}
        elif finer := _FINER.fullmatch(word):
            hits = _in_blocks(word, finer, towers, key)
        else:
            patterns = (word.lower(), f"*.{word.lower()}")  # a star in front would be an alias to YAML
            hits = {name for name in names if any(fnmatchcase(name.lower(), pattern) for pattern in patterns)}
        if not hits and word in _PARTS:
            raise ValueError(f"{key}={word}: this model's {word} has no weights: leave {word} out")
        if not hits:
            near = [*difflib.get_close_matches(word, [*_PARTS, *names], 3, 0.4), *names[:3]][:3]
            known = f"{', '.join(_PARTS)}, text.embeddings, video.blocks.0-5, and patterns of names, such as {', '.join(near)}"
            raise ValueError(f"{key}={word}: no weight of this model is called that. It takes {known}")
        found |= hits
    return found


def _in_blocks(word: str, finer: re.Match[str], towers: dict[str, "Tower"], key: str) -> set[str]:
    part, first, last = finer.groups()
    tower = towers[part]
    if first is None:
        return {name for name, place in tower.places.items() if place == 0}
    _require_blocks(part, tower, f"{key}={word}")
    low, high = int(first), int(last or first)
    if not low <= high < tower.blocks:
        raise ValueError(f"{key}={word}: the {part} tower has {tower.blocks} blocks, 0 to {tower.blocks - 1}")
    return {name for name, place in tower.places.items() if low <= place - 1 <= high}


def _add_lora(towers: dict[str, "Tower"], frozen: set[str], train: TrainConfig) -> set[str]:
    """Give LoRA to the matrices of both towers that are not frozen; returns the names of the new weights."""
    from c4c.models.lora import add_lora, matrices

    new: set[str] = set()
    for part, tower in towers.items():
        modules = matrices(tower, train.lora_on)
        if not modules and tower.places.keys() - frozen:
            other = next((on for on in ("attention", "mlp", "all") if matrices(tower, on)), "")
            what = f"set train.lora_on={other}, or train.freeze=[{part}]" if other else f"set train.freeze=[{part}]"
            raise ValueError(
                f"train.lora_on={train.lora_on}: the {part} tower has no matrices of that kind for LoRA: {what} to leave it as it is"
            )
        new.update(add_lora(tower, {n: m for n, m in modules.items() if n not in frozen}, train.lora, train.lora_alpha))
    if not new:
        raise ValueError(
            f"train.lora={train.lora}: every matrix of train.lora_on={train.lora_on} is frozen (train.freeze="
            f"{_listed(train.freeze)}, train.freeze_layers={train.freeze_layers}): leave some out"
        )
    return new


def _require_its_prompts(model: "nn.Module", train: TrainConfig) -> None:
    """Raise ValueError if the weights that the model started from have prompts, and the run is to have another number."""
    from c4c.models.prompts import prompts_of

    number = prompts_of(model)
    if number and number != train.prompts:
        raise ValueError(
            f"train.prompts={train.prompts}, but the weights of model.init_from were trained with prompt vectors, and do not mean the same "
            f"without them: set train.prompts={number}, or start from other weights"
        )


def _add_prompts(model: "nn.Module", frozen: set[str], train: TrainConfig) -> set[str]:
    """Give prompts to the blocks of both towers, unless they came with some; returns the names of these weights."""
    from c4c.models.prompts import PROMPTS, add_prompts, in_words, prompts_of

    if part := next((part for name in sorted(frozen) if (part := part_of(name)) in ("text", "video")), ""):
        raise ValueError(
            f"train.prompts={train.prompts} freezes both towers already, and its vectors learn in both: leave what is of the {part} tower "
            f"out of train.freeze={_listed(train.freeze)}"
        )
    if not prompts_of(model):
        add_prompts(model.get_submodule("clip"), train.prompts)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith(f".{PROMPTS}")}
    notes: list[str] = getattr(model, "notes")  # noqa: B009  # of a CLIP4Clip
    notes.append(in_words(train.prompts, list(weights.values())))
    return set(weights)


def _require_blocks(part: str, tower: "Tower", setting: str) -> None:
    if not tower.blocks:
        raise ValueError(
            f"{setting}: the {part} tower ({type(tower.root).__name__}) is no row of blocks that could be counted; name weights by "
            "patterns in train.freeze instead"
        )


def _listed(words: str | tuple[str, ...]) -> str:
    return f"[{','.join((words,) if isinstance(words, str) else words)}]"


def parameter_groups(model: "nn.Module", config: TrainConfig) -> list[dict]:
    """Parts of the model, with and without decay: up to eight groups, each with its `part`, `lr` and `weight_decay`.

    With `layer_decay` there are as many for each distance of a block from its tower's end. model: a CLIP4Clip, or a
    c4c.training.step.Learner around one.
    """
    groups: dict[tuple, list] = {}
    apart = (config.lr_text, config.lr_video, config.freeze_text_epochs, config.freeze_video_epochs) != (1, 1, 0, 0)
    behind = _blocks_behind(model) if config.layer_decay != 1 else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            part = part if apart or part == "head" else "towers"
            distance = behind.get(name.removeprefix("model."), 0)
            key = (part != "head", decays(name, parameter, config.decay), part, -distance)
            groups.setdefault(key, []).append(parameter)
    factors = {"head": 1.0, "text": config.coef_lr * config.lr_text, "video": config.coef_lr * config.lr_video}
    return [
        {
            "params": groups[tower, decayed, part, distance],
            "part": part,
            "lr": config.lr * factors.get(part, config.coef_lr) * config.layer_decay**-distance,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for tower, decayed, part, distance in sorted(groups, reverse=True)
    ]


def put_odd_sizes_last(groups: list[dict]) -> None:
    """Order each group's weights, in place, by the power of two that divides their size; those of equal ones keep their order.

    DeepSpeed lays a group's weights one after another into one tensor. Behind the temperature, a single number, all of them would begin
    2 bytes off in 16 bits, and a GPU's matrix products and norms take their fast ways only for weights and biases at multiples of 16
    bytes (torch asks cuBLASLt for kernels by the alignment of both). In this order each begins at a multiple of that power.
    """
    for group in groups:
        group["params"].sort(key=lambda weight: -min(weight.numel() & -weight.numel(), _WIDE))


def _blocks_behind(model: "nn.Module") -> dict[str, int]:
    """How many steps each weight of a tower is before the tower's end: 0 for its last norm and projection, 1 in its last block, …, and one
    more than it has blocks for its embeddings (as in BEiT, https://arxiv.org/abs/2106.08254)."""
    from c4c.models.depth import towers_in

    distances: dict[str, int] = {}
    for part, tower in towers_in(getattr(model, "model", model)).items():
        _require_blocks(part, tower, "train.layer_decay")
        distances |= {name: tower.blocks + 1 - place for name, place in tower.places.items()}
    return distances


def part_of(name: str) -> str:
    """Which part of the model a weight belongs to: text, video, head, or temperature (with the bias beside it)."""
    tower, _, rest = name.removeprefix("model.").partition(".")
    if tower != "clip":
        return "head"
    if rest in ("logit_scale", "logit_bias"):
        return "temperature"
    return "video" if rest.startswith("visual.") else "text"


def decays(name: str, parameter: "nn.Parameter", rule: str) -> bool:
    """Whether weight decay applies: official, to all whose name lacks `bias`; mmaction2, to matrices and kernels."""
    if rule == "official":
        return "bias" not in name
    return parameter.ndim > 1

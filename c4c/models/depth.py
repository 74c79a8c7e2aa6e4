"""Where in a tower a weight is: before its blocks, in which block, or behind them. Every kind of tower that open_clip builds has its own
names for that.

open_clip's transformers    transformer.resblocks.N
ResNets                     layer1.0, layer1.1, … layer4.2, in a row
timm's towers               as the model's own `group_matcher` says: blocks.N of a ViT, stages.S.blocks.N of a ConvNeXt in a row
Hugging Face's text models  the list of modules that holds most of the weights: encoder.layer.N, encoder.block.N, …
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

# what comes before the blocks; all else outside them comes behind
_FIRST = re.compile(r"embed|^conv\d|^bn\d|^conv_stem|stem|patch|pos_|^cls_|^reg_token|shared|^wte|^wpe|ln_pre|norm_pre")
_BEHIND = 99999  # timm's mark of what belongs to the last block but comes behind it
TEMPERATURE = ("logit_scale", "logit_bias")
Place = tuple[int, ...] | str  # what a block is sorted by, or "before" or "behind"


@dataclass(frozen=True)
class Tower:
    """One tower of a model.

    blocks: how many; 0 where the tower has no such order. places: of each of its weights, by its name in the model: 0 before the blocks,
    1 in block 0, …, blocks + 1 behind the last. root, prefix: the module, and what stands before its weights' names in the model.
    """

    root: nn.Module
    prefix: str
    blocks: int
    places: dict[str, int]


def towers_in(model: nn.Module) -> dict[str, Tower]:
    """The towers of a CLIP4Clip by part: text and video."""
    clip = model.get_submodule("clip")
    text = getattr(clip, "text", None)
    apart = isinstance(text, nn.Module)
    return {
        "text": _tower(text if apart else clip, "clip.text." if apart else "clip."),  # type: ignore[arg-type]
        "video": _tower(clip.get_submodule("visual"), "clip.visual."),
    }


def _tower(root: nn.Module, prefix: str) -> Tower:
    names = [name for name, _ in root.named_parameters() if not name.startswith("visual.") and name not in TEMPERATURE]
    place = _by_matcher(root) if hasattr(root, "trunk") else _by_lists(root)
    found = {name: place(name) for name in names}
    sorted_keys = sorted({key for key in found.values() if isinstance(key, tuple)})
    numbers: dict[Place, int] = {key: number for number, key in enumerate(sorted_keys, 1)}
    numbers |= {"before": 0, "behind": len(sorted_keys) + 1}
    return Tower(root, prefix, len(sorted_keys), {prefix + name: numbers[key] for name, key in found.items()})


def _by_matcher(root: nn.Module) -> Callable[[str], Place]:
    """Of a tower of timm: by the regular expressions that every model has for learning rates by layer."""
    describe = getattr(root.get_submodule("trunk"), "group_matcher", None)
    matcher = describe(coarse=False) if callable(describe) else None
    patterns: list[tuple[int, str, tuple[int, ...]]] = []
    for number, given in enumerate(matcher.values() if isinstance(matcher, dict) else ()):
        listed = [(given, None)] if isinstance(given, str) else given
        patterns += [(number, pattern, tuple(suffix or ())) for pattern, suffix in listed]

    def place(name: str) -> Place:
        if not name.startswith("trunk."):
            return "behind"
        inner = name.removeprefix("trunk.")
        for number, pattern, suffix in patterns:
            if found := re.match(pattern, inner):
                groups = tuple(int(group) for group in found.groups() if group is not None)
                if _BEHIND in suffix:
                    return "behind"
                return (number, *groups, *suffix) if groups else "before"
        return "before" if _FIRST.search(inner.split(".")[0]) else "behind"

    return place


def _by_lists(root: nn.Module) -> Callable[[str], Place]:
    """By the list of modules that holds most of the weights; of a ResNet by its four lists."""
    paths = [name for name, _ in root.named_children() if re.fullmatch(r"layer\d+", name)]
    if not paths:
        modules = [
            (name, m) for name, m in root.named_modules() if not name.startswith("visual.") and "decoder" not in name
        ]
        lists = [(name, m) for name, m in modules if isinstance(m, nn.ModuleList)]
        paths = [max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))[0]] if lists else []
    parents = [*paths[0].split(".")[:-1], ""] if paths else [""]

    def place(name: str) -> Place:
        for number, path in enumerate(paths):
            if name.startswith(f"{path}."):
                return (number, int(name[len(path) + 1 :].split(".")[0]))
        parts = name.split(".")
        beside = next((part for part, parent in zip(parts, parents, strict=False) if part != parent), parts[-1])
        return "before" if _FIRST.search(beside) else "behind"

    return place

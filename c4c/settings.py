"""Settings of model, engine and checkpoints. Nothing heavy is imported, so that a mistake in them is answered at once."""

import difflib
import importlib.util
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.bounds import COUNT, MONTH_S, check_numbers

PRECISIONS = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, which head, and where the weights come from."""

    backbone: str = "ViT-B-32"  # a name open_clip knows, or one in c4c/backbones
    head: str = "meanP"
    head_layers: int = 4  # transformer blocks of the heads that have some
    linear_patch: str = "2d"  # 3d: the patch embedding also spans three frames
    init_from: str = ""  # an open_clip tag (openai, ...), a weights file, a run folder, or scratch
    init_tag: str = ""  # which checkpoint of a run folder: its name, or best; empty: the latest

    def __post_init__(self):
        _check_backbone(self.backbone)
        if self.head not in (heads := _heads()):
            raise ValueError(f"model.head={self.head}: there are {', '.join(heads)}")
        if self.linear_patch not in ("2d", "3d"):
            raise ValueError(f"model.linear_patch={self.linear_patch}: there are 2d and 3d")
        check_numbers("model", self, {"head_layers": (1, 1000)})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    precision: str = "bf16"  # of weights and activations; masters, moments, similarities and losses are fp32
    zero_stage: int = 1  # 0 none, 1 optimizer states, 2 gradients, 3 weights are shared out over ranks
    clip_grad_norm: float = 1.0  # 0: off
    offload: str = "none"  # to the host's memory: optimizer (masters and moments; ZeRO 1-3), all (weights too; ZeRO 3)
    compile: bool = False  # the towers, by torch.compile
    activation_checkpointing: bool = False  # keep no activations inside blocks: less memory, a second forward pass
    timeout_s: float = 1800.0  # a rank that is this long in one step is taken for dead: the run ends and names it

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"engine.precision={self.precision}: there are {', '.join(PRECISIONS)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage={self.zero_stage}: there are 0, 1, 2 and 3")
        if self.offload not in OFFLOADS:
            raise ValueError(f"engine.offload={self.offload}: there are {', '.join(OFFLOADS)}")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("engine.offload=optimizer: ZeRO does it, so engine.zero_stage must be 1, 2 or 3, not 0")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"engine.offload=all: only engine.zero_stage=3 shares out weights, not {self.zero_stage}")
        check_numbers("engine", self, {"clip_grad_norm": (0, math.inf), "timeout_s": (-math.inf, MONTH_S)})
        if self.timeout_s <= 0:
            raise ValueError(f"engine.timeout_s={self.timeout_s}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, beside the end of every epoch and of the run, and what is kept."""

    every_steps: int = 0  # 0: at ends of epochs only
    every_minutes: float = 0.0  # 0: never by the clock
    keep_last: int = 2  # newest checkpoints
    keep_best: int = 1  # checkpoints with the best validated text-to-video R@1; 0: none for that reason

    def __post_init__(self):
        if self.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last={self.keep_last}: must be at least 1, or nothing could be evaluated"
            )
        counts = dict.fromkeys(("every_steps", "keep_best"), (0, COUNT))
        check_numbers("checkpoint", self, {**counts, "every_minutes": (0, MONTH_S // 60)})


def _check_backbone(name: str) -> None:
    """Raise ValueError if open_clip has no such model. What kind of model it is c4c.models.towers sees when it is built."""
    if "open_clip" in sys.modules or ":" in name:  # which may have been told of more models
        from c4c.models import towers

        towers.named(name)
        return
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    known = {
        file.stem for folder in (package / "model_configs", _MODELS / "backbones") for file in folder.glob("*.json")
    }
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"model.backbone={name}: open_clip knows no such model. {hint}Names are like ViT-B-32, ViT-B-16, ViT-L-14; "
            "python -c 'import open_clip; print(open_clip.list_models())' prints all"
        )


def _heads() -> list[str]:
    """Names of the heads: each file of c4c/models/heads holds some."""
    if "c4c.models.heads" in sys.modules:
        return list(sys.modules["c4c.models.heads"].HEADS)
    files = sorted((_MODELS / "heads").glob("*.py"))
    return [name for file in files for name in re.findall(r'^    name = "(\w+)"', file.read_text(), re.MULTILINE)]


_MODELS = Path(__file__).parent / "models"

"""Settings of model, training, engine and checkpoints. Nothing heavy is imported, so that a mistake in them is answered at once."""

import difflib
import importlib.util
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from c4c.training.lr_schedule import lr_factor, official_lr_factor
from pipelines.bounds import COUNT, MONTH_S, check_values

PRECISIONS = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "optimizer", "all")
SCHEDULES = ("mmaction2", "official")
LOSSES = ("cross_entropy", "mil_nce")
DECAYS = ("mmaction2", "official")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, which head, and where the weights come from."""

    backbone: str = "ViT-B-32"  # a name open_clip knows, or one in c4c/models/backbones
    head: str = "meanP"
    head_layers: int = 4  # transformer blocks of the heads that have some
    linear_patch: str = "2d"  # 3d: the patch embedding also spans three frames
    init_from: str = ""  # an open_clip tag (openai, ...), a weights file, a run folder, or scratch
    init_tag: str = ""  # which checkpoint of a run folder: its name, or best; empty: the latest

    def __post_init__(self):
        check_values("model", self, {"head_layers": (1, 1000)})
        _check_backbone(self.backbone)
        if self.head not in (heads := _heads()):
            raise ValueError(f"model.head must be one of {', '.join(heads)}; got {self.head!r}")
        if self.linear_patch not in ("2d", "3d"):
            raise ValueError(f"model.linear_patch must be 2d or 3d; got {self.linear_patch!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast. The defaults are mmaction2's CLIP4Clip recipe on MSR-VTT."""

    loss: str = "cross_entropy"  # of pairs, both ways; or mil_nce, of clips and bags of captions (clips.bag)
    batch_size: int = 128  # pairs a step, over all ranks
    micro_batch_size: int = (
        0  # pairs a rank encodes at once; fewer than its share: gradient caching. 0: its whole share
    )
    accumulate: int = 1  # an update averages so many smaller batches, each with only its own negatives
    max_bad_steps: int = 20  # the run ends after so many skipped steps in a row: the loss or a gradient was not finite
    epochs: float = 5.0
    max_steps: int = 0  # stop after so many steps; 0: epochs decide. The schedule ends there too
    drop_last: bool = False  # full batches, dropping the rest of an epoch, instead of slightly smaller ones
    lr: float = 1e-5  # of the head; of the towers times coef_lr
    coef_lr: float = 1.0
    lr_text: float = 1.0  # of the text tower, on top of that
    lr_video: float = 1.0  # of the video tower
    freeze_text_epochs: float = 0.0  # the text tower is frozen for so many epochs: its learning rate is 0
    freeze_video_epochs: float = 0.0
    schedule: str = "mmaction2"  # or official: see lr_factor and official_lr_factor
    warmup_epochs: float = 0.5  # mmaction2's
    warmup_start: float = 0.05  # mmaction2's: of lr, at the first step
    warmup_fraction: float = 0.1  # official: of all steps
    weight_decay: float = 0.05
    decay: str = "mmaction2"  # none on biases, norms and scalars; official: none on biases only
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True  # of Adam's moments; BertAdam has none
    freeze_layers: int = -1  # N >= 0: freeze the towers' embeddings and blocks below N
    eval_every: int = 1  # epochs between validations; 0: only at the end
    eval_every_steps: int = 0  # steps between further validations, each with a checkpoint; 0: none
    patience: int = 0  # the run ends after so many validations in a row without a better t2v R@1; 0: never

    def __post_init__(self):
        counts = dict.fromkeys(
            ("max_steps", "eval_every", "micro_batch_size", "eval_every_steps", "patience"), (0, COUNT)
        )
        epochs = ("epochs", "warmup_epochs", "freeze_text_epochs", "freeze_video_epochs")
        rates = dict.fromkeys(("lr", "coef_lr", "lr_text", "lr_video", "weight_decay", "eps"), (0, math.inf))
        shares = dict.fromkeys(("warmup_start", "warmup_fraction"), (0, 1))
        check_values("train", self, {
            **counts, **rates, **shares, **dict.fromkeys(epochs, (0, 1_000_000)), "freeze_layers": (-1, COUNT),
            **dict.fromkeys(("batch_size", "accumulate", "max_bad_steps"), (1, COUNT)),
        })  # fmt: skip
        if not self.epochs and not self.max_steps:
            raise ValueError(
                "train.epochs=0 trains nothing: set it or train.max_steps above 0. launch/eval.py --ckpt evaluates weights "
                "without training"
            )
        if self.accumulate > 1 and self.micro_batch_size:
            raise ValueError(
                f"train.accumulate={self.accumulate} and train.micro_batch_size={self.micro_batch_size} both cut the batch: "
                "micro_batch_size keeps the whole batch's negatives (gradient caching), accumulate does not; set one of them"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be two numbers from 0 to below 1; got {self.betas}")
        for name, known in (("schedule", SCHEDULES), ("decay", DECAYS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the run."""
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))

    def endless_warmup(self, steps_per_epoch: int) -> str:
        """A warning if the warm-up lasts as long as the run, else ''."""
        total, warmup = self.total_steps(steps_per_epoch), round(self.warmup_epochs * steps_per_epoch)
        if self.schedule != "mmaction2" or warmup < max(2, total):
            return ""
        return (
            f"train.warmup_epochs={self.warmup_epochs} is {warmup} steps, but the run has {total}: the learning rate "
            "never reaches train.lr. Lower it, or train longer"
        )

    def frozen(self, epochs: float) -> tuple[str, ...]:
        """Parts of the model that are frozen after so many epochs. Weight decay is part of an update, so it stops too."""
        until = {"text": self.freeze_text_epochs, "video": self.freeze_video_epochs}
        return tuple(part for part, end in until.items() if epochs < end)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at `step` (from 0) over its peak."""
        total = self.total_steps(steps_per_epoch)
        if self.schedule == "official":
            return official_lr_factor(step, total, self.warmup_fraction)
        return lr_factor(step, total, round(self.warmup_epochs * steps_per_epoch), self.warmup_start)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    precision: str = "bf16"  # of weights and activations; masters, moments, similarities and losses are fp32
    zero_stage: int = 1  # what is partitioned over ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too
    clip_grad_norm: float = 1.0  # 0: off
    offload: str = "none"  # to the host's memory: optimizer (masters and moments; ZeRO 1-3), all (weights too; ZeRO 3)
    compile: bool = False  # the towers, by torch.compile
    activation_checkpointing: bool = False  # recompute activations inside blocks: less memory, a second forward pass
    timeout_s: float = 1800.0  # a rank that takes longer for one step is considered dead: the run ends and names it

    def __post_init__(self):
        check_values("engine", self, {"clip_grad_norm": (0, math.inf), "timeout_s": (-math.inf, MONTH_S)})
        if self.precision not in PRECISIONS:
            raise ValueError(f"engine.precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage must be 0, 1, 2 or 3; got {self.zero_stage}")
        if self.offload not in OFFLOADS:
            raise ValueError(f"engine.offload must be one of {', '.join(OFFLOADS)}; got {self.offload!r}")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("engine.offload=optimizer is done by ZeRO: set engine.zero_stage to 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload=all needs engine.zero_stage=3, which partitions the weights; it is {self.zero_stage}"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"engine.timeout_s={self.timeout_s}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, in addition to the end of every epoch and of the run, and what is kept."""

    every_steps: int = 0  # 0: at ends of epochs only
    every_minutes: float = 0.0  # 0: never by the clock
    keep_last: int = 2  # newest checkpoints
    keep_best: int = 1  # checkpoints with the best validated text-to-video R@1, in addition

    def __post_init__(self):
        counts = dict.fromkeys(("every_steps", "keep_best"), (0, COUNT))
        check_values("checkpoint", self, {**counts, "every_minutes": (0, MONTH_S // 60)})
        if self.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last={self.keep_last}: must be at least 1, or nothing could be evaluated"
            )


def _check_backbone(name: str) -> None:
    """Raise ValueError if open_clip has no such model. What kind of model it is c4c.models.towers sees when it is built."""
    if "open_clip" in sys.modules or ":" in name:  # which may have been told of more models
        from c4c.models import towers

        towers.named(name)
        return
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    package = Path(spec.origin).parent
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

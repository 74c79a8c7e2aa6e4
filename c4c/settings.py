"""Settings of model, training, engine and checkpoints. Nothing heavy is imported, so that a mistake in them is answered at once."""

import difflib
import importlib.util
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from c4c.merging import Merging
from c4c.training.lr_schedule import lr_factor, official_lr_factor
from pipelines.bounds import COUNT, MONTH_S, check_values

PRECISIONS = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "optimizer", "all")
SCHEDULES = ("mmaction2", "official")
LOSSES = ("cross_entropy", "mil_nce", "sigmoid")
_CANNOT = {  # loss: {setting: why not}
    "sigmoid": {
        "captions_per_video": "it judges pairs of one caption and one video",
        "label_smoothing": "it judges each pair by itself, so there is no row of candidates to spread a target over",
        "teacher": "it judges each pair by itself, and a teacher's choices are among all candidates of a row",
    },
    "mil_nce": {
        "captions_per_video": "its bags are the captions said around a clip (clips.bag)",
        "label_smoothing": "it has no target of its own for each caption of a bag",
        "mask_equal_captions": "its bags are matched as a whole, and some of their captions are expected not to fit",
        "decorrelation": "some captions of a bag are expected not to fit their clip, so their channels should not agree",
        "teacher": "its bags are matched as a whole, and a teacher scores each of their captions",
    },
}
_WITH = {"decorrelation_off_diagonal": "decorrelation", "teacher_weight": "teacher", "teacher_temperature": "teacher"}
LORA_ON = ("attention", "mlp", "all")
DECAYS = ("mmaction2", "official")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, which head, and where the weights come from."""

    # a name that open_clip knows (python -m c4c.backbones lists them), hf-hub:ID, local-dir:DIR, or one in c4c/models/backbones
    backbone: str = "ViT-B-32"
    head: str = "meanP"
    head_layers: int = 4  # transformer blocks of the heads that have some
    linear_patch: str = "2d"  # 3d: the patch embedding also spans three frames
    # patch tokens of a frame that each block of the image tower merges into similar ones (ToMe's r), of open_clip's ViTs. 0: none
    merge: int = 0
    # with merge, blocks from 0 before which each two neighbouring clips, frames at first, become one: [8, 10]
    merge_frames: tuple[int, ...] = ()
    # an open_clip tag (openai, ...), a weights file, a run folder, or scratch; empty: what hf-hub: and local-dir: bring
    init_from: str = ""
    init_tag: str = ""  # which checkpoint of a run folder: its name, or best; empty: the latest
    init_ema: bool = True  # of a run with train.ema, its averaged weights; false: those of the last step

    def __post_init__(self):
        check_values("model", self, {"head_layers": (1, 1000), "merge": (0, COUNT)})
        _ = self.merging  # which checks them
        _check_backbone(self.backbone)
        if self.head not in (heads := _heads()):
            raise ValueError(f"model.head must be one of {', '.join(heads)}; got {self.head!r}")
        if self.linear_patch not in ("2d", "3d"):
            raise ValueError(f"model.linear_patch must be 2d or 3d; got {self.linear_patch!r}")
        if self.merge and self.linear_patch == "3d":
            raise ValueError(
                f"model.merge={self.merge} and model.linear_patch=3d cannot be used together: set model.linear_patch=2d"
            )

    @property
    def merging(self) -> Merging:
        """Both of merge and merge_frames."""
        return Merging(tokens=self.merge, joins=self.merge_frames)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast. The defaults are mmaction2's CLIP4Clip recipe on MSR-VTT."""

    # of pairs, both ways; or sigmoid (SigLIP's), each pair by itself; or mil_nce, of clips and bags of captions (clips.bag)
    loss: str = "cross_entropy"
    logit_bias: float = -10.0  # loss=sigmoid: the bias at the start, where the weights bring none
    # N > 1: a row of a batch is a video with N of its captions, each of which has it as its match; batch_size counts videos then
    captions_per_video: int = 1
    label_smoothing: float = 0.0  # loss=cross_entropy: share of each target that is spread evenly over the row, 0.1 say
    # captions of a batch with the same tokens, of different videos, are no negatives of each other's videos
    mask_equal_captions: bool = False
    decorrelation: float = 0.0  # weight of DRL's channel decorrelation (CDCR) beside the loss; DRL's is 0.001. 0: off
    # in it, weight of channels that correlate with others; of those that match: 1
    decorrelation_off_diagonal: float = 0.06
    # a run folder or weights, as launch/eval.py --ckpt takes them: a frozen model whose scores of each batch are learned from as well.
    # Or a file that python -m c4c.features wrote: what such a model made of the videos and captions of data.train
    teacher: str = ""
    teacher_weight: float = 1.0  # with teacher: weight of that beside the loss. 0: off
    teacher_temperature: float = 1.0  # with teacher: both models' scaled scores are divided by it
    batch_size: int = 128  # pairs a step, over all ranks
    # pairs a rank encodes at once; fewer than its share: gradient caching. 0: its whole share
    micro_batch_size: int = 0
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
    # decay of an exponential moving average of the trained weights, which validation, evaluation and export then take; 0: none
    ema: float = 0.0
    # of a tower of K blocks, block k learns at layer_decay ** (K - k) of its rate, and the embeddings at layer_decay ** (K + 1)
    layer_decay: float = 1.0
    freeze_layers: int = -1  # N >= 0: freeze the towers' embeddings and blocks below N
    # text, video, head, temperature; video.embeddings, text.blocks.0-5; or patterns of weights' names or their ends, ln_1.*
    freeze: str | tuple[str, ...] = ()
    # rank of LoRA: the towers are frozen, and two small matrices learn beside each of theirs that is not in train.freeze. 0: off
    lora: int = 0
    lora_alpha: float = 16.0  # what the two matrices add counts lora_alpha / lora times
    lora_on: str = "attention"  # which matrices of the towers' blocks: attention, mlp, or all
    # what is trained beside LoRA, in the words of train.freeze: [ln_*, clip.visual.proj]
    lora_also: str | tuple[str, ...] = ()
    # vectors that learn in each block of both towers, of open_clip's own kind, which are frozen. 0: none
    prompts: int = 0
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
            **dict.fromkeys(("batch_size", "accumulate", "max_bad_steps"), (1, COUNT)), "layer_decay": (0, 1),
            "lora": (0, COUNT), "prompts": (0, 1000), "lora_alpha": (0, math.inf), "ema": (0, 1), "captions_per_video": (1, 1000),
            "label_smoothing": (0, 1), **dict.fromkeys(("decorrelation", "decorrelation_off_diagonal"), (0, math.inf)),
            **dict.fromkeys(("teacher_weight", "teacher_temperature"), (0, math.inf)),
        })  # fmt: skip
        if self.ema == 1:
            raise ValueError("train.ema=1 would keep the weights of the start: set it below 1, for example 0.999")
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
        for name, known in (("schedule", SCHEDULES), ("decay", DECAYS), ("loss", LOSSES), ("lora_on", LORA_ON)):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        self._check_lora()
        self._check_loss()

    def _check_lora(self) -> None:
        if not self.layer_decay or not self.lora_alpha:
            key = "lora_alpha" if self.layer_decay else "layer_decay"
            raise ValueError(f"train.{key}=0 would train nothing: it must be above 0")
        if self.lora_also and not self.lora:
            raise ValueError("train.lora_also names what is trained beside LoRA: set train.lora to a rank as well")
        if self.prompts and self.freeze_layers >= 0:
            raise ValueError(
                f"train.prompts={self.prompts} freezes both towers already, and train.freeze_layers is {self.freeze_layers}: set "
                "train.freeze_layers=-1"
            )

    def _check_loss(self) -> None:
        if self.label_smoothing == 1:
            raise ValueError("train.label_smoothing=1 leaves nothing of the matches: it must be below 1")
        if not self.teacher_temperature:
            raise ValueError(
                "train.teacher_temperature=0: scores are divided by it, so it must be above 0; 1 leaves them as they are"
            )
        changed = {
            name for name, field in type(self).__dataclass_fields__.items() if getattr(self, name) != field.default
        }
        for name, other in _WITH.items():
            if name in changed and not getattr(self, other):
                raise ValueError(
                    f"train.{name}={getattr(self, name):g} has no effect without train.{other}: set train.{other} too, or leave "
                    f"train.{name} out"
                )
        reasons = _CANNOT.get(self.loss, {})
        for name, reason in reasons.items():
            if name in changed:
                raise ValueError(
                    f"train.{name}={getattr(self, name)} and train.loss={self.loss} cannot be used together: {reason}. Leave train.{name} "
                    "out, or set train.loss=cross_entropy"
                )

    @property
    def partial(self) -> bool:
        """Whether weights are frozen that checkpoints leave out, and read from `model.init_from` again."""
        return bool(self.lora or self.prompts or self.freeze)

    @property
    def skips_backward(self) -> bool:
        """Whether weights are frozen whose gradients a step leaves out, so that it is no forward and backward pass of everything."""
        return self.partial or self.freeze_layers > 0

    @property
    def row(self) -> str:
        """What a row of a batch is called."""
        return "pair" if self.captions_per_video == 1 else "video"

    def rows_at_once(self, rows: int) -> int:
        """How many of a rank's `rows` of a batch one forward pass takes."""
        return rows // self.accumulate if self.accumulate > 1 else min(self.micro_batch_size or rows, rows)

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

    # of weights and activations; masters, moments, losses and similarities (but those of tightTransf) are fp32
    precision: str = "bf16"
    zero_stage: int = 1  # what is partitioned over ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too
    clip_grad_norm: float = 1.0  # 0: off
    offload: str = "none"  # to the host's memory: optimizer (masters and moments; ZeRO 1-3), all (weights too; ZeRO 3)
    compile: bool = False  # the towers, by torch.compile
    activation_checkpointing: bool = False  # recompute activations inside blocks: less memory, a second forward pass
    # three shorter ways to the same step, up to rounding. Frames stay bytes up to the patch embedding, whose weights normalise them
    fold_pixels: bool = False
    # in training, the text tower does not see the padding behind the longest caption of a batch, or of a micro-batch
    trim_captions: bool = False
    share_captions: bool = False  # in training, equal captions of a batch, or of a micro-batch, are encoded once
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
    # hold frozen weights too, which with train.lora, prompts or freeze are left out and read from model.init_from again
    whole: bool = False

    def __post_init__(self):
        counts = dict.fromkeys(("every_steps", "keep_best"), (0, COUNT))
        check_values("checkpoint", self, {**counts, "every_minutes": (0, MONTH_S // 60)})
        if self.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last={self.keep_last}: must be at least 1, or nothing could be evaluated"
            )


def names_weights(backbone: str) -> bool:
    """Whether a backbone's name means weights as well as towers: hf-hub:ID, local-dir:DIR, or a folder with open_clip's config."""
    return backbone.startswith(("hf-hub:", "local-dir:")) or (Path(backbone) / "open_clip_config.json").is_file()


def _check_backbone(name: str) -> None:
    """Raise ValueError if open_clip has no such model. Whether it can be used c4c.models.backbone sees."""
    if names_weights(name):
        return
    if "open_clip" in sys.modules:  # which may have been told of more models
        known = set(sys.modules["open_clip"].list_models())
    else:
        spec = importlib.util.find_spec("open_clip")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
        folder = Path(spec.origin).parent / "model_configs"
        known = {file.stem for file in folder.glob("*.json")}
    known |= {file.stem for file in (_MODELS / "backbones").glob("*.json")}
    if name not in known:
        near = difflib.get_close_matches(name.replace("/", "-"), sorted(known), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"model.backbone={name}: open_clip knows no such model. {hint}python -m c4c.backbones lists all; a folder with "
            "open_clip_config.json is named local-dir:DIR"
        )


def _heads() -> list[str]:
    """Names of the heads: each file of c4c/models/heads holds some."""
    if "c4c.models.heads" in sys.modules:
        return list(sys.modules["c4c.models.heads"].HEADS)
    files = sorted((_MODELS / "heads").glob("*.py"))
    return [name for file in files for name in re.findall(r'^    name = "(\w+)"', file.read_text(), re.MULTILINE)]


_MODELS = Path(__file__).parent / "models"

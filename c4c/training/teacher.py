"""The frozen model that `train.teacher` names: its scores of a batch are what the trained model learns from beside the matches."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from c4c.distillation import TeacherScores
from c4c.losses import both_ways
from c4c.models import origin, towers
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.pretrained import open_checkpoint
from c4c.settings import TrainConfig
from pipelines.config import DataConfig
from pipelines.loader import Batch
from pipelines.tokens import CLIPS

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of the data settings, those that both models have to be made for
_SHARED = ("image_size", "resize_mode", "num_frames", "frame_order", "max_words", "paragraph", "mean", "std")
_BESIDE = ("files", "hub", "pad_id", "pad_ends")  # of a tokenizer's description: what makes no other tokens


class Teacher:
    """A model that is not trained. It is no torch module, so that no engine, optimizer, average or checkpoint sees its weights.

    digest: of the weights, as they were read, and of how scores are made of them.
    """

    def __init__(self, name: str, model: CLIP4Clip):
        self.name, self.model = name, model.eval().requires_grad_(False)
        spec = model.spec | {"tokenizer": _tokenizer(model.spec)}  # without where its files lie
        about = [model.head.name, model.linear_patch, model.blocks, model.segments, repr(model.merging), spec]
        weights = origin.digest(model.state_dict(), model.state_dict())
        self.digest = hashlib.sha256(f"{weights} {json.dumps(about, sort_keys=True)}".encode()).hexdigest()
        self._scale = model.scale().detach().clone()  # before it is rounded

    def to(self, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """Move the model there."""
        self.model.to(device, dtype)
        towers.match_statistics(self.model.clip)
        self._scale = self._scale.to(device)
        return self

    @property
    def about(self) -> str:
        """For people."""
        weights = list(self.model.parameters())
        size, memory = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
        return (
            f"train.teacher={self.name}: {self.model.head.name}, {size / 1e6:.1f} M weights, which are not trained and take "
            f"{memory / 2**20:.0f} MiB; every batch passes through it, too"
        )

    def rows_of(self, batch: Batch) -> None:
        """Nothing has to be looked up for a batch: see `c4c.training.stored_teacher.StoredTeacher`, which has the same methods."""

    @torch.no_grad()
    def scores(self, parts: Sequence[tuple[Tensor, ...]], rows: Tensor | None = None) -> TeacherScores:
        """Of a rank's rows, in parts of (frames, mask, tokens) as `CLIP4Clip.forward` takes them; called on every rank. rows: not needed."""
        encoded = [self.model(*part) for part in parts]
        texts, videos = (torch.cat(kind) for kind in zip(*encoded, strict=True))
        texts = texts.flatten(0, 1) if parts[0][2].dim() == 3 else texts
        return TeacherScores(*both_ways(texts, videos, self._scale, self.model.head.score))


def load_teacher(
    train: TrainConfig, data: DataConfig, spec: dict, device: torch.device, precision: str
) -> Teacher | None:
    """The teacher of a run, None if it has none.

    data: the run's, filled; spec: of the towers that are trained. Raises ValueError if the teacher cannot be read, or is not made for the
    same pictures and captions.
    """
    if not (train.teacher and train.teacher_weight):
        return None
    with torch.random.fork_rng(devices=[]):  # the run draws what it would without
        try:
            model, own = open_checkpoint(train.teacher)
        except ValueError as error:
            raise ValueError(f"train.teacher={train.teacher} cannot be read: {error}") from error
    _require_same_inputs(train.teacher, model, own, data, spec)
    model.set_pixels(data)
    return Teacher(train.teacher, model).to(device, _DTYPES[precision])


def _require_same_inputs(name: str, model: CLIP4Clip, own: DataConfig, data: DataConfig, spec: dict) -> None:
    """Raise ValueError, naming every difference, if a teacher would see other pictures or captions than it is made for."""
    keys = [key for key in _SHARED if getattr(own, key) != getattr(data, key)]
    if keys:
        now = ", ".join(f"data.{key}={_word(getattr(data, key))}" for key in keys)
        wanted = " ".join(f"data.{key}={_word(getattr(own, key))}" for key in keys)
        raise ValueError(
            f"train.teacher={name} sees the frames and tokens of the run's batches, and it is made for other ones than {now}: set {wanted}, "
            "or take a teacher that was trained with the settings of this run"
        )
    theirs, ours = (_tokenizer(of) for of in (model.spec, spec))
    if theirs != ours:
        keys = sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))
        differing = ", ".join(f"{key} is {theirs.get(key)!r}, here {ours.get(key)!r}" for key in keys)
        raise ValueError(
            f"train.teacher={name} has another tokenizer than model.backbone ({differing}), so it cannot read the tokens of the run's "
            "batches: take a teacher with the same tokenizer, or a model.backbone with the teacher's"
        )
    model.check_data(data, f"train.teacher={name}")


def _tokenizer(spec: dict) -> dict:
    """What decides on the tokens of a caption that is cut to data.max_words."""
    about = CLIPS | spec.get("tokenizer", {})
    about |= {"name": about.get("hub") or about["name"]}  # of the copy in a folder, what it is a copy of
    beside = _BESIDE if about["fixed_length"] else (*_BESIDE, "context_length")
    return {key: value for key, value in about.items() if key not in beside}


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(f'{x:g}' for x in value)}]" if isinstance(value, tuple) else str(value)

"""A teacher whose features lie in a file: `train.teacher` names it, and a step looks up the rows of its captions and videos."""

import shlex
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from c4c.config import Config
from c4c.distillation import TeacherScores
from c4c.losses import both_ways
from c4c.retrieval.feature_file import FeatureFile
from pipelines.captions import texts_of
from pipelines.config import DataConfig
from pipelines.loader import Batch
from pipelines.quarantine import verify_command
from pipelines.stages.transfer import to_device
from shards import count
from shards.dataset import Dataset
from shards.split import Split

_AUGMENTED = ("random_crop", "flip", "colour")  # settings that show other pictures than the file's


class StoredTeacher:
    """Scores of a batch by a model that does not run, as `c4c.training.teacher.Teacher` has them of one that does.

    split: of the training. Raises ValueError if the file lacks a video or a caption of it, or if a row of a batch is not what a row of
    the file stands for. digest: of all that scores depend on.
    """

    def __init__(self, file: FeatureFile, split: Dataset, config: Config, device: torch.device):
        self.name, self._file, self._device = file.path, file, device
        self.digest = file.digest
        _require_whole_videos(file, config)
        self._rows = _rows_of(file, split, config.data)
        if file.unreadable[self._rows].all():
            raise ValueError(
                f"train.teacher={file.path} has no features of any video of {split.path}, because none could be decoded: check the split with "
                f"{verify_command(split.path)}, and write the file again"
            )
        self._head, self._scale = file.head.to(device), torch.tensor(file.scale, device=device)

    @property
    def about(self) -> str:
        """For people."""
        file = self._file
        settings = ("num_frames", "sampling", "image_size", "max_words")
        seen = ", ".join(f"data.{key}={file.data[key]}" for key in settings if key in file.data)
        checked = (
            ""
            if file.splits or file.captions is not None
            else "; it has no caption_crc32, so that the order of captions is not checked"
        )
        unknown = int(file.unreadable[self._rows].sum())
        checked += f"; of {count(unknown, 'video')} of this training it says nothing" if unknown else ""
        return (
            f"train.teacher={self.name}: features of {count(len(file.ids), 'video')} and {count(len(file.texts), 'caption')} by "
            f"{file.checkpoint} ({file.head_name}, scale {file.scale:.4g}), which does not run"
            f"{f'. It saw the frames of evaluation, {seen}' if seen else ''}{checked}"
        )

    def rows_of(self, batch: Batch) -> Tensor:
        """Which rows of the file a batch needs, of its video and of each of its captions: int64 [B, 1 + captions], on the host. Any
        where there is padding."""
        videos = np.zeros(len(batch.caption_numbers), np.int64)
        videos[: len(batch.pairs)] = self._rows[batch.pairs[:, 0]]
        texts = self._file.starts[videos][:, None] + batch.caption_numbers.clip(min=0)
        return torch.from_numpy(np.concatenate([videos[:, None], texts], axis=1))

    @torch.no_grad()
    def scores(self, parts: Sequence[tuple[Tensor, ...]], rows: Tensor | None) -> TeacherScores:
        """Of a rank's rows, as `rows_of` gives them; called on every rank. parts: not needed."""
        assert rows is not None
        texts, videos = self._taken(self._file.texts, rows[:, 1:].flatten()), self._taken(self._file.videos, rows[:, 0])
        known = to_device(torch.from_numpy(~self._file.unreadable[rows[:, 0].numpy()]), self._device)
        videos = videos.masked_fill(~known.view(-1, *[1] * (videos.dim() - 1)), 0)  # they may be anything
        return TeacherScores(*both_ways(texts, videos, self._scale, self._head.score), known)

    def _taken(self, features: np.ndarray, rows: Tensor) -> Tensor:
        return to_device(torch.from_numpy(features[rows.numpy()].astype(np.float32)), self._device)


def _require_whole_videos(file: FeatureFile, config: Config) -> None:
    """Raise ValueError for settings by which a row of a batch is something else than the video and the captions that were encoded."""
    data, name = config.data, f"train.teacher={file.path}"
    if config.clips.cut:
        raise ValueError(
            f"{name} holds features of whole videos, and clips.cut=true shows parts of them: set clips.cut=false, or take a "
            "checkpoint as the teacher, which sees the same parts"
        )
    if keys := [f"data.{key}" for key in _AUGMENTED if getattr(data, key)]:
        raise ValueError(
            f"{name} holds features of pictures as they are, and {' and '.join(keys)} changes those of the run: set "
            f"{' '.join(f'{key}=0' for key in keys)}, or take a checkpoint as the teacher, which sees the same pictures"
        )
    order = "reverse" if file.data.get("frame_order") == "reverse" else "forward"  # as random is in evaluation
    if data.frame_order != order:
        raise ValueError(
            f"{name} holds features of frames in the order {order}, and the run shows them with data.frame_order={data.frame_order}: set "
            f"data.frame_order={order}, or take a checkpoint as the teacher"
        )
    if any(split.paragraph != data.paragraph for split in file.splits):
        joined = "one text of all captions of a video" if not data.paragraph else "each caption by itself"
        raise ValueError(
            f"{name} holds {joined}, and data.paragraph={str(data.paragraph).lower()}: set data.paragraph={str(not data.paragraph).lower()}, "
            f"or write it again with {_command(data.train)} data.paragraph={str(data.paragraph).lower()}"
        )


def _rows_of(file: FeatureFile, split: Dataset, data: DataConfig) -> np.ndarray:
    """The row in `file.videos` of each video of the training, int64 [videos]. Raises ValueError, naming the first that is not there."""
    ends = np.cumsum([one.videos for one in file.splits])
    known = {one.digest: (end - one.videos, end) for one, end in zip(file.splits, ends.tolist(), strict=True)}
    rows: list[np.ndarray] = []
    for part in split.parts:
        own = np.arange(*known.get(part.digest, (0, 0)))
        if len(own) == len(part):  # a digest says that videos and captions are the same
            rows.append(own)
            continue
        rows.append(_rows_by_id(file, part, data))
        _require_same_captions(file, part, rows[-1], data)
    found = np.concatenate(rows)
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"train.teacher={file.path}: several splits of data.train have a video called {file.ids[values[counts.argmax()]]!r}, and the "
            f"file holds one: write it with {_command(data.train)}"
        )
    return found


def _rows_by_id(file: FeatureFile, part: Split, data: DataConfig) -> np.ndarray:
    places: dict[str, int] = {}
    twice: set[str] = set()
    for row, name in enumerate(file.ids):
        if places.setdefault(name, row) != row:
            twice.add(name)
    ids = [part.video(i).id for i in range(len(part))]
    if missing := [name for name in ids if name not in places]:
        more = f" and {count(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
        raise ValueError(
            f"train.teacher={file.path} has no features of the video {missing[0]!r}{more} of {part.path}: write it with "
            f"{_command(data.train)}"
        )
    if doubtful := [name for name in ids if name in twice]:
        raise ValueError(
            f"train.teacher={file.path} holds several videos called {doubtful[0]!r}, and {part.path} is none of the splits that it was "
            f"written from: write it with {_command(data.train)}"
        )
    return np.array([places[name] for name in ids], np.int64)


def _require_same_captions(file: FeatureFile, part: Split, rows: np.ndarray, data: DataConfig) -> None:
    """Raise ValueError if a video has other captions in the file, as far as that says."""
    for video, row in enumerate(rows.tolist()):
        texts = texts_of(part, video, data)
        name, there = part.video(video).id, int(file.counts[row])
        if len(texts) != there:
            raise ValueError(
                f"train.teacher={file.path} has {count(there, 'caption')} of the video {name!r}, and {part.path} has {len(texts)}"
                f"{' (data.paragraph joins them)' if data.paragraph else ''}: write it with {_command(data.train)}"
            )
        if file.captions is None:
            continue
        first = int(file.starts[row])
        for number, text in enumerate(texts):
            if zlib.crc32(text.encode()) != file.captions[first + number]:
                raise ValueError(
                    f"train.teacher={file.path} was made with another caption {number} of the video {name!r} than {part.path} has "
                    f"({text[:60]!r}): write it with {_command(data.train)}"
                )


def _command(train: str | tuple[str, ...]) -> str:
    """What writes a file for this training."""
    return f"python -m c4c.features --ckpt TEACHER --data {shlex.join([train] if isinstance(train, str) else train)} --out FILE"

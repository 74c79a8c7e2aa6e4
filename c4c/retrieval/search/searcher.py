"""Searching an index: by sentences, by a clip or picture as an example, or for what is similar to a segment.

A search of sentences loads the text tower that lies in the index, and nothing else. Only an example needs the checkpoint.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from c4c.retrieval.index.filters import Choice, sql_text
from c4c.retrieval.index.names import hint
from c4c.retrieval.index.store import Hit, Store
from pipelines.config import DataConfig

if TYPE_CHECKING:  # torch and open_clip take seconds: they come with the first sentence
    from torch import Tensor

    from c4c.retrieval.encoder import Encoder, TextEncoder

_MANY = 10_000
_NAME_IT = "Name where it is now with --ckpt (in Python: checkpoint=)"
_WIDER = 4  # times as many segments are looked at, as long as too few videos are among them


class Searcher:
    """An open index and what a query needs. Safe to use from several threads.

    store: the index.
    """

    def __init__(
        self, store: Store, checkpoint: str | None = None, device: str | None = None, tag: str | None = None,
        backbone: str | None = None, ema: bool | None = None,
    ):  # fmt: skip
        self.store = store
        self._checkpoint, self._device, self._tag, self._backbone, self._ema = checkpoint, device, tag, backbone, ema
        # two of them, so that sentences are answered while the whole model is loaded
        self._text_lock, self._encoder_lock = threading.Lock(), threading.Lock()
        self._text: TextEncoder | None = None
        self._encoder: Encoder | None = None

    @classmethod
    def open(
        cls, index: str | Path, *, checkpoint: str | None = None, device: str | None = None, tag: str | None = None,
        backbone: str | None = None, ema: bool | None = None,
    ) -> "Searcher":  # fmt: skip
        """An index that `python -m c4c.index` wrote: a folder or a URL.

        checkpoint: where the weights lie now that made it, for searches by example, with its tag and backbone where it needs them; None:
        where they lay then. ema: a run's averaged weights, or not; None: as they were taken then. device: cpu or cuda; None: sentences on the CPU, examples on a GPU where there is one. Raises ValueError if
        there is no such index.
        """
        return cls(Store.open(str(index)), checkpoint, device, tag, backbone, ema)

    @property
    def text(self) -> "TextEncoder":
        """The text tower and head of the index. Raises ValueError if they are damaged."""
        with self._text_lock:
            if self._text is None:
                from c4c.retrieval.encoder import TextEncoder

                text = TextEncoder.load(self.store.text_encoder(), self._device)
                if text.identity.digest != self.store.about.identity.get("digest"):
                    raise ValueError(
                        f"{self.store.uri}: its text tower is of another model than its vectors: make the index again"
                    )
                self._text = text
            return self._text

    # ---- queries ----

    def search(
        self, sentences: Sequence[str], k: int = 10, *, path: str | None = None, min_duration: float | None = None,
        max_duration: float | None = None, per_video: bool = True, exact: bool = True, candidates: int = 200,
    ) -> list[list[Hit]]:  # fmt: skip
        """For each sentence the best `k` segments, best first.

        path: a glob over the videos' names; min_duration, max_duration: of videos, seconds; per_video: the best segment of each video
        alone. exact: look at every vector, and not only where the ANN index says. candidates: how many segments a head that compares
        frames scores; in an index of no more, the result is exact. Raises ValueError for an empty sentence, or a choice that cannot be.
        """
        choice = Choice(path=path, min_duration=min_duration, max_duration=max_duration, per_video=per_video, exact=exact,
                        candidates=candidates)  # fmt: skip
        _check(k)
        return [self._found(texts, k, choice) for texts in self.encode(sentences)]

    def encode(self, sentences: Sequence[str]) -> "list[Tensor]":
        """What `find` takes, of each sentence. Raises ValueError for one that is empty."""
        from c4c.retrieval.search.query import clean

        return list(self.text.texts([clean(sentence) for sentence in sentences]))

    def find(self, text: "Tensor", k: int = 10, **how: Any) -> list[Hit]:
        """`search` for one sentence that `encode` gave."""
        _check(k)
        return self._found(text, k, Choice(**how))

    def by_video(self, file: str | Path, k: int = 10, **how: Any) -> list[Hit]:
        """The segments most like a clip, by their vectors. how: as `search` takes them.

        Raises ValueError for what is no video, or where the checkpoint of the index cannot be had; OSError.
        """
        from pipelines.example_clips import clip_of_video

        return self._by_file(clip_of_video, file, k, how)

    def by_image(self, file: str | Path, k: int = 10, **how: Any) -> list[Hit]:
        """The same by a still picture, which is taken as a clip of one frame."""
        from pipelines.example_clips import clip_of_picture

        return self._by_file(clip_of_picture, file, k, how)

    def by_frames(self, file: str | Path, k: int = 10, **how: Any) -> list[Hit]:
        """The same by a .npz file of `pixels` and `mask`, as `pipelines.example_clips.clip_of_file` makes them with
        `DataConfig.from_plain(example_settings)`."""
        with np.load(file, allow_pickle=False) as arrays:
            return self.by_clip(arrays["pixels"], arrays["mask"], k, **how)

    def by_clip(self, pixels: np.ndarray, mask: np.ndarray, k: int = 10, **how: Any) -> list[Hit]:
        """The same by a clip, uint8 [F, S, S, 3], bool [F]."""
        _check(k)
        choice = Choice(**how)
        encoder = self.full_encoder
        videos = encoder.videos(encoder.clips(pixels[None], mask[None]), mask[None])
        return self._like(encoder.video_vectors(videos)[0].cpu().numpy(), k, choice)

    def similar(self, id: str, k: int = 10, **how: Any) -> list[Hit]:
        """The segments of other videos most like one of the index; with per_video=False also those of its own that do not overlap it.

        Raises ValueError if there is no such segment.
        """
        _check(k)
        choice = Choice(**how)
        own, vectors = self.store.segment(id), self.store.vectors_of([id])
        if own is None or id not in vectors:
            raise ValueError(f"{self.store.uri} has no segment {id}")
        beside = f"video <> {sql_text(own.video)}"
        if not choice.per_video:
            beside = f"({beside} OR `start` >= {own.end!r} OR `end` <= {own.start!r})"
        return self._like(vectors[id], k, choice, beside)

    def note(self, sentence: str) -> str:
        """'' or what a person should know: the text tower was not trained on the sentence's script, or the sentence is cut."""
        from c4c.retrieval.search import query

        return query.note(query.clean(sentence), self.text.tokenizer, self.text.max_words)

    def ignored(self, choice: Choice) -> list[str]:
        """What of a choice means nothing for this index, a sentence each."""
        notes = [said] if (said := hint(self.store, choice)) else []
        if not choice.exact and not self.store.has_ann:
            notes.append(
                f"{self.store.uri} has no ANN index, so the search is exact. python -m c4c.index makes one with --ann"
            )
        if choice.candidates != Choice.candidates and not self.store.about.late:
            notes.append(
                f"--candidates {choice.candidates} changes nothing: this model's vectors give the final scores"
            )
        return notes

    def thumbnail(self, id: str) -> bytes:
        """JPEG of a segment. Raises ValueError if there is none."""
        return self.store.thumbnail(id)

    # ---- examples ----

    @property
    def example_settings(self) -> dict[str, Any]:
        """How clips are made for the index's model: values for DataConfig, plain."""
        return {**self.store.about.identity["settings"], "num_frames": self.store.about.num_frames}

    @property
    def example_data(self) -> DataConfig:
        """The same, for `pipelines.example_clips`."""
        return DataConfig.from_plain(self.example_settings)

    @property
    def full_encoder(self) -> "Encoder":
        """The whole model that made the index, both towers. Raises ValueError if it cannot be had, or is another one by now."""
        with self._encoder_lock:
            if self._encoder is None:
                self._encoder = self._load()
            return self._encoder

    def _load(self) -> "Encoder":
        from c4c.retrieval.encoder import Encoder, Identity, usable
        from c4c.zero.checkpoint import tags

        if self._device:
            usable(self._device)
        identity = Identity.from_dict(self.store.about.identity)
        name = self._checkpoint or identity.checkpoint
        run = (Path(name) / "config.yaml").is_file()
        tag = self._tag or (identity.tag if run else None)
        if self._tag is None and tag and run and tag not in tags(Path(name)):
            raise ValueError(
                f"{name} is not the model that made {self.store.uri}, or not any more: that was checkpoint {tag} of "
                f"{identity.checkpoint} ({identity.backbone}, {identity.head}), and it has no such checkpoint. {_NAME_IT}, or index again"
            )
        ema = (identity.ema or not run) if self._ema is None else self._ema
        backbone = self._backbone or (identity.backbone_option if Path(name).is_file() else None)
        # how clips are made is the index's, whatever the checkpoint says by now
        settings = [f"data.{key}={json.dumps(value)}" for key, value in identity.settings.items()]
        try:
            encoder = Encoder.load(name, tag, backbone, self._device, ema=ema, overrides=settings)
        except ValueError as error:
            raise ValueError(
                f"this needs the checkpoint that made the index, and it cannot be read: {error}. {_NAME_IT}"
            ) from error
        if encoder.identity.digest != identity.digest:
            raise ValueError(
                f"{name} is not the model that made {self.store.uri} ({identity.backbone}, {identity.head}, digest "
                f"{identity.digest[:12]}; this one has {encoder.identity.digest[:12]}). {_NAME_IT}, or index again"
            )
        return encoder

    def _by_file(
        self, read: Callable[..., tuple[np.ndarray, np.ndarray]], file: str | Path, k: int, how: dict[str, Any]
    ) -> list[Hit]:
        _check(k)
        Choice(**how)
        return self.by_clip(*read(file, self.example_data), k, **how)

    # ---- the search itself ----

    def _found(self, text: "Tensor", k: int, choice: Choice) -> list[Hit]:
        vector = self.text.vectors(text[None])[0].cpu().numpy()
        if not self.text.late:
            return self._like(vector, k, choice)
        return self._best(vector, k, choice, choice.where(), lambda hits: self._scored(text, hits))

    def _like(self, vector: np.ndarray, k: int, choice: Choice, beside: str = "") -> list[Hit]:
        where = choice.where() + ([beside] if beside else [])
        return self._best(vector, k, choice, where, lambda hits: hits)

    def _scored(self, text: "Tensor", hits: list[Hit]) -> list[Hit]:
        """Hits by the head's own score, best first."""
        import torch

        frames = self.store.frames_of([hit.id for hit in hits])
        hits = [hit for hit in hits if hit.id in frames]  # another process may have indexed a video anew meanwhile
        if not hits:
            return []
        videos = torch.from_numpy(np.stack([frames[hit.id] for hit in hits]))
        scores = self.text.score(text[None], videos)[0].tolist()
        results = [replace(hit, score=score) for hit, score in zip(hits, scores, strict=True)]
        return sorted(results, key=lambda result: (-result.score, result.id))

    def _best(
        self, vector: np.ndarray, k: int, choice: Choice, where: list[str], score: Callable[[list[Hit]], list[Hit]]
    ) -> list[Hit]:
        """The best k. As long as there are fewer videos (or segments that do not overlap) among those looked at, more are looked at."""
        condition = " AND ".join(f"({part})" for part in where) or None
        wanted, exact = max(_WIDER * k, choice.candidates if self.store.about.late else 0), choice.exact
        while True:
            if wanted > _MANY:  # more than there are is refused by the database, and takes memory
                wanted = min(wanted, len(self.store) + 1)
            hits = self.store.search(vector[None], wanted, where=condition, exact=exact)[0]
            results = _apart(score(hits), choice.per_video)[:k]
            if len(results) == k or (len(hits) < wanted and exact):
                return results
            if len(hits) < wanted:  # the ANN index has shown all it will: the rest is searched exactly
                exact = True
            wanted *= _WIDER


def _check(k: int) -> None:
    if not isinstance(k, Integral) or k < 1:  # numpy's whole numbers are such, too
        raise ValueError(f"k={k}: must be a whole number, and at least 1")


def _apart(results: list[Hit], per_video: bool) -> list[Hit]:
    """Results, best first, without those of a video (or those that overlap, in it) of which there is a better one."""
    kept: dict[str, list[Hit]] = {}
    out = []
    for result in results:
        others = kept.setdefault(result.video, [])
        if others and (per_video or any(result.start < other.end and other.start < result.end for other in others)):
            continue
        others.append(result)
        out.append(result)
    return out

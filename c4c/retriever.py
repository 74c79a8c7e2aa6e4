"""`c4c.Retriever`: a model and an index, from Python."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from c4c.retrieval.encoder import Encoder, TextEncoder
from c4c.retrieval.index.store import Hit
from c4c.retrieval.search.searcher import Searcher
from pipelines.example_clips import clip_of_file

File = str | PathLike[str]


class Retriever:
    """Searches an index, and makes vectors of texts and videos.

    >>> import c4c
    >>> retriever = c4c.Retriever.load("runs/x", index="my.index")
    >>> best = retriever.search("a dog catches a frisbee", k=2)
    >>> [f"{result.video} at {result.start:.0f} s" for result in best]
    ['dogs/frisbee.mp4 at 4 s', 'cooking/soup.mp4 at 0 s']
    >>> texts = retriever.embed_text(["a dog catches a frisbee", "soup"])
    >>> video = retriever.embed_video("clip.mp4")
    >>> (texts @ video).shape
    (2,)
    >>> scores = retriever.similarity(["a dog", "soup"], ["clip.mp4"])
    >>> scores.shape
    (2, 1)
    """

    def __init__(self, encoder: Encoder | None, searcher: Searcher | None):
        self._encoder, self._searcher = encoder, searcher

    @classmethod
    def load(
        cls, checkpoint: File | None = None, index: File | None = None, *, tag: str | None = None, backbone: str | None = None,
        device: str | None = None, ema: bool | None = None,
    ) -> "Retriever":  # fmt: skip
        """A model, an index, or both.

        checkpoint: a run folder, weights of any kind that c4c reads, or TAG:BACKBONE; left out, the one that made the index. index: what
        `python -m c4c.index` wrote, for `search`. tag, backbone: of the checkpoint, as `launch/eval.py` takes them. device: cpu or cuda;
        None: a GPU where there is one. ema: false takes the last weights of a run that has averaged ones (train.ema) as well; None: the
        averaged ones, or with an index those that made it. Raises ValueError if one cannot be read, or if the index was made with another model.
        """
        if checkpoint is None and index is None:
            raise ValueError("Retriever.load needs a checkpoint, an index, or both")
        name = None if checkpoint is None else str(checkpoint)
        if index is None:
            return cls(Encoder.load(str(name), tag, backbone, device, ema=ema is not False), None)
        searcher = Searcher.open(str(index), checkpoint=name, device=device, tag=tag, backbone=backbone, ema=ema)
        return cls(None if name is None else searcher.full_encoder, searcher)

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return self._text.identity.width

    # ---- searching ----

    @overload
    def search(self, query: str, k: int = 10, **how: Any) -> list[Hit]: ...

    @overload
    def search(self, query: Sequence[str], k: int = 10, **how: Any) -> list[list[Hit]]: ...

    def search(self, query: str | Sequence[str], k: int = 10, **how: Any) -> list[Hit] | list[list[Hit]]:
        """The best `k` results for a sentence, best first; for several sentences a list of them each.

        how: path, min_duration, max_duration, per_video, exact, candidates, as `c4c.retrieval.search.searcher.Searcher.search` takes them.
        Raises ValueError without an index, and for an empty sentence.
        """
        if isinstance(query, str):
            return self.searcher.search([query], k, **how)[0]
        return self.searcher.search(query, k, **how)

    def search_like(self, file: File, k: int = 10, **how: Any) -> list[Hit]:
        """The best `k` results for a clip or a picture. Raises ValueError for a file that is neither."""
        return self.searcher.by_clip(*clip_of_file(Path(file), self.searcher.example_data), k, **how)

    @property
    def searcher(self) -> Searcher:
        """What searches the index, with more ways to. Raises ValueError without an index."""
        if self._searcher is None:
            raise ValueError(
                'this retriever has no index: Retriever.load(…, index="my.index"); python -m c4c.index makes one'
            )
        return self._searcher

    # ---- vectors ----

    def embed_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, D] of sentences; of one sentence that is no list, [D].

        For a head that compares frames or words (wti, seqWTI, tightTransf) they are a first choice only: `similarity` has its scores.
        """
        encoder = self._text
        vectors = encoder.vectors(encoder.texts([texts] if isinstance(texts, str) else list(texts))).cpu().numpy()
        return vectors[0] if isinstance(texts, str) else vectors

    def embed_video(self, file: File) -> np.ndarray:
        """The unit vector float32 [D] of a whole video, or of a picture, whose frames are chosen as in evaluation.

        Raises ValueError for a file that is neither, and where the checkpoint cannot be had.
        """
        return self._full_encoder.video_vectors(self._video(file))[0].cpu().numpy()

    def similarity(self, texts: str | Sequence[str], videos: File | Sequence[File]) -> np.ndarray:
        """float32 [N, M]: how well sentences and video files go together, by the head's own score, without the temperature: the
        cosine, for most heads. One sentence or file that is no list counts as a list of one."""
        encoder = self._full_encoder
        texts = [texts] if isinstance(texts, str) else texts
        videos = [videos] if isinstance(videos, str | PathLike) else videos
        if not videos:
            return np.zeros((len(texts), 0), np.float32)
        return (
            encoder.score(encoder.texts(list(texts)), torch.cat([self._video(file) for file in videos])).cpu().numpy()
        )

    def _video(self, file: File) -> torch.Tensor:
        encoder = self._full_encoder
        pixels, mask = clip_of_file(Path(file), encoder.data)
        return encoder.videos(encoder.clips(pixels[None], mask[None]), mask[None])

    @property
    def _full_encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = self.searcher.full_encoder
        return self._encoder

    @property
    def _text(self) -> TextEncoder:
        return self.searcher.text if self._encoder is None else self._encoder

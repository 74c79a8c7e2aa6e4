"""Which queries the report shows, and what each of them found."""

import math
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import numpy as np
import torch

from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.report.near import find, normal

TOP = 5
# up to ALL queries are shown; of more, the worst and a sample of the others
ALL, WORST, SAMPLE, SEED = 600, 300, 200, 0
_CAPTIONS = 5  # shown of a video
_LONGEST = 400  # characters shown of a caption


@dataclass
class Gallery:
    """What the page's script shows.

    t2v, v2t  the queries, worst first, as JSON objects (see `_Source.text_query`, `_Source.video_query`)
    texts     {caption: its text}; own: {video: some of its captions}
    videos    those that appear, the most important first
    failures, near   of all queries, shown or not, by direction: ranks above 1, and those with a nearly equal caption
    """

    t2v: list[dict] = field(default_factory=list)
    v2t: list[dict] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    own: dict[int, list[int]] = field(default_factory=dict)
    videos: list[int] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    near: dict[str, int] = field(default_factory=dict)


def gallery(evaluation: Evaluation) -> Gallery:
    """The queries of both directions."""
    source = _Source(evaluation)
    out = Gallery()
    by_text, by_video = (ranks.cpu().numpy() for ranks in (evaluation.by_text, evaluation.by_video))
    near_text, near_video = source.near_texts(by_text), source.near_videos(by_video)
    out.failures = {"t2v": int(np.sum(by_text > 0)), "v2t": int(np.sum(by_video > 0))}
    out.near = {"t2v": len(near_text), "v2t": len(near_video)}
    out.t2v = [source.text_query(int(i), int(by_text[i]), near_text.get(int(i))) for i in chosen(by_text)]
    out.v2t = [source.video_query(int(i), int(by_video[i]), near_video.get(int(i))) for i in chosen(by_video)]
    of_texts = chain.from_iterable([query["video"], *(v for v, _ in query["found"])] for query in out.t2v)
    mixed = chain.from_iterable(zip_longest(of_texts, (query["video"] for query in out.v2t)))
    out.videos = [v for v in dict.fromkeys(mixed) if v is not None]
    out.own = {v: source.texts_of[v][:_CAPTIONS] for v in out.videos}
    used = chain(
        (query["text"] for query in out.t2v), chain.from_iterable(out.own.values()),
        chain.from_iterable([query["best"][0], *(t for t, *_ in query["found"])] for query in out.v2t),
        (query["near"] for query in (*out.t2v, *out.v2t) if query["near"] is not None),
    )  # fmt: skip
    out.texts = {t: _cut(evaluation.texts[t]) for t in dict.fromkeys(used)}
    return out


def chosen(ranks: np.ndarray) -> np.ndarray:
    """The queries to show, worst first: all, or the worst and a seeded sample of the others."""
    order = np.argsort(-ranks, kind="stable")
    if len(order) <= ALL:
        return order
    others = np.random.default_rng(SEED).choice(len(order) - WORST, SAMPLE, replace=False)
    return np.concatenate([order[:WORST], order[WORST:][np.sort(others)]])


def words(text: str) -> int:
    """Words of a caption: what stands between spaces."""
    return len(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(score: float) -> float | None:
    """A score with five digits; None, which JSON has, for what is not a number."""
    return float(f"{score:.5g}") if math.isfinite(score) else None


class _Source:
    """An evaluation with what several queries need of it."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
        self.video_of: list[int] = evaluation.video_of_text.tolist()
        self.texts_of: list[list[int]] = [[] for _ in evaluation.keys]
        for text, video in enumerate(self.video_of):
            self.texts_of[video].append(text)
        self.top, self.top_scores = (part.cpu() for part in evaluation.top(min(TOP, len(evaluation.keys))))
        self.top_texts, self.text_scores = (
            part.cpu() for part in evaluation.top_texts(min(TOP, len(evaluation.texts)))
        )
        self._normal: dict[int, tuple[str, ...]] = {}

    def normal(self, text: int) -> tuple[str, ...]:
        """A caption's words as near.py compares them."""
        if text not in self._normal:
            self._normal[text] = normal(self.evaluation.texts[text])
        return self._normal[text]

    def near_texts(self, ranks: np.ndarray) -> dict[int, int]:
        """{failed caption: a nearly equal caption of the video found first}."""
        out = {}
        for text in np.flatnonzero(ranks > 0).tolist():
            found = int(self.top[text, 0])
            captions = self.texts_of[found] if found != self.video_of[text] else []
            if (place := find(self.normal(text), map(self.normal, captions))) is not None:
                out[text] = captions[place]
        return out

    def near_videos(self, ranks: np.ndarray) -> dict[int, int]:
        """{failed video: the caption found first, if it is nearly equal to one of the video's own}."""
        out = {}
        for video in np.flatnonzero(ranks > 0).tolist():
            found = int(self.top_texts[video, 0])
            captions = self.texts_of[video] if self.video_of[found] != video else []
            if find(self.normal(found), map(self.normal, captions)) is not None:
                out[video] = found
        return out

    def text_query(self, text: int, rank: int, near: int | None) -> dict:
        """A caption: its video, the rank (from 1), the video's own score, and [video, score] of the first found."""
        video = self.video_of[text]
        found = _pairs(self.top[text], self.top_scores[text])
        own = dict(map(tuple, found)).get(video)
        own = self._scores([text], video)[0] if own is None else own
        return {"text": text, "video": video, "rank": rank + 1, "score": own, "found": found, "near": near,
                "words": words(self.evaluation.texts[text])}  # fmt: skip

    def video_query(self, video: int, rank: int, near: int | None) -> dict:
        """A video: the best of its own captions with its score, the rank (from 1), and of the first found [caption, score, whether it
        is one of its own]."""
        scores = self._scores(self.texts_of[video], video)
        order = [-math.inf if score is None else score for score in scores]
        best = max(range(len(scores)), key=order.__getitem__)
        text = self.texts_of[video][best]
        found = [[t, s, self.video_of[t] == video] for t, s in _pairs(self.top_texts[video], self.text_scores[video])]
        return {"video": video, "best": [text, scores[best]], "rank": rank + 1, "near": near, "found": found,
                "words": words(self.evaluation.texts[text])}  # fmt: skip

    @torch.no_grad()
    def _scores(self, texts: list[int], video: int) -> list[float | None]:
        found = self.evaluation.score(self.evaluation.text_features[texts], self.evaluation.video_features[[video]])
        return [_number(score) for score in found[:, 0].float().tolist()]


def _pairs(indices: torch.Tensor, scores: torch.Tensor) -> list[list]:
    return [[i, _number(score)] for i, score in zip(indices.tolist(), scores.tolist(), strict=True)]

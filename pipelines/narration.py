"""Clips of long, narrated videos: which seconds a training pair shows, and which captions may describe them.

Speech that was recognised in a video stands beside what it speaks of only roughly. So a caption's clip may be widened or
merged with what is said next, and the captions said nearest to it form a bag of which at least one should fit (MIL-NCE,
Miech et al., https://arxiv.org/abs/1912.06430).
"""

from dataclasses import dataclass

import numpy as np

from pipelines.config import CacheConfig, ClipsConfig, DataConfig
from shards.dataset import Dataset


def check(split: Dataset, clips: ClipsConfig, data: DataConfig, cache: CacheConfig | None) -> None:
    """Raise ValueError for what does not go together with clips, or has none."""
    if not clips.cut:
        return
    if data.paragraph:
        raise ValueError(
            "clips.cut and data.paragraph cannot be used together: one text for a whole video leaves no captions that mark clips"
        )
    if cache is not None and (cache.dir or cache.frames):
        raise ValueError(
            "clips.cut and cache.dir or cache.frames cannot be used together: the cache keeps a few frames of each video, and "
            "each clip of a long video needs others. Leave the cache out"
        )
    splits = split.parts
    if not any(timed(caption) for one in splits for caption in one.captions(0)):
        raise ValueError(
            f"clips.cut: the captions of {split.path} have no start and end (at least those of its first video). Train on "
            "the whole videos, with clips.cut=false"
        )


def timed(caption: dict) -> bool:
    """Whether it says when; some subtitles end before they start."""
    return caption["start"] is not None and caption["end"] is not None and caption["start"] <= caption["end"]


@dataclass(frozen=True)
class Clip:
    """[start, end) in seconds, and its captions: the drawn caption first, then its neighbours, nearest first."""

    start: float
    end: float
    texts: tuple[str, ...]


def clip_of_pair(captions: list[dict], index: int, duration: float, clips: ClipsConfig) -> Clip:
    """The clip of caption `index` in whatever order captions are. One without times stands for the whole video, alone."""
    caption = captions[index]
    if not timed(caption):
        return Clip(0, duration, (caption["text"],))
    order = sorted((i for i, c in enumerate(captions) if timed(c)), key=lambda i: captions[i]["start"])
    track = [captions[i] for i in order]
    return clip_of(track, order.index(index), duration, min_s=clips.min_s, merge=clips.merge, bag=clips.bag)


def clip_of(
    captions: list[dict], index: int, duration: float, *, min_s: float = 0, merge: bool = False, bag: int = 1
) -> Clip:
    """The clip of caption `index` of a video's timed captions (dicts with text, start, end; in the order of start).

    A clip shorter than `min_s` is merged with the captions that follow, their texts joined, if `merge`; what is still too
    short is widened to both sides. A bag of `bag` captions takes the neighbours that widen its span of time least (as the
    reader of MIL-NCE does), and is smaller where a video says less. Clips stay inside [0, duration].
    Raises ValueError if the captions have no times.
    """
    caption = captions[index]
    if caption["start"] is None or caption["end"] is None:
        raise ValueError(f"the caption {caption['text'][:60]!r} has no times, so it marks no clip")
    start, end, text, last = caption["start"], caption["end"], caption["text"], index
    if merge:
        while end - start < min_s and last + 1 < len(captions) and captions[last + 1]["end"] is not None:
            last += 1
            end, text = max(end, captions[last]["end"]), f"{text} {captions[last]['text']}"
    end = min(end, duration)  # subtitles may outlast the video
    start = min(start, end)
    missing = max(0.0, min_s - (end - start))
    start = max(0.0, min(start - missing / 2, duration - max(min_s, end - start)))
    end = min(duration, max(end, start + min_s))
    neighbours = _neighbours(captions, index, last, bag)
    return Clip(start, end, (text, *(captions[i]["text"] for i in neighbours)))


def _neighbours(captions: list[dict], first: int, last: int, bag: int) -> list[int]:
    """The bag - 1 captions around [first, last], each next one on the side where it is nearer in time."""
    begin, finish = captions[first]["start"], captions[last]["end"]
    neighbours: list[int] = []
    while len(neighbours) < bag - 1:
        before = begin - captions[first - 1]["start"] if first > 0 else np.inf
        after = captions[last + 1]["end"] - finish if last + 1 < len(captions) else np.inf
        if min(before, after) == np.inf:
            break
        if before <= after:
            first -= 1
            begin = captions[first]["start"]
            neighbours.append(first)
        else:
            last += 1
            finish = max(finish, captions[last]["end"])
            neighbours.append(last)
    return neighbours

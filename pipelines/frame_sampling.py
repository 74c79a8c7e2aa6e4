"""Which frames of a video make a clip.

Rules speak of frame numbers in the source video; `choose` turns them into positions in the frame table of what is
stored, by the nearest stored frame. On an unabridged video that is the very frame; an `intra` shard keeps the frames
of the extractor's grid, so the official rules find theirs there too.

Where the frame rate varies, numbers do not tell times: a screen recording may have 120 frames in its first 4 seconds and
9 in the next 8. There the rules go by seconds instead, unless they are asked to count (`uniform_by_frame`).
"""

from fractions import Fraction

import numpy as np

from shards.schema import Video
from shards.video.probe import nearest as nearest_time
from shards.video.probe import steady

_BY_FRAME = "_by_frame"
_COUNTING = ("uniform", "head", "tail", "segment")
RULES = (*_COUNTING, "random", *(rule + _BY_FRAME for rule in _COUNTING))
ORDERS = ("forward", "reverse", "random")
# a clip that begins with so many seconds without a new frame shows the one before, too, by rules that look at every second
_STANDS_S, _EVERY_SECOND = 1.0, ("uniform", "head", "tail", "random")
_FRAMES, _VIEW = 1, 2  # what a generator draws; numbers of their own keep the draws apart


def extractor_frames(
    source_frames: int,
    fps: Fraction | float,
    max_frames: int,
    position: str,
    rate: int = 1,
    start: int | None = None,
    end: int | None = None,
) -> np.ndarray:
    """CLIP4Clip's rule: int32 [at most max_frames] frame numbers.

    Candidates are `rate` frames of every second, where a second has int(fps) frames and its k-th candidate is
    k*max(1, int(fps)//rate) into it; of more than max_frames, `position` takes the first ones (head), the last ones
    (tail), or floor(linspace(0, n-1, max_frames)) (uniform).

    With `start` and `end`, whole seconds as an annotation gives them, the candidates are those of the seconds from
    start to end, the end's own included: reversed ones are swapped, equal ones last one second, and a negative start,
    or one past the end of the video, leaves none. (CLIP4Clip `dataloaders/rawvideo_util.py`,
    `dataloader_msrvtt_retrieval.py`, `dataloader_didemo_retrieval.py`; a frame rate below 1, a division by zero there,
    counts as 1.)
    """
    per_second = max(1, int(fps))
    offsets = np.arange(rate) * max(1, per_second // rate)
    offsets = offsets[offsets < per_second]
    seconds = _seconds(-(-source_frames // per_second), start, end) * per_second
    candidates = (seconds[:, None] + offsets).ravel()
    candidates = candidates[candidates < source_frames]
    return _few(candidates, max_frames, position).astype(np.int32)


def _few(candidates: np.ndarray, most: int, position: str) -> np.ndarray:
    """At most so many of the candidates: the first, the last, or evenly spread ones."""
    if position not in ("head", "tail", "uniform"):
        raise ValueError(f"the position must be head, tail or uniform; got {position!r}")
    if len(candidates) <= most:
        return candidates
    if position == "uniform":
        return candidates[np.linspace(0, len(candidates) - 1, num=most, dtype=int)]
    return candidates[:most] if position == "head" else candidates[-most:]


def _seconds(length: int, start: int | None, end: int | None) -> np.ndarray:
    """The seconds, counted from 0, of a video of `length` that candidates come from."""
    if start is None or end is None:
        return np.arange(length)
    start, end = min(start, end), max(start, end)
    if start < 0:
        return np.arange(0)
    return np.arange(start, min(end if end > start else start + 1, length) + 1)


def segment_frames(source_frames: int, num_frames: int, random: np.random.Generator | None = None) -> np.ndarray:
    """mmaction2's UniformSample: int32 [num_frames] frame numbers, one from each of num_frames equal segments.

    Segments are (source_frames - 1) / num_frames long. Without `random`, its test rule, round(s*i) + floor(s/2); with
    it, its training rule, a draw from [round(s*i), round(s*(i+1))], both ends included. Short videos repeat frames.
    """
    step = (source_frames - 1) / num_frames
    edges = np.around(step * np.arange(num_frames + 1)).astype(np.int32)
    if random is None:
        return edges[:-1] + np.int32(step // 2)
    return random.integers(edges[:-1], edges[1:], endpoint=True).astype(np.int32)


def random_frames(source_frames: int, num_frames: int, random: np.random.Generator) -> np.ndarray:
    """int32 [at most num_frames] frame numbers, any of the video's, each once, in order."""
    count = min(source_frames, num_frames)
    return np.sort(random.choice(source_frames, count, replace=False, shuffle=False)).astype(np.int32)


def generator(seed: int, epoch: int, video: int, caption: int, view: bool = False) -> np.random.Generator:
    """What is random about a pair in an epoch: its frames, or its view. It counts, so a resumed run draws the same."""
    key = np.array([seed & (2**64 - 1), _VIEW if view else _FRAMES], np.uint64)
    counter = [0, epoch, video, caption]  # the first counts the draws
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draws(rule: str) -> bool:
    """Whether the rule takes other frames every time in training."""
    return rule.removesuffix(_BY_FRAME) in ("segment", "random")


def choose(
    video: Video,
    rule: str,
    num_frames: int,
    rate: int = 1,
    random: np.random.Generator | None = None,
    among: np.ndarray | None = None,
    between: tuple[int, int] | None = None,
) -> np.ndarray:
    """Positions in the video's frame table, int64 [at most num_frames], at least one.

    Fewer than num_frames come out for a short video under uniform, head, tail and random; the rest of the clip is then
    empty and masked. `random` makes `segment` and `random` draw (training) where without it the middles of the segments
    and uniform frames are taken (testing). `among`: positions, increasing; no others are taken.
    `between`: positions [low, high) of a clip, which the rule then takes for a whole video.

    On a video whose frame rate varies, uniform, head, tail and segment go by time; with `_by_frame` after their name they
    count frames there too, as the official code does.
    """
    frames, counting = video.frames, rule.endswith(_BY_FRAME)
    rule = rule.removesuffix(_BY_FRAME)
    inside = video.inside
    low, high = inside if between is None else between
    if among is None or between is not None:
        among = np.arange(low, high)
    if rule == "random" and random is not None:
        return among[random_frames(len(among), num_frames, random)]
    rule = "uniform" if rule == "random" else rule
    if not counting and not steady(frames.time[slice(*inside)], frames.number[slice(*inside)]):
        return among[_by_time(frames.time[among], rule, num_frames, rate, random)]
    first, source_frames = 0, video.source_frames
    if between is not None:
        first = frames.number[low]
        source_frames = int(frames.number[high - 1] - first) + 1
    if rule == "segment":
        wanted = segment_frames(source_frames, num_frames, random)
    else:
        wanted = extractor_frames(source_frames, video.fps, num_frames, rule, rate)
    return among[nearest(frames.number[among], wanted + first)]


def _by_time(
    times: np.ndarray, rule: str, num_frames: int, rate: int, random: np.random.Generator | None
) -> np.ndarray:
    """Places among `times` (seconds, increasing), int64 [at most num_frames]: the rules with seconds in place of numbers.

    Candidates of uniform, head and tail are the frames nearest to `rate` moments of each second before the last frame,
    each once. Segments are equal spans of time from the first frame to the last; their middles, or a draw from each.
    """
    first, last = float(times[0]), float(times[-1])
    if rule == "segment":
        step = (last - first) / num_frames
        edges = first + step * np.arange(num_frames + 1)
        moments = edges[:-1] + step / 2 if random is None else random.uniform(edges[:-1], edges[1:])
        return nearest_time(times, moments)
    moments = first + np.arange(max(1, int(np.ceil((last - first) * rate - 1e-6)))) / rate
    return _few(np.unique(nearest_time(times, moments)), num_frames, rule)


def shown_between(video: Video, start: float, end: float, rule: str) -> tuple[int, int]:
    """Positions [low, high) in the frame table of what a player shows in [start, end) seconds: the frames that begin there, and
    before them the one that is still shown at `start`, if none begins, or none for a second and the rule looks at every
    second. Before the first picture it is that one."""
    low, high = video.inside
    times = video.frames.time[low:high]
    first, last = (low + int(i) for i in np.searchsorted(times, [start - 1e-6, end - 1e-6]))
    looks = rule in _EVERY_SECOND
    if first > low and (first == last or (looks and times[first - low] - start >= _STANDS_S)):
        first -= 1
    return first, max(first + 1, last)


def candidates(video: Video, count: int) -> np.ndarray:
    """Positions of at most `count` stored frames that are shown, evenly spread: int64, increasing."""
    low, high = video.inside
    return np.unique(np.linspace(low, high - 1, count).round().astype(np.int64))


def distinct(positions: np.ndarray) -> np.ndarray:
    """The positions, each once, increasing; often they are so already."""
    return positions if (np.diff(positions) > 0).all() else np.unique(positions)


def ordered(positions: np.ndarray, order: str, random: np.random.Generator | None = None) -> np.ndarray:
    """The positions forward, in reverse, or, where there is a generator, shuffled."""
    if order == "reverse":
        return positions[::-1]
    return random.permutation(positions) if order == "random" and random is not None else positions


def nearest(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted frame number the position of the nearest stored one (sorted, not empty); the earlier of two."""
    right = np.minimum(stored.searchsorted(wanted), len(stored) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(stored[left] - wanted) <= np.abs(stored[right] - wanted), left, right)

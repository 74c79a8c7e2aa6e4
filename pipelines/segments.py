"""Long videos as segments: which seconds each shows, and which frames of them a model gets."""

from dataclasses import dataclass

import numpy as np

from pipelines.config import DataConfig
from pipelines.frame_sampling import choose, ordered, shown_between
from shards.schema import Video

_LEAST_STRIDE_S = 0.01  # less than a frame: more segments of a video show nothing else
_LEFT_OVER = 0.25  # of a stride: so little at a video's end makes its last segment longer, and no segment of its own


@dataclass(frozen=True)
class Cutting:
    """How videos are cut: into segments of `segment_s` seconds, one every `stride_s`; segment_s 0: not at all.

    Raises ValueError for seconds that leave out parts of a video."""

    segment_s: float = 8.0
    stride_s: float = 4.0  # ignored where segment_s is 0

    def __post_init__(self):
        if not 0 <= self.segment_s < float("inf"):
            raise ValueError(f"--segment {self.segment_s:g}: must be a number of seconds, or 0 for whole videos")
        if self.segment_s and not _LEAST_STRIDE_S <= self.stride_s <= self.segment_s:
            raise ValueError(
                f"--stride {self.stride_s:g}: must be at least {_LEAST_STRIDE_S} and at most --segment {self.segment_s:g}, or parts of videos are left out"
            )

    def __str__(self) -> str:
        if not self.segment_s:
            return "whole videos (--segment 0)"
        return f"segments of {self.segment_s:g} s every {self.stride_s:g} s"


@dataclass(frozen=True)
class VideoSegment:
    """Seconds of a video, and the frames that stand for them: positions in its frame table, int64, in the clip's order."""

    start: float
    end: float
    positions: np.ndarray

    @property
    def middle(self) -> int:
        """The position of the frame that is shown of it."""
        return int(self.positions[len(self.positions) // 2])


def spans(duration: float, cutting: Cutting) -> list[tuple[float, float]]:
    """(start, end) of each segment in seconds. Together they cover the video.

    A video that is shorter than a segment is one. What is left at the end gets a segment of full length that ends with the video,
    unless it is so little that the last one is made to last till then."""
    length, stride = cutting.segment_s, cutting.stride_s
    if not length or duration <= length:
        return [(0.0, duration)]
    whole = int((duration - length) / stride + 1e-6) + 1
    out = [(i * stride, i * stride + length) for i in range(whole)]
    left = duration - out[-1][1]
    if left > _LEFT_OVER * stride:
        out.append((duration - length, duration))
    else:
        out[-1] = (out[-1][0], duration)
    return out


def segments_of(video: Video, config: DataConfig, cutting: Cutting) -> list[VideoSegment]:
    """The segments of a video with the frames that the model's own rule takes of each, as of a video of that length.

    Of a video that is one segment, they are those of evaluation. No segment ends before the first picture is shown."""
    times = video.frames.time[slice(*video.inside)]
    parts = spans(video.duration, cutting)
    out = []
    for start, end in parts:
        between = None
        if len(parts) > 1:
            if times[0] >= end - 1e-6 and (start, end) != parts[-1]:  # sound alone: the picture begins later
                continue
            between = shown_between(video, start, end, config.sampling)
        positions = choose(video, config.sampling, config.num_frames, config.fps, between=between)
        out.append(VideoSegment(start, end, ordered(positions, config.frame_order)))
    return out


def positions_of(segments: list[VideoSegment]) -> np.ndarray:
    """The frames of all segments, each once, increasing: int64."""
    return np.unique(np.concatenate([segment.positions for segment in segments]))

"""Frames of segments from a packed split, by the lane that evaluation of the split takes on the same machine."""

import io
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from pipelines.config import DataConfig
from pipelines.lanes import Lane, lane_name
from pipelines.requests import ClipRequest
from pipelines.segment_frames import Described, Frames, frames_of_stored, shown_of, thumbnail
from pipelines.segments import Cutting, positions_of, segments_of
from pipelines.stages.fetch import BadSample, Reader
from pipelines.stages.transfer import handed_over
from shards import VideoError
from shards.schema import Video
from shards.split import Split

_AT_ONCE = 64  # frames that the lane makes at once


class SegmentLane:
    """Frames of the segments of a split's videos. Safe to use from several threads, which take turns where DALI decodes.

    config: the model's, `filled`. Raises ValueError if the split's pictures do not suit it."""

    def __init__(self, split: Split, config: DataConfig, device: torch.device, cutting: Cutting):
        self._split, self._config, self._cutting = split, config, cutting
        self._intra = lane_name(split, config) == "intra"
        self._lane = self._reader = None
        self._lock = threading.Lock()
        if self._intra or device.type == "cuda":
            self._lane = Lane(split, replace(config, num_frames=_AT_ONCE), device, 1, raw=True)
            self._reader = Reader(split)

    def read(self, video: Video) -> Iterator[Described | Frames]:
        """The video's frames. Raises VideoError and ShardError."""
        if self._lane is None:
            yield from frames_of_stored(self._split, video, self._config, self._cutting)
            return
        segments = segments_of(video, self._config, self._cutting)
        yield Described(video.duration, video.width, video.height, segments)
        positions, shows = positions_of(segments), shown_of(segments)
        for start in range(0, len(positions), _AT_ONCE):
            part = positions[start : start + _AT_ONCE]
            pixels = self._pixels(video, part)
            shown = [position for position in part.tolist() if position in shows]
            thumbnails: dict[int, bytes] = {}
            for position, image in zip(shown, self._pictures(video, shown), strict=True):
                thumbnails |= dict.fromkeys(shows[position], image)
            yield Frames(part, pixels, thumbnails)

    def close(self) -> None:
        """End the lane's threads."""
        if self._lane is not None:
            self._lane.close()

    def _pixels(self, video: Video, positions: np.ndarray) -> np.ndarray:
        assert self._lane is not None
        with self._lock:
            self._lane.use_device()
            plan = self._lane.batch([ClipRequest(video, positions)])
            ready = plan.ready
            (sample,), frames = plan.take()
            handed_over(ready, frames)
            if sample.error is not None:
                raise VideoError(str(sample.error))
            return frames[0, : len(positions)].cpu().numpy().copy()  # the lane writes the next ones there

    def _pictures(self, video: Video, positions: list[int]) -> list[bytes]:
        """Thumbnails of whole stored pictures."""
        if not positions:
            return []
        assert self._reader is not None
        try:
            if self._intra:
                jpegs = self._reader.jpegs(video, np.array(positions)).pieces
                return [thumbnail(Image.open(io.BytesIO(jpeg.tobytes()))) for jpeg in jpegs]
            return list(map(thumbnail, self._reader.pictures(video, np.array(positions)).pieces))
        except BadSample as error:
            raise VideoError(str(error)) from error

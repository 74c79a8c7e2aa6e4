"""Moving thumbnails: the frames that the model saw of a video, side by side in one small picture."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, features

from pipelines.config import DataConfig
from pipelines.lanes import Lane
from pipelines.requests import clip_request
from shards.split import Split

SIDE = 112  # pixels of a frame
_MOST_FRAMES = 8  # of a strip; of more that the model saw, evenly chosen ones
_BATCH = 8  # videos decoded at once
_QUALITY = 60


@dataclass
class Strips:
    """{video: (data URL of a strip, its frames, those that the model saw)}. left_out: videos for which there was no room; broken: those that do not decode."""

    of: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    left_out: int = 0
    broken: int = 0


def strips(
    split: Split, data: DataConfig, videos: Sequence[int], most_bytes: int, tell: Callable[[str, int, int], None],
    clips: int = 1,
) -> Strips:  # fmt: skip
    """Strips of as many of the videos as fit into `most_bytes` of data URLs, in the order given.

    Decoded by the loader's own chain on the CPU, with the rule, size and order of frames of `data` (filled). clips: as many of each
    video were evaluated; the first is shown.
    """
    out, used = Strips(), 0
    data = replace(data, decode="cpu")
    lane = Lane(split, data, torch.device("cpu"), _BATCH, raw=True)
    try:
        for start in range(0, len(videos), _BATCH):
            batch = videos[start : start + _BATCH]
            for index, frames in zip(batch, _decoded(lane, split, data, batch, clips), strict=True):
                if frames is None:
                    out.broken += 1
                    continue
                uri = strip(frames)
                if used + len(uri) > most_bytes:
                    out.left_out = len(videos) - len(out.of) - out.broken
                    return out
                out.of[index] = uri, min(len(frames), _MOST_FRAMES), len(frames)
                used += len(uri)
            tell("pictures", min(start + _BATCH, len(videos)), len(videos))
    finally:
        lane.close()
    return out


def _decoded(lane: Lane, split: Split, data: DataConfig, videos: Sequence[int], clips: int) -> list[np.ndarray | None]:
    """Of each video uint8 [frames, side, side, 3] as the model saw them; None if they cannot be decoded."""
    samples, frames = lane.batch([clip_request(split.video(index), data, (0, clips)) for index in videos]).take()
    made = frames.numpy()
    return [
        None if sample.error is not None else made[row, : len(sample.request.positions)].copy()
        for row, sample in enumerate(samples)
    ]


def strip(frames: np.ndarray) -> str:
    """uint8 [n, H, W, 3] -> the data URL of a picture with at most eight of them side by side, each SIDE pixels square at most."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int)
    pictures = [Image.fromarray(frames[i]) for i in chosen]
    side = min(SIDE, *pictures[0].size)
    sheet = Image.new("RGB", (side * len(pictures), side))
    for place, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (place * side, 0))
    kind = "WEBP" if features.check("webp") else "JPEG"
    file = io.BytesIO()
    sheet.save(file, kind, quality=_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"

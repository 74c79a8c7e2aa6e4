"""Real videos whose every picture carries its frame number as a square of black and white blocks."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable

import av
import numpy as np

from shards.video.writer import usual_priority

SIDE = 4  # blocks: 12 bits of number and 4 of checksum, in the central square
DARK, LIGHT = 40, 215


def picture(number: int, size: tuple[int, int] = (160, 120)) -> np.ndarray:
    """uint8 RGB [height, width, 3] with `number` (0 to 4095) in its central square; `size` is width, height."""
    assert 0 <= number < 4096
    code = number << 4 | _check(number)
    bits = np.array([code >> i & 1 for i in range(SIDE * SIDE)]).reshape(SIDE, SIDE)
    width, height = size
    side = min(size)
    where = np.arange(side) * SIDE // side
    top, left = (height - side) // 2, (width - side) // 2
    out = np.full((height, width, 3), 128, np.uint8)
    out[top : top + side, left : left + side] = np.where(bits[where][:, where], LIGHT, DARK)[..., None]
    return out


def number_in(picture: np.ndarray) -> int:
    """The number in uint8 [H, W, C], scaled or centre-cropped as it may be. Raises ValueError where none is to be read."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    grey = picture[top : top + side, left : left + side].mean(axis=2)
    edges = np.linspace(0, side, SIDE + 1)
    margin = side / SIDE / 4  # the edges of a block are blurred
    spans = [(round(a + margin), round(b - margin)) for a, b in itertools.pairwise(edges.tolist())]
    means = np.array([grey[a:b, c:d].mean() for a, b in spans for c, d in spans])
    code = sum(1 << i for i, mean in enumerate(means) if mean > 128)
    if np.abs(means - 128).min() < 40 or _check(code >> 4) != code & 15:
        raise ValueError(f"no frame number in this picture (blocks {means.round().astype(int).tolist()})")
    return code >> 4


def _check(number: int) -> int:
    return (number * 7 + (number >> 4) * 3 + (number >> 8) * 5 + 9) % 13


def encode(
    frames: int,
    fps=25,
    size: tuple[int, int] = (160, 120),
    codec: str = "libx264",
    format: str = "mp4",
    options: dict | None = None,
) -> bytes:
    """A video file whose frame i shows number i. `size` is width, height; `options` are the encoder's."""
    pictures = (picture(i, size) for i in range(frames))
    return encode_pictures(pictures, fps, size, codec, format, {"bf": "3", "g": "250"} if options is None else options)


def encode_pictures(
    pictures: Iterable[np.ndarray], fps, size: tuple[int, int], codec: str, format: str, options: dict
) -> bytes:
    """A video file of these pictures, each uint8 RGB [height, width, 3]."""
    target = io.BytesIO()
    quick = {"preset": "veryfast", "x265-params": "log-level=none"} if codec in ("libx264", "libx265") else {}
    with usual_priority(), av.open(target, "w", format=format) as file:
        stream = file.add_stream(codec, rate=fps, options={"threads": "1"} | quick | options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for i, rgb in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, 1 / stream.average_rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()

"""What files tell beside the bytes of their packets and pictures: palettes, EXIF, cropping."""

from __future__ import annotations

import av
import numpy as np
import pytest

from tests.shards.video.stored import encoded, numbered, shown, stored

EXACT = {"fps": 240, "quality": 1}


def with_palette(frames: list[av.VideoFrame]) -> list[av.VideoFrame]:
    """The frames in 256 colours of a palette of their own."""
    colours = np.array([(255, i >> 5 << 5, (i >> 2 & 7) << 5, (i & 3) << 6) for i in range(256)], np.uint8)
    return [av.VideoFrame.from_ndarray((f.to_ndarray(format="rgb8"), colours), format="pal8") for f in frames]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "container"),
    [("rawvideo", "pal8", "avi"), ("rawvideo", "gray", "mov"), ("smc", "pal8", "mov"), ("msrle", "pal8", "avi")],
)
def test_pictures_with_a_palette(codec: str, pix_fmt: str, container: str) -> None:
    """libav gives the palette with the first packet and never again."""
    frames = numbered(30)
    data = encoded(with_palette(frames) if pix_fmt == "pal8" else frames, codec, pix_fmt, {}, format=container)
    everything = {i: i for i in range(30)}
    assert shown(stored(data, "copy")) == everything
    assert shown(stored(data, **EXACT)) == everything
    assert shown(stored(data, start=0.4, end=0.8, **EXACT)) == {i: i + 10 for i in range(10)}
    assert shown(stored(data, start=0.0, end=0.4, **EXACT)) == {i: i for i in range(10)}
    assert set(shown(stored(data, fps=1)).values()) == {0, 25}

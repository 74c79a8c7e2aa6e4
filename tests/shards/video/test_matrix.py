"""Containers, codecs and what people's files do with them, each compared picture by picture with libav's plain decoding.

A case is a file: frames 0, 1, 2, … under a container, a codec and one feature. What a player shows of it is known
without c4c: `av.open(...).decode()` honours edit lists, and turning, mirroring and stretching is done here by hand.
"""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from shards.video.profiles import Profile, store
from shards.video.random_access import pick_frames
from tests.shards.video.matrix import (
    COUNT,
    FPS,
    PLAIN,
    SIZE,
    STEPS,
    box,
    compare,
    made,
    plain,
    with_edit,
)
from tests.videos import number_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("container", "codec"), PLAIN)
def test_constant_rate(container: str, codec: str) -> None:
    data = made(container, codec)
    pictures, _ = plain(data)
    if codec not in ("gif", "av1"):  # a coarse palette, and a coarse preset
        assert [number_in(p) for p in pictures] == list(range(COUNT))
    compare(data, container, [i / FPS for i in range(COUNT)], coarse=codec == "gif")


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "h264"), ("mp4", "vp9"), ("matroska", "h264"), ("matroska", "open"), ("webm", "vp8"), ("mpegts", "h264"),
     ("flv", "h264"), ("avi", "mpeg4"), ("avi", "h264"), ("mov", "mjpeg")],
)  # fmt: skip
def test_variable_rate(container: str, codec: str) -> None:
    stamps = np.cumsum([0, *(STEPS * 3)[: COUNT - 1]]).tolist()
    data = made(container, codec, times=stamps)
    seen, when = plain(data)
    if container == "avi":  # the writer fills gaps with empty chunks; each frame is where its chunk is
        assert len(seen) == COUNT
        with av.open(io.BytesIO(data)) as file:
            base = float(file.streams.video[0].time_base)
            chunks = [p.dts * base for p in file.demux(video=0) if p.size]
        when = [c - chunks[0] for c in chunks]
    else:
        assert np.array(when) - when[0] == pytest.approx(np.array(stamps) / FPS, abs=2e-3)
        when = [w - when[0] for w in when]
    compare(data, container, when)


@pytest.mark.parametrize("codec", ["h264", "open", "hevc", "mpeg4"])
@pytest.mark.parametrize(("skip", "length"), [(0.0, 0.8), (0.4, 1.04), (0.6, 0.48)])
def test_edit_list(codec: str, skip: float, length: float) -> None:
    data = with_edit(made("mp4", codec), skip, length)
    seen, when = plain(data)
    first = round(skip * FPS)
    assert [number_in(p) for p in seen] == list(range(first, first + len(seen)))
    assert len(seen) == pytest.approx(length * FPS, abs=1)
    compare(data, "mp4", [w - when[0] for w in when])


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "h264"), ("matroska", "h264"), ("mpegts", "h264"), ("mpegts", "mpeg2")]
)
@pytest.mark.parametrize("late", [20, 50])
def test_picture_that_starts_after_the_sound(container: str, codec: str, late: int) -> None:
    data = made(container, codec, sound_first=late)
    # AAC begins with a packet that only starts its decoder; MPEG-TS cannot say that it is not to be played
    before = 1024 / 48000 if container == "mpegts" else 0
    compare(data, container, [before + (late + i) / FPS for i in range(COUNT)])


# how the picture is to be turned (a b c d of the track header's matrix), and the same by hand
MATRICES = {
    "90": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: np.swapaxes(p, 0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.swapaxes(p, 0, 1)[::-1, ::-1]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("mov", "mjpeg")])
def test_display_matrix(container: str, codec: str, name: str) -> None:
    (a, b, c, d), look = MATRICES[name]
    data = bytearray(made(container, codec))
    at = box(data, b"moov", b"trak", b"tkhd") + 8 + 40
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    compare(bytes(data), container, [i / FPS for i in range(COUNT)], look)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "h264"), ("matroska", "h264"), ("mpegts", "mpeg2"), ("avi", "mpeg4")]
)
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9)])
def test_pixel_aspect(container: str, codec: str, aspect: Fraction) -> None:
    data = made(container, codec, aspect=aspect)
    with av.open(io.BytesIO(data)) as file:
        told = file.streams.video[0].sample_aspect_ratio
    if told in (None, 0, 1):
        pytest.skip("this container did not keep it")
    width, height = SIZE
    size = (round(width * told), height) if told > 1 else (width, round(height / told))
    look = lambda p: np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))  # noqa: E731
    compare(data, container, [i / FPS for i in range(COUNT)], look, tolerance=70)  # edges: another bicubic filter


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (5, False), (5, True), (6, False), (9, False)])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("matroska", "vp9"), ("mp4", "hevc")])
def test_colour_matrix_and_range(container: str, codec: str, matrix: int, full: bool) -> None:
    data = made(container, codec, matrix=matrix, full=full)
    with av.open(io.BytesIO(data)) as file:
        frame = next(file.decode(video=0))
    if (frame.colorspace, frame.color_range == 2) != (matrix, full):
        pytest.skip("this build did not write the tag")
    compare(data, container, [i / FPS for i in range(COUNT)])


def test_a_jump_of_the_time_stamps_is_no_gap() -> None:
    """Two broadcasts one after the other: a player goes on with the second one's frames."""
    one = made("mpegts", "h264")
    both = one + one
    what = store(io.BytesIO(both), "a.ts", Profile(name="copy"))
    seen, _ = plain(both)
    assert len(what.frames) == len(seen)
    assert (np.diff(what.frames.time) > 0).all()
    assert what.frames.time[-1] == pytest.approx((len(seen) - 1) / FPS, abs=0.2)
    found = pick_frames(what, lambda at, size: both[at:] if size < 0 else both[at : at + size], range(len(seen)))
    assert [number_in(found[i]) for i in range(len(seen))] == [number_in(p) for p in seen]

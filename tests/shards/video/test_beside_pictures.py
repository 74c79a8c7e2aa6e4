"""What files tell beside the bytes of their packets and pictures: palettes, EXIF, cropping."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.video.random_access import pick_frames
from tests.shards.video.matrix import box
from tests.shards.video.stored import encoded, numbered, shown, stored
from tests.videos import encode, picture

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


def photos(suffix: str, orientation: int) -> bytes:
    """A video of photographs as a camera writes them, with EXIF."""
    exif, target = Image.Exif(), io.BytesIO()
    exif[0x10F], exif[0x112] = "Camera", orientation
    with av.open(target, "w", format="mov") as file:
        stream = file.add_stream("mjpeg" if suffix == "jpeg" else "png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuvj420p" if suffix == "jpeg" else "rgb24"
        for i in range(10):
            photo = io.BytesIO()
            Image.fromarray(picture(i)).save(photo, suffix, exif=exif, **({"quality": 95} if suffix == "jpeg" else {}))
            packet = av.Packet(photo.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            packet.is_keyframe = True
            file.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize("suffix", ["jpeg", "png"])
def test_pictures_with_exif(suffix: str) -> None:
    data = photos(suffix, 1)
    for profile in ({"name": "copy"}, EXACT):
        assert shown(stored(data, **profile)) == {i: i for i in range(10)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_taken_with_a_turned_camera(orientation: int) -> None:
    data = photos("jpeg", orientation)
    with av.open(io.BytesIO(data)) as file:
        first = bytes(next(file.demux(video=0)))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(first))).convert("RGB"))
    what = stored(data, "copy")
    held = what.file.read()
    seen = pick_frames(what, lambda at, size: held[at : at + size], [0])[0]
    assert seen.shape == expected.shape and np.abs(seen.astype(int) - expected).mean() < 2


def test_cropping_by_the_container_is_noted() -> None:
    """A clean aperture of 96x72 pixels, 32 to the right of the middle and 24 below it."""
    data = bytearray(encode(10))
    aperture = struct.pack(">I4s8i", 40, b"clap", 96, 1, 72, 1, 32, 1, 24, 1)
    at = box(data, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    assert at > box(data, b"mdat")  # nothing that the table of chunks points at moves
    entry = at + 16
    end = entry + struct.unpack(">I", data[entry : entry + 4])[0]
    for path in range(1, 7):
        names = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")[:path]
        where = box(data, *names)
        data[where : where + 4] = struct.pack(">I", struct.unpack(">I", data[where : where + 4])[0] + len(aperture))
    data[entry : entry + 4] = struct.pack(">I", end - entry + len(aperture))
    cropped = bytes(data[:end] + aperture + data[end:])
    for profile in ({"name": "copy"}, EXACT):
        notes = stored(cropped, **profile).source.notes
        assert notes == ("players crop its pictures (top 48, left 64 pixels): they are read whole",)
        assert not stored(encode(10), **profile).source.notes

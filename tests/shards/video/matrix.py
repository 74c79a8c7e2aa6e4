"""Files of many containers and codecs, and what a player shows of them according to libav's plain decoding."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from shards.video.profiles import Profile, store
from shards.video.random_access import decode_stored, pick_frames
from shards.video.writer import usual_priority
from tests.videos import picture

COUNT, FPS, SIZE = 36, 25, (96, 64)
CODECS = {
    "h264": ("libx264", "yuv420p", {"preset": "veryfast", "bf": "2", "g": "12"}),
    "open": ("libx264", "yuv420p", {"preset": "veryfast", "bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "hevc": ("libx265", "yuv420p", {"preset": "ultrafast", "bf": "2", "g": "12", "x265-params": "log-level=none"}),
    "mpeg4": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg2": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
    "vp8": ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "12", "g": "12"}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
    "ffv1": ("ffv1", "yuv420p", {}),
    "huffyuv": ("huffyuv", "yuv422p", {}),
    "png": ("png", "rgb24", {}),
    "prores": ("prores_ks", "yuv422p10le", {}),
    "flv1": ("flv", "yuv420p", {"g": "12"}),
    "wmv2": ("wmv2", "yuv420p", {"g": "12"}),
    "msmpeg4v2": ("msmpeg4v2", "yuv420p", {"g": "12"}),
    "raw": ("rawvideo", "yuv420p", {}),
    "theora": ("libtheora", "yuv420p", {"g": "12"}),
    "gif": ("gif", "rgb8", {}),
}
PLAIN = [
    ("mp4", "h264"), ("mp4", "open"), ("mp4", "hevc"), ("mp4", "mpeg4"), ("mp4", "vp9"), ("mp4", "av1"), ("mp4", "mjpeg"),
    ("mov", "prores"), ("mov", "png"), ("mov", "h264"), ("matroska", "h264"), ("matroska", "open"),
    ("matroska", "ffv1"), ("matroska", "mpeg2"), ("matroska", "huffyuv"), ("webm", "vp8"), ("webm", "vp9"),
    ("avi", "h264"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("avi", "huffyuv"), ("avi", "png"), ("avi", "raw"),
    ("avi", "msmpeg4v2"), ("avi", "ffv1"), ("mpegts", "h264"), ("mpegts", "open"), ("mpegts", "mpeg2"), ("mpegts", "hevc"),
    ("mpeg", "mpeg2"), ("flv", "h264"), ("flv", "flv1"), ("asf", "wmv2"), ("asf", "mpeg4"), ("ogg", "theora"), ("gif", "gif"),
    ("h264", "h264"), ("hevc", "hevc"), ("nut", "mpeg4"), ("mpeg", "open"), ("mpeg", "hevc"),
]  # fmt: skip
STEPS = [1, 1, 1, 2, 1, 4, 1, 1, 9, 1, 1, 1]  # of a variable rate, in frames of 25 a second


def made(
    container: str, codec: str, *, times: list[int] | None = None, aspect: Fraction | None = None, matrix: int | None = None,
    full: bool = False, degrees: int | None = None, sound_first: int = 0,
) -> bytes:  # fmt: skip
    name, pix_fmt, options = CODECS[codec]
    target = io.BytesIO()
    try:
        with usual_priority(), av.open(target, "w", format=container) as file:
            stream = file.add_stream(name, rate=FPS, options={"threads": "1"} | options)
            stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
            stream.codec_context.thread_count = 1
            sound = file.add_stream("aac" if container != "webm" else "libopus", rate=48000) if sound_first else None
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            if matrix is not None:
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
            if degrees:
                stream.set_display_rotation(degrees)
            if sound:
                for i in range(60):
                    audio = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    audio.sample_rate, audio.pts = 48000, i * 1024
                    file.mux(sound.encode(audio))
                file.mux(sound.encode(None))
            for i in range(COUNT):
                frame = av.VideoFrame.from_ndarray(picture(i, SIZE), format="rgb24")
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=2 if full else None)
                frame.pts = (times[i] if times else i) + sound_first
                frame.time_base = Fraction(1, FPS)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this build of PyAV cannot write it: {error}")
    return target.getvalue()


def plain(data: bytes) -> tuple[list[np.ndarray], list[float]]:
    """Pictures and times as libav gives them with no help."""
    with av.open(io.BytesIO(data)) as file:
        frames = list(file.decode(file.streams.best("video")))
    return [f.to_ndarray(format="rgb24") for f in frames], [f.time for f in frames]


def compare(
    data: bytes, container: str, times: list[float], look=lambda picture: picture, seen: list[np.ndarray] | None = None,
    tolerance: int = 0, coarse: bool = False,
) -> None:  # fmt: skip
    """`copy` and `intra` hold these pictures, `look`ing like that, at these seconds."""
    exact = plain(data)[0] if seen is None else seen
    expected = [look(p) for p in exact]
    for name, settings in (("copy", {}), ("intra", {"fps": 240, "short_side": 64, "quality": 1})):
        what = store(io.BytesIO(data), f"a.{container}", Profile(name=name, **settings))
        stored = what.file.read()
        read = lambda at, size, d=stored: d[at:] if size < 0 else d[at : at + size]  # noqa: E731
        low, high = np.searchsorted(what.frames.number, [0, len(what.source.times)])
        assert high - low == len(expected), name
        assert what.frames.time[low:high] == pytest.approx(times, abs=2e-3), name
        assert (np.diff(what.frames.time) > 0).all()
        found = pick_frames(what, read, range(low, high))
        height, width = expected[0].shape[:2]
        if name == "copy":
            assert (what.width, what.height) == (width, height)
            for position, picture in zip(range(low, high), expected, strict=True):
                assert np.abs(found[position].astype(int) - picture).max() <= tolerance, (name, position)
            some = [high - 1, low, (low + high) // 2]  # and each alone, as a loader asks for them
            assert sorted(p for p, _ in decode_stored(what, read, some)) == sorted(some)
            for position in some:
                alone = pick_frames(what, read, [position])[position]
                assert np.array_equal(alone, found[position]), position
        else:
            for position, picture in zip(range(low, high), expected, strict=True):
                small = np.asarray(
                    Image.fromarray(picture).resize(found[position].shape[1::-1], Image.Resampling.BICUBIC)
                )
                assert np.abs(found[position].astype(int) - small).mean() < (20 if coarse else 4), position


def boxes(data: bytes | bytearray, start: int, end: int):
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start, size
        start += size


def box(data: bytes | bytearray, *path: bytes) -> int:
    start, end = 0, len(data)
    for kind in path:
        at, size = next((at, size) for k, at, size in boxes(data, start, end) if k == kind)
        start, end = at + 8, at + size
    return at


def with_edit(data: bytes, skip: float, length: float) -> bytes:
    """The mp4 with an edit list that shows `length` seconds from `skip` on (ISO 14496-12, 8.6.6)."""
    out = bytearray(data)
    movie = struct.unpack(">I", out[box(out, b"moov", b"mvhd") + 20 :][:4])[0]
    media = struct.unpack(">I", out[box(out, b"moov", b"trak", b"mdia", b"mdhd") + 20 :][:4])[0]
    at = box(out, b"moov", b"trak", b"edts", b"elst") + 16
    begin = struct.unpack(">i", out[at + 4 : at + 8])[0]
    out[at : at + 8] = struct.pack(">Ii", round(length * movie), begin + round(skip * media))
    return bytes(out)

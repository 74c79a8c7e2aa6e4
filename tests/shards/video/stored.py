"""Videos as packing stores them, and sources of unusual kinds."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from shards.video.profiles import Profile, Stored, store
from shards.video.random_access import pick_frames
from tests import videos
from tests.videos import number_in

GOP = {"bf": "3", "g": "12", "sc_threshold": "0"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}


def stored(data: bytes, name: str = "intra", start=None, end=None, **settings) -> Stored:
    settings = {"short_side": 64, **settings}
    return store(io.BytesIO(data), "a.mp4", Profile(name=name, **settings), start, end)


def shown(what: Stored) -> dict[int, int]:
    """{frame number of the table: number in the picture}"""
    data = what.file.read()
    assert len(data) == what.size
    read = lambda offset, size: data[offset:] if size < 0 else data[offset : offset + size]  # noqa: E731
    found = pick_frames(what, read, range(len(what.frames)))
    return {int(n): number_in(found[i]) for i, n in enumerate(what.frames.number)}


def encoded(frames: list[av.VideoFrame], codec: str, pix_fmt: str, options: dict, rate=25, format="mp4") -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format=format) as file:
        stream = file.add_stream(
            codec,
            rate=rate,
            options={"threads": "1", "x265-params": "log-level=none:pools=none:frame-threads=1"} | options,
        )
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        stream.codec_context.thread_count = 1
        for name in ("color_trc", "color_primaries", "colorspace"):
            setattr(stream.codec_context, name, getattr(frames[0], name))
        for i, frame in enumerate(frames):
            if frame.pts is None:
                frame.pts, frame.time_base = i, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def numbered(count: int, size=(160, 120)) -> list[av.VideoFrame]:
    return [av.VideoFrame.from_ndarray(videos.picture(i, size), format="rgb24") for i in range(count)]


def rotated(data: bytes, degrees: int) -> bytes:
    target = io.BytesIO()
    with av.open(io.BytesIO(data)) as file, av.open(target, "w", format="mp4") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return target.getvalue()


def with_sound(
    container: str, stamps: list[int], seconds: float, options: dict[str, str] | None = None, later: float = 0.0
) -> bytes:
    """Pictures 0, 1, … at these 25ths of a second (none: sound alone), and so many seconds of sound; all begins `later`."""
    target = io.BytesIO()
    with av.open(target, "w", format=container, options=options or {}) as file:
        stream = file.add_stream("libx264", rate=25, options=GOP | {"bf": "0"}) if stamps else None
        sound = file.add_stream("mp2", rate=48000)
        packets = []
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(videos.picture(i), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = stamp, Fraction(1, 25)
            if i == 0:
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
            packets += stream.encode(frame)
        packets += stream.encode(None) if stream else []
        for i in range(round(seconds * 48000 / 1152)):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 48000, i * 1152, Fraction(1, 48000)
            packets += sound.encode(samples)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            shift = round(later / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            file.mux(packet)
    return target.getvalue()


class Counted(io.BytesIO):
    """A file that knows how much was read of it, and the most at once."""

    total = most = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.total, self.most = self.total + len(data), max(self.most, len(data))
        return data

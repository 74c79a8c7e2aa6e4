"""What is stored of a video: frames of the grid as JPEGs or re-encoded, or packets of the source in a file of their own."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import BinaryIO

import av
import numpy as np

from shards import VideoError
from shards.schema import Coding
from shards.video.by_stamps import AllStampPass, StampPass
from shards.video.decode import WAYS, on_grid
from shards.video.frame_pass import Unpredictable
from shards.video.geometry import Geometry
from shards.video.picture import short
from shards.video.source import SourceVideo, describe, scan, unsliced
from shards.video.writer import Layout, Writer, WrittenVideo, spool

os.environ.setdefault("SVT_LOG", "1")  # errors only: SVT-AV1 prints a page for every file

_COLOURS = ("colorspace", "color_range", "color_trc", "color_primaries")
_MP4 = ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg")  # what a cut keeps in an mp4; the rest goes into Matroska

# Settings that make an encoder's output a function of its input, with closed GOPs that begin at keyframes only. x265
# 4.2 leaves times of decoding undefined where B-frames outnumber what follows, and its cutree writes past its arrays
# when a side is below 56 pixels; in GOPs of a second's few frames neither saves anything. With B-frames, x264's
# macroblock tree reads memory that nobody wrote, and a file came out in other bytes now and then.
_ENCODERS = {
    ("h264", "cpu"): ("libx264", lambda crf, gop: {
        "preset": "medium", "crf": f"{crf}", "threads": "1", "x264-params": f"keyint={gop}:min-keyint=1:open-gop=0:bframes=0"}),
    ("hevc", "cpu"): ("libx265", lambda crf, gop: {
        "preset": "veryfast", "crf": f"{crf}", "x265-params":
            f"keyint={gop}:min-keyint=1:open-gop=0:bframes=0:cutree=0:pools=none:frame-threads=1:wpp=0:log-level=none:info=0"}),
    ("av1", "cpu"): ("libsvtav1", lambda crf, gop: {
        "preset": "8", "crf": f"{crf}", "g": f"{gop}", "svtav1-params": "lp=1:irefresh-type=2"}),
} | {
    (name, "nvenc"): (f"{name}_nvenc", lambda crf, gop: {
        "preset": "p5", "rc": "constqp", "qp": f"{crf}", "g": f"{gop}", "bf": "0", "forced-idr": "1", "strict_gop": "1"})
    for name in ("h264", "hevc", "av1")
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Which frames are stored and how large: those on the extractor's grid at `rate` frames a second, in [start, end) seconds
    of a player's clock."""

    rate: int
    geometry: Geometry
    start: float = 0.0
    end: float = math.inf


def to_intra(file: BinaryIO, grid: Grid, *, quality: int, chroma: int = 420) -> tuple[SourceVideo, WrittenVideo]:
    """The frames of the grid as independent JPEGs in an MJPEG mp4.

    `quality` is MJPEG's quantiser scale, 1 (best) to 31. `chroma` 420 scales planes as they are (fast); 444 scales RGB
    as PIL does and keeps full colour resolution (exact). The frame table speaks of the source: numbers and times are
    those of the frames of the cut, from the first of them on.
    """
    options = {"qmin": quality, "qmax": quality}
    layout = Layout(f"yuvj{chroma}p", grid.geometry, even=False, exact=chroma == 444)
    return _transcode(file, grid, lambda: Writer("mjpeg", {}, layout, options))


def to_gops(
    file: BinaryIO, grid: Grid, *, codec: str, quality: int, gop: int, encoder: str = "cpu"
) -> tuple[SourceVideo, WrittenVideo]:
    """The frames of the grid re-encoded with `codec` (h264, hevc, av1) in closed GOPs of `gop` frames.

    `quality` is the encoder's constant rate factor. The written file is decoded once to see that it holds every frame.
    """
    name, settings = _ENCODERS[codec, encoder]
    layout = Layout("yuv420p", grid.geometry, even=True, exact=False)
    source, made = _transcode(file, grid, lambda: Writer(name, settings(quality, gop), layout, {"gop_size": gop}))
    stored = scan(made.file)
    made.file.seek(0)
    if len(stored.frames) != len(made.frames):
        raise VideoError(f"{len(made.frames)} frames were encoded and {len(stored.frames)} decode: a defect of {name}")
    frames = replace(stored.frames, number=made.frames.number, time=made.frames.time)
    return source, replace(made, frames=frames, codec=stored.codec, extradata=stored.extradata, coding=stored.coding)


def _transcode(file: BinaryIO, grid: Grid, begin: Callable[[], Writer]) -> tuple[SourceVideo, WrittenVideo]:
    for way in WAYS.values():
        try:
            with way(file, grid.start, grid.end) as source, begin() as writer:
                when = source.timeline
                for shown in source.frames(on_grid(when, grid.rate)):
                    assert source.shape is not None, "the first frame tells it"
                    writer.add(shown.frame, source.shape, shown.number, shown.time, min(Fraction(grid.rate), when.fps))
                return describe(source, unsliced(when.times)), writer.finish()
        except Unpredictable:
            continue
        except av.FFmpegError as error:  # the decoder's own are VideoErrors by now
            raise VideoError(f"its frames cannot be encoded ({short(error)})") from error
    raise AssertionError("decoding decides")


@cache
def nvenc_opens(codec: str) -> bool:
    """Whether this machine has the GPU, the driver and the build that encode `codec`: by doing it."""
    name, settings = _ENCODERS[codec, "nvenc"]
    try:
        context = av.CodecContext.create(name, "w")
        assert isinstance(context, av.VideoCodecContext)
        context.width, context.height, context.pix_fmt = 256, 256, "yuv420p"
        context.time_base, context.options = Fraction(1, 3), settings(25, 3)
        context.encode(av.VideoFrame(256, 256, "yuv420p"))
        return bool(context.encode(None))
    except (av.FFmpegError, ValueError):
        return False


def cut_copy(file: BinaryIO, start: float, end: float) -> tuple[SourceVideo, WrittenVideo]:
    """The source's packets for the frames in [start, end) seconds, not re-encoded, in a file of their own.

    It begins at the keyframe before the cut, and it may end with frames that the last of the cut refer to. The frame
    table lists these too, or nothing could be decoded; they are outside: their numbers are below 0, or not below the
    number of frames of the cut. Raises VideoError if that cannot be done with this file.
    """
    out = spool()
    codec = "video"
    try:
        with AllStampPass(file, start, end) as cut:
            codec = av.Codec(cut.context.name, "r").canonical_name
            extension, kind = ("mp4", "mp4") if codec in _MP4 else ("mkv", "matroska")
            before, packets = _remux(cut, out, kind)
            when, fps = cut.timeline, cut.timeline.fps
            times = cut.seconds(np.sort(np.asarray(cut.packets.pts)[:packets]))
            next(cut.frames())
            shape, told = cut.shape, Coding.of(cut.context)  # what is written may have lost how it is shown
    except (Unpredictable, av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(
            f"this {codec} file cannot be cut without re-encoding ({short(error)}): use another profile than copy"
        ) from error
    stored = scan(out)
    out.seek(0)
    if stored.frames.counted:
        raise VideoError(
            f"this {codec} file cannot be cut without re-encoding (its stamps tell another order than its decoder): use another "
            "profile than copy"
        )
    if len(stored.times) != packets:
        raise VideoError(
            f"of {packets} frames cut out of this {codec} file without re-encoding, {len(stored.times)} decode: "
            "use another profile than copy"
        )
    assert shape is not None, "the first frame tells it"
    source = replace(
        stored, fps=fps, duration=when.duration, drift=when.drift, times=when.times, width=shape.width, height=shape.height,
        rotation=shape.rotation, mirrored=shape.mirrored,
    )  # fmt: skip
    number = np.arange(packets, dtype=np.int32) - before
    times[before] = when.times[0]  # 0 of one that stands when the cut begins
    frames = replace(stored.frames, number=number, time=times)
    coding = replace(stored.coding, **{name: getattr(told, name) for name in _COLOURS})
    return source, WrittenVideo(
        file=out, frames=frames, codec=stored.codec, extension=extension, extradata=stored.extradata, width=shape.width,
        height=shape.height, rotation=shape.rotation, mirrored=shape.mirrored, coding=coding,
    )  # fmt: skip


def _remux(cut: StampPass, out: BinaryIO, kind: str) -> tuple[int, int]:
    """Write the packets of a cut. Returns how many of its frames are shown before it, and how many there are."""
    stamps: list[int] = []
    first: float = math.inf
    alone = not (cut.ranks[1:] >= 0).any()
    with av.open(out, "w", format=kind, options={"fflags": "+bitexact"}) as target:
        stream = target.add_stream_from_template(cut.stream, opaque=True)
        for packet, number in cut.again():
            if packet is None:
                break
            if alone and not packet.duration:  # of which an edit list would show nothing
                packet.duration = max(1, round(1 / cut.timeline.fps / (cut.stream.time_base or 1)))
            assert packet.pts is not None, "`again` gives none without"
            stamps.append(packet.pts)
            if number >= 0:
                first = min(first, packet.pts)
            packet.pts -= stamps[0]
            packet.dts = None if packet.dts is None else packet.dts - stamps[0]
            packet.stream = stream
            target.mux(packet)
    return sum(stamp < first for stamp in stamps), len(stamps)

"""Writing what is stored of a video: frames of the grid as JPEGs or re-encoded, or packets of the source in a new file.

Written files go to a temporary file once they outgrow memory. Bitexact flags and one thread: equal input gives equal
bytes with the same libraries.
"""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from crc32c import crc32c
from PIL import Image

from shards.decode import Packets, Pass, Unpredictable
from shards.frames import VideoError, grid, scaled_size, short, upright
from shards.schema import FrameTable
from shards.video import Source, describe, scan, unsliced

os.environ.setdefault("SVT_LOG", "1")  # errors only: SVT-AV1 prints a page for every file

_IN_MEMORY = 32 << 20  # bytes of a stored video before it goes to a temporary file
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same on every processor
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
_MP4 = {
    "h264",
    "hevc",
    "av1",
    "vp9",
    "mpeg4",
    "mjpeg",
}  # what a cut keeps in an mp4; the rest goes into a Matroska file

# Settings that make an encoder's output a function of its input, with closed GOPs that begin at keyframes only.
_ENCODERS = {
    ("h264", "cpu"): ("libx264", lambda crf, gop: {
        "preset": "medium", "crf": f"{crf}", "threads": "1", "x264-params": f"keyint={gop}:min-keyint=1:open-gop=0"}),
    ("hevc", "cpu"): ("libx265", lambda crf, gop: {
        "preset": "veryfast", "crf": f"{crf}", "x265-params":
            f"keyint={gop}:min-keyint=1:open-gop=0:pools=none:frame-threads=1:wpp=0:log-level=none:info=0"}),
    ("av1", "cpu"): ("libsvtav1", lambda crf, gop: {
        "preset": "8", "crf": f"{crf}", "g": f"{gop}", "svtav1-params": "lp=1:irefresh-type=2"}),
} | {
    (name, "nvenc"): (f"{name}_nvenc", lambda crf, gop: {
        "preset": "p5", "rc": "constqp", "qp": f"{crf}", "g": f"{gop}", "bf": "0", "forced-idr": "1", "strict_gop": "1"})
    for name in ("h264", "hevc", "av1")
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A stored file, standing at its beginning, and the table of its frames. `codec` is libav's name of the decoder."""

    file: BinaryIO
    frames: FrameTable
    codec: str
    extension: str
    extradata: bytes
    rotation: int
    width: int
    height: int


def spool() -> BinaryIO:
    """A file in memory that moves to a temporary one as it grows."""
    return tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)


def to_intra(
    file: BinaryIO, *, rate: int, short_side: int, quality: int, chroma: int = 420, start: float = 0.0,
    end: float = math.inf,
) -> tuple[Source, Written]:  # fmt: skip
    """The frames of the extractor's grid as independent JPEGs in an MJPEG mp4.

    `quality` is MJPEG's quantiser scale, 1 (best) to 31. `chroma` 420 scales planes as they are (fast); 444 scales RGB
    as PIL does and keeps full colour resolution (exact). The frame table speaks of the source: numbers and times are
    those of the frames in [start, end) seconds, from the first of them on.
    """
    options = {"qmin": quality, "qmax": quality}
    layout = Layout(f"yuvj{chroma}p", short_side, even=False, exact=chroma == 444)
    return _transcode(file, rate, start, end, lambda: Writer("mjpeg", {}, layout, options))


def to_gops(
    file: BinaryIO, *, codec: str, rate: int, short_side: int, quality: int, gop: int, encoder: str = "cpu",
    start: float = 0.0, end: float = math.inf,
) -> tuple[Source, Written]:  # fmt: skip
    """The frames of the extractor's grid re-encoded with `codec` (h264, hevc, av1) in closed GOPs of `gop` frames.

    `quality` is the encoder's constant rate factor. The written file is decoded once to see that it holds every frame.
    """
    name, settings = _ENCODERS[codec, encoder]
    layout = Layout("yuv420p", short_side, even=True, exact=False)
    source, made = _transcode(
        file, rate, start, end, lambda: Writer(name, settings(quality, gop), layout, {"gop_size": gop})
    )
    stored = scan(made.file)
    made.file.seek(0)
    if len(stored.frames) != len(made.frames):
        raise VideoError(f"{len(made.frames)} frames were encoded and {len(stored.frames)} decode: a defect of {name}")
    frames = replace(stored.frames, number=made.frames.number, time=made.frames.time)
    return source, replace(made, frames=frames, codec=stored.codec, extradata=stored.extradata)


def _transcode(file: BinaryIO, rate: int, start: float, end: float, begin: Callable) -> tuple[Source, Written]:
    for thrifty in (True, False):
        with Pass(file, start, end) as source, begin() as writer:
            try:
                for shown in source.frames(lambda n: grid(n, source.fps, rate), thrifty=thrifty):
                    writer.add(shown.frame, shown.number, shown.time, min(Fraction(rate), source.fps))
                return describe(source, unsliced(source.times)), writer.finish()
            except Unpredictable:
                if not thrifty:
                    raise
    raise AssertionError("the exact way has no second try")


def _on_grid(fps: Fraction, rate: int) -> Callable[[int], bool]:
    second = [grid(number, fps, rate) for number in range(max(1, int(fps)))]
    return lambda number: second[number % len(second)]


@dataclass(frozen=True)
class Layout:
    """What frames are converted to: pixel format, short side in pixels, whether sides must be even, and whether RGB is
    scaled as PIL does it (exact) or planes as they are."""

    pix_fmt: str
    short_side: int
    even: bool
    exact: bool

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        turned = frame.rotation % 180 != 0
        width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
        width, height = scaled_size(width, height, self.short_side)
        return (width - width % 2, height - height % 2) if self.even else (width, height)


class Writer:
    """An encoder and the mp4 around it, opened at the first frame. Use it as a context manager."""

    def __init__(self, codec: str, options: dict, layout: Layout, attributes: dict):
        self._codec, self._options, self._layout, self._attributes = codec, options, layout, attributes
        self._file = spool()
        self._container: av.container.OutputContainer | None = None
        self._numbers: list[int] = []
        self._times: list[float] = []
        self._packets = Packets()
        self._scaler = VideoReformatter()  # one for all frames: setting up costs more than a frame

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def add(self, frame: av.VideoFrame, number: int, time: float, rate: Fraction) -> None:
        """Encode a frame of the source; `rate` is the frame rate of the file that is written."""
        if self._container is None:
            self._open(frame, rate)
        picture = self._convert(frame)
        picture.pts, picture.time_base = len(self._numbers), 1 / rate
        picture.pict_type = 0
        self._write(self._stream.encode(picture))
        self._numbers.append(number)
        self._times.append(time)

    def finish(self) -> Written:
        """Close the file. Raises VideoError if a frame is missing in it."""
        self._write(self._stream.encode(None))
        extradata = bytes(self._stream.codec_context.extradata or b"")
        width, height = self._stream.width, self._stream.height
        self._container.close()
        self._container = None
        if len(self._packets) != len(self._numbers):
            raise VideoError(
                f"{len(self._numbers)} frames gave {len(self._packets)} packets: a defect of {self._codec}"
            )
        frames = replace(
            unsliced(self._times) if self._codec != "mjpeg" else self._in_a_row(),
            number=np.asarray(self._numbers, np.int32), time=np.asarray(self._times, np.float64),
        )  # fmt: skip
        self._file.seek(0)
        extradata = b"" if self._codec == "mjpeg" else extradata
        return Written(self._file, frames, self._codec, "mp4", extradata, 0, width, height)

    def _open(self, frame: av.VideoFrame, rate: Fraction) -> None:
        # bitexact: no library version in the file
        self._container = av.open(self._file, "w", format="mp4", options={"fflags": "+bitexact"})
        stream = self._stream = self._container.add_stream(self._codec, rate=rate, options=self._options)
        stream.width, stream.height = self._layout.size(frame)
        stream.pix_fmt = self._layout.pix_fmt
        context = stream.codec_context
        for name, value in self._attributes.items():
            setattr(context, name, value)
        context.thread_count = 1
        context.flags |= Flags.bitexact
        context.colorspace = Colorspace.ITU601
        context.color_range = ColorRange.JPEG if self._codec == "mjpeg" else ColorRange.MPEG
        try:
            context.open()
        except (av.FFmpegError, ValueError) as error:
            what = f"{self._codec} does not take {stream.width}x{stream.height} pixels"
            raise VideoError(f"{what} ({short(error)})") from error

    def _write(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            self._packets.add(packet, crc32c(packet) if self._codec == "mjpeg" else 0)
            self._container.mux(packet)

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        frame = _standard_range(frame)
        width, height = self._stream.width, self._stream.height
        if self._layout.exact:
            picture = Image.fromarray(upright(frame)).resize((width, height), Image.Resampling.BICUBIC)
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        elif frame.rotation:
            frame = av.VideoFrame.from_ndarray(upright(frame), format="rgb24")
        # JPEG is BT.601 in full range, and what is small is BT.601
        return self._scaler.reformat(
            frame, width, height, self._layout.pix_fmt, interpolation=_BICUBIC,
            dst_colorspace=Colorspace.ITU601, threads=1,
            dst_color_range=ColorRange.JPEG if self._codec == "mjpeg" else ColorRange.MPEG,
        )  # fmt: skip

    def _in_a_row(self) -> FrameTable:
        """Where the packets stand: an mp4 of one stream holds them one after another in its mdat box."""
        size = np.asarray(self._packets.size, np.int32)
        begin, length = _media_data(self._file)
        offset = begin + np.concatenate([[0], np.cumsum(size[:-1], dtype=np.int64)])
        if length != int(size.sum()):
            raise VideoError(
                f"wrote {int(size.sum())} bytes of frames and {length} are in the file: a defect of the packer"
            )
        return FrameTable(
            np.arange(len(size), dtype=np.int32), np.zeros(len(size)), offset.astype(np.int64), size,
            np.ones(len(size), bool), np.asarray(self._packets.crc, np.uint32),
        )  # fmt: skip


def _media_data(file: BinaryIO) -> tuple[int, int]:
    """Offset and size of what is in the mdat box of an mp4 (ISO 14496-12, 4.2)."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            raise VideoError("the mp4 that was written has no mdat box: a defect of the packer")
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:], "big"), 16
        if head[4:8] == b"mdat":
            return at + header, size - header
        at += size


def _standard_range(frame: av.VideoFrame) -> av.VideoFrame:
    """PQ and HLG (BT.2100) brought to BT.709 by libswscale, white at 203 cd/m² (ITU-R BT.2408); others as they are."""
    if frame.color_trc not in _HDR:
        return frame
    scaler = _hdr_scaler(frame.width, frame.height, frame.format.name, frame.color_trc, frame.color_primaries)
    rotation = frame.rotation
    out = scaler.reformat(
        frame, format="rgb24", dst_color_trc=ColorTrc.BT709, dst_color_primaries=ColorPrimaries.BT709, threads=1
    )
    return out if not rotation else av.VideoFrame.from_ndarray(upright(out, rotation), format="rgb24")


@lru_cache(maxsize=2)
def _hdr_scaler(*_) -> VideoReformatter:
    return VideoReformatter()  # making its table takes seconds: kept for the next video of the same kind


@cache
def nvenc_opens(codec: str) -> bool:
    """Whether this machine has the GPU, the driver and the build that encode `codec`: by doing it."""
    name, settings = _ENCODERS[codec, "nvenc"]
    try:
        context = av.CodecContext.create(name, "w")
        context.width, context.height, context.pix_fmt = 256, 256, "yuv420p"
        context.time_base, context.options = Fraction(1, 3), settings(25, 3)
        context.encode(av.VideoFrame(256, 256, "yuv420p"))
        return bool(context.encode(None))
    except (av.FFmpegError, ValueError):
        return False


def cut_copy(file: BinaryIO, start: float, end: float) -> tuple[Source, Written]:
    """The source's packets for the frames in [start, end) seconds, not re-encoded, in a file of their own.

    It begins at the keyframe before the cut, and it may end with frames that the last of the cut refer to. The frame
    table lists these too, or nothing could be decoded; they are outside: their numbers are below 0, or not below the
    number of frames of the cut. Raises VideoError if that cannot be done with this file.
    """
    out = spool()
    with Pass(file, start, end) as cut:
        codec = av.Codec(cut.context.name, "r").canonical_name
        extension, kind = ("mp4", "mp4") if codec in _MP4 else ("mkv", "matroska")
        try:
            before, packets = _remux(cut, out, kind)
        except (Unpredictable, av.FFmpegError, ValueError) as error:
            raise VideoError(
                f"this {codec} file cannot be cut without re-encoding ({short(error)}): use another profile than copy"
            ) from error
        times, fps = cut.times, Fraction(cut.fps).limit_denominator(100_000)
    if not times:
        raise VideoError(f"no frame between {start:g} and {end:g} s")
    stored = scan(out)
    out.seek(0)
    if len(stored.frames) != packets:
        raise VideoError(
            f"of {packets} frames cut out of this {codec} file without re-encoding, {len(stored.frames)} decode: "
            "use another profile than copy"
        )
    number = np.arange(packets, dtype=np.int32) - before
    time = stored.frames.time - stored.frames.time[before]
    duration = times[-1] + float(1 / fps)
    source = replace(stored, fps=fps, duration=duration, frames=unsliced(times))
    frames = replace(stored.frames, number=number, time=time)
    return source, Written(
        out, frames, stored.codec, extension, stored.extradata, stored.rotation, stored.width, stored.height
    )


def _remux(cut: Pass, out: BinaryIO, kind: str) -> tuple[int, int]:
    """Write the packets of a cut. Returns how many of its frames are shown before it, and how many there are."""
    stamps: list[int] = []
    inside: list[int] = []
    with av.open(out, "w", format=kind, options={"fflags": "+bitexact"}) as target:
        stream = target.add_stream_from_template(cut.stream)
        for packet, number in cut.numbered():
            if packet is None:
                break
            stamps.append(packet.pts)
            if number is not None:
                inside.append(packet.pts)
            packet.pts -= stamps[0]
            packet.dts = None if packet.dts is None else packet.dts - stamps[0]
            packet.stream = stream
            target.mux(packet)
    first = min(inside, default=0)
    return sum(stamp < first for stamp in stamps), len(stamps)

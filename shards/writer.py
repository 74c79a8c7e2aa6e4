"""Frames into an mp4: scaled, in the right colours, encoded, and where each one's bytes are.

Written files go to a temporary file once they outgrow memory. Bitexact flags and one thread: equal input gives equal
bytes with the same libraries.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from crc32c import crc32c
from PIL import Image

from shards.decode import Packets
from shards.frames import VideoError, scaled_size, short, upright
from shards.schema import FrameTable
from shards.video import unsliced

_IN_MEMORY = 32 << 20  # bytes of a stored video before it goes to a temporary file
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same on every processor
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG


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


@contextmanager
def usual_priority() -> Iterator[None]:
    """Puts every thread of the process back to the caller's scheduling: SVT-AV1, when root opens it, makes itself and its
    caller real-time threads (SCHED_FIFO), which all later children inherit and which starve everything else."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            for thread in os.listdir("/proc/self/task"):
                with suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread), policy, parameters)


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
            with usual_priority():
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

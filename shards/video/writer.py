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
from typing import BinaryIO, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from crc32c import crc32c
from PIL import Image

from shards import VideoError
from shards.schema import Coding, FrameTable
from shards.video.geometry import Geometry
from shards.video.picture import BICUBIC, Shape, short, standard_range, turned_rgb
from shards.video.probe import Packets
from shards.video.source import unsliced

_IN_MEMORY = 32 << 20  # bytes of a stored video before it goes to a temporary file


@dataclass(frozen=True, kw_only=True)
class WrittenVideo:
    """A video file that was written, standing at its beginning, and the table of its frames.

    `codec` is libav's name of the decoder. Width and height are as displayed; `rotation` and `mirrored` are what is left to
    be done to decoded frames.
    """

    file: BinaryIO
    frames: FrameTable
    codec: str
    extension: str
    extradata: bytes
    width: int
    height: int
    rotation: int = 0
    mirrored: bool = False
    coding: Coding | None = None


def spool() -> BinaryIO:
    """A file in memory that moves to a temporary one as it grows."""
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY))


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
    """What frames are converted to: pixel format, size, whether sides must be even, and whether RGB is
    scaled as PIL does it (exact) or planes as they are."""

    pix_fmt: str
    geometry: Geometry
    even: bool
    exact: bool

    def size(self, shape: Shape) -> tuple[int, int]:
        """Width and height of what frames of that shape are scaled to, pixels."""
        width, height = self.geometry.size(shape.width, shape.height)
        return (width - width % 2, height - height % 2) if self.even else (width, height)


class Writer:
    """An encoder and the mp4 around it, opened at the first frame. Use it as a context manager."""

    def __init__(self, codec: str, options: dict, layout: Layout, attributes: dict):
        self._codec, self._options, self._layout, self._attributes = codec, options, layout, attributes
        self._file = spool()
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream  # once there is a container
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

    def add(self, frame: av.VideoFrame, shape: Shape, number: int, time: float, rate: Fraction) -> None:
        """Encode a frame of the source as it is shown; `rate` is the frame rate of the file that is written."""
        if self._container is None:
            self._open(shape, rate)
        picture = self._convert(frame, shape)
        picture.pts, picture.time_base = len(self._numbers), 1 / rate
        picture.pict_type = 0
        self._write(self._stream.encode(picture))
        self._numbers.append(number)
        self._times.append(time)

    def finish(self) -> WrittenVideo:
        """Close the file. Raises VideoError if a frame is missing in it."""
        self._write(self._stream.encode(None))
        extradata = bytes(self._stream.codec_context.extradata or b"")
        width, height = self._stream.width, self._stream.height
        self.__exit__()
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
        return WrittenVideo(
            file=self._file, frames=frames, codec=self._codec, extension="mp4", extradata=extradata, width=width,
            height=height,
        )  # fmt: skip

    def _open(self, shape: Shape, rate: Fraction) -> None:
        # bitexact: no library version in the file
        self._container = av.open(self._file, "w", format="mp4", options={"fflags": "+bitexact"})
        stream = self._container.add_stream(self._codec, rate=rate, options=self._options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        stream.width, stream.height = self._layout.size(shape)
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
        assert self._container is not None, "packets come of frames, and the first opens it"
        for packet in packets:
            self._packets.add(packet, crc32c(packet) if self._codec == "mjpeg" else 0)
            self._container.mux(packet)

    def _convert(self, frame: av.VideoFrame, shape: Shape) -> av.VideoFrame:
        frame = standard_range(frame)
        width, height = self._stream.width, self._stream.height
        full = self._codec == "mjpeg"  # JPEG is BT.601 in full range, and what is small is BT.601
        if self._layout.exact:
            image = Image.fromarray(turned_rgb(frame, shape).to_ndarray())
            frame = av.VideoFrame.from_ndarray(
                np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), format="rgb24"
            )
        elif shape.rotation or shape.mirrored:
            frame = turned_rgb(frame, shape)
        weights = _WEIGHTS.get(frame.colorspace) if self._layout.pix_fmt.endswith("420p") else None
        picture = self._scaler.reformat(
            frame, width, height, self._layout.pix_fmt, interpolation=BICUBIC,
            dst_colorspace=Colorspace.ITU601 if weights is None else frame.colorspace, threads=1,
            dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        )  # fmt: skip
        return picture if weights is None else to_bt601(picture, weights, full)

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


# red's and blue's share of luma (ITU-T H.273, table 4), by libav's number of the matrix
_WEIGHTS = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
}


def to_bt601(frame: av.VideoFrame, weights: tuple[float, float], full: bool) -> av.VideoFrame:
    """A 4:2:0 frame whose luma has these `weights` of red and blue, as one of BT.601's; `full` range or limited.

    libswscale changes the matrix by way of 8-bit RGB, which costs two levels of a grey; here each value is rounded once.
    """
    luma, (cb, cr) = _plane(frame, 0), (_plane(frame, i).astype(np.float32) - 128 for i in (1, 2))
    to_y, to_cb, to_cr = _change_of_matrix(*weights)
    scale = 1 if full else 219 / 224
    more = (to_y[0] * cb + to_y[1] * cr) * scale
    height, width = luma.shape
    more = more.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    low, high = (0, 255) if full else (16, 235)
    planes = (
        np.clip(np.rint(luma + more), low, high),
        *(np.clip(np.rint(128 + a * cb + b * cr), 0 if full else 16, 255 if full else 240) for a, b in (to_cb, to_cr)),
    )
    out = av.VideoFrame(frame.width, frame.height, frame.format.name)  # the decoder may still refer to the other
    for plane, values in zip(out.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows)  # type: ignore[arg-type]  # any buffer will do
    out.colorspace, out.color_range = Colorspace.ITU601, frame.color_range
    return out


def _plane(frame: av.VideoFrame, i: int) -> np.ndarray:
    plane = frame.planes[i]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


@lru_cache
def _change_of_matrix(kr: float, kb: float) -> tuple[tuple[float, float], ...]:
    """What Cb and Cr of one matrix add to BT.601's Y, and what BT.601's Cb and Cr take of each; Y itself adds only to Y."""
    kg = 1 - kr - kb
    # Y, Cb, Cr -> R, G, B -> BT.601's Y, Cb, Cr (ITU-R BT.601, 2.5)
    to_rgb = np.array(
        [[1, 0, 2 * (1 - kr)], [1, -2 * kb * (1 - kb) / kg, -2 * kr * (1 - kr) / kg], [1, 2 * (1 - kb), 0]]
    )
    y = np.array([0.299, 0.587, 0.114])
    from_rgb = np.stack([y, (np.array([0, 0, 1]) - y) / 1.772, (np.array([1, 0, 0]) - y) / 1.402])
    change = from_rgb @ to_rgb
    return tuple((float(a), float(b)) for _, a, b in change)

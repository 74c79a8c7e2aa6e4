"""What a decoded frame looks like on a screen: which way up, in which shape and colours; and the extractor's grid."""

import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation, VideoReformatter

from shards import VideoError, memory

BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same on every processor
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
_NEWER = 16  # kinds of side data that may be newer than PyAV
_WIDEST = 20  # a pixel this many times as wide as high, or as high as wide, is a mistake of the file


@dataclass(frozen=True)
class Shape:
    """How decoded frames become what a player shows: turned by `rotation` degrees counter-clockwise (0, 90, 180, 270), then
    mirrored left to right if `mirrored`, `width` x `height` square pixels large."""

    width: int
    height: int
    rotation: int = 0
    mirrored: bool = False

    @property
    def unturned(self) -> tuple[int, int]:
        """Width and height before the turn."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)


def shape_of(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Shape:
    """The shape in which a player shows this frame; `pixel_aspect` is the width of its pixels over their height."""
    rotation, mirrored = orientation(frame)
    width, height = square_pixels(frame.width, frame.height, pixel_aspect)
    return Shape(*((height, width) if rotation % 180 else (width, height)), rotation, mirrored)


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """(degrees counter-clockwise, mirrored afterwards) of the frame's display matrix; of angles between, the nearest.

    The matrix takes a point (x, y), y pointing down, to (a*x + c*y, b*x + d*y) (ISO 14496-12, 6.2.2).
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives none of it where it cannot name all, such as EXIF
        matrix = _nameable(frame).side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    numbers = np.frombuffer(matrix, np.int32)  # type: ignore[call-overload]  # side data has the buffer protocol
    a, b, _, c, d = numbers[:5].astype(float).tolist()
    if a == b == c == d == 0:
        return 0, False
    fits = {}
    for turns, (p, q, r, s) in enumerate(((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))):
        fits[90 * turns, False] = a * p + b * q + c * r + d * s
        fits[90 * turns, True] = -a * p + b * q - c * r + d * s
    return max(fits, key=fits.__getitem__)


def _nameable(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame without the side data that are newer than PyAV's names."""
    graph = av.filter.Graph()
    last = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    known: list[int] = [kind.value for kind in SideData]  # type: ignore[misc]  # an enum of numbers
    newer = max(known) + 1
    for kind in range(newer, newer + _NEWER):
        before, last = last, graph.add("sidedata", f"mode=delete:type={kind}")
        before.link_to(last)
    sink = graph.add("buffersink")
    last.link_to(sink)
    graph.configure()
    graph.push(frame)
    return cast(av.VideoFrame, graph.pull())


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Width and height in square pixels; the side that is too short grows, so that nothing is lost."""
    if not aspect or aspect == 1 or not 1 / _WIDEST <= aspect <= _WIDEST:
        return width, height
    if aspect > 1:
        return max(1, round(width * aspect)), height
    return width, max(1, round(height / aspect))


def upright(frame: av.VideoFrame, shape: Shape | None = None) -> np.ndarray:
    """The frame as uint8 RGB [H, W, 3], the way a player shows it. Without `shape`: as the frame's own matrix turns it."""
    shape = shape or shape_of(frame, None)
    frame = standard_range(frame)
    if (frame.width, frame.height) == shape.unturned:
        return turned(frame.to_ndarray(format="rgb24"), shape)
    frame = frame.reformat(*shape.unturned, "rgb24", interpolation=BICUBIC)
    return turned(frame.to_ndarray(), shape)


def turned_rgb(frame: av.VideoFrame, shape: Shape) -> av.VideoFrame:
    """The frame as an RGB frame, turned and mirrored but in its own pixels."""
    if not frame.format.is_rgb and max(part.bits for part in frame.format.components) > 8:
        # libswscale's way from there to RGB loses two levels
        frame = frame.reformat(
            format="yuvj444p",
            interpolation=BICUBIC,
            dst_colorspace=frame.colorspace,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
    return av.VideoFrame.from_ndarray(turned(frame.to_ndarray(format="rgb24"), shape), format="rgb24")


def turned(picture: np.ndarray, shape: Shape) -> np.ndarray:
    """A picture [H, W, 3] in the frame's own direction, turned and mirrored as a player shows it."""
    if shape.rotation:
        picture = np.rot90(picture, shape.rotation // 90)
    if shape.mirrored:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)  # rows may come padded


def standard_range(frame: av.VideoFrame) -> av.VideoFrame:
    """PQ and HLG (BT.2100) brought to BT.709 by libswscale, white at 203 cd/m² (ITU-R BT.2408); others as they are."""
    if frame.color_trc not in _HDR:
        return frame
    scaler = _hdr_scaler(frame.width, frame.height, frame.format.name, frame.color_trc, frame.color_primaries)
    return scaler.reformat(
        frame, format="rgb24", dst_color_trc=ColorTrc.BT709, dst_color_primaries=ColorPrimaries.BT709, threads=1
    )


def refuse_unknown_colours(frame: av.VideoFrame) -> None:
    """Raise VideoError if libswscale does not know the frame's matrix, such as YCgCo or BT.2020 with constant luminance."""
    blank = av.VideoFrame(16, 16, frame.format.name)
    blank.colorspace, blank.color_range = frame.colorspace, frame.color_range
    try:
        blank.reformat(format="rgb24", threads=1)
    except (av.FFmpegError, ValueError) as error:
        memory.refuse_short(error)
        what = f"libswscale does not convert {frame.format.name} of matrix {int(frame.colorspace)} (ITU-T H.273) to RGB"
        raise VideoError(f"its colours are not known: {what}") from error


_scalers = threading.local()


def _hdr_scaler(*kind) -> VideoReformatter:
    """Making its table takes seconds: a thread keeps it for the next video of the same kind."""
    if getattr(_scalers, "kind", None) != kind:
        _scalers.kind, _scalers.scaler = kind, VideoReformatter()
    return _scalers.scaler


# ---- the extractor's grid ----


def grid(number: int, fps: Fraction, rate: int) -> bool:
    """Whether frame `number` is on the official extractor's grid at `rate` frames a second.

    Second s starts at frame s*int(fps); in it, frames k*max(1, int(fps)//rate) for k < rate are taken
    (CLIP4Clip `RawVideoExtractorCV2`, with the frame rate truncated as there).
    """
    per_second = max(1, int(fps))
    step = max(1, per_second // rate)
    inside = number % per_second
    return inside % step == 0 and inside // step < rate


def short(error: Exception) -> str:
    """A library's error in one short line."""
    return str(getattr(error, "strerror", None) or error).split("\n")[0][:160]

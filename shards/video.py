"""What a video file holds: its codec, size and times, and where in the file the bytes of each frame are."""

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from crc32c import crc32c

from shards.decode import UNKNOWN, Packets, Pass, open_video
from shards.frames import VideoError, grid, scaled_size, upright
from shards.pick import pick_frames
from shards.schema import FrameTable

__all__ = [
    "Source", "VideoError", "describe", "grid", "open_video", "pick_frames", "scaled_size", "scan", "unsliced",
    "upright",
]  # fmt: skip

_HEADER = 64  # bytes that may stand between where a container says a packet is and where its data begins


@dataclass(frozen=True)
class Source:
    """What a video file holds, or a cut of it: `frames` are those of the cut. Width and height are as displayed,
    `duration` is in seconds, and `rotation` is what is to be done to decoded frames."""

    codec: str
    width: int
    height: int
    rotation: int
    fps: Fraction
    duration: float
    extradata: bytes
    frames: FrameTable


def scan(file: BinaryIO | bytes) -> Source:
    """Decode the whole file once and describe it, with the place of every frame's bytes.

    Raises VideoError at the first frame that does not decode, and where the file ends before its header says.
    """
    file = as_file(file)
    with Pass(file, on_packet=lambda packets, packet: packets.add(packet, crc32c(packet))) as whole:
        for _ in whole.frames():
            pass
        return describe(whole, _frame_table(file, whole))


def as_file(file: BinaryIO | bytes) -> BinaryIO:
    """A seekable file of what may be bytes."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def describe(done: Pass, frames: FrameTable) -> Source:
    """What a finished pass has seen of its file."""
    stream, first = done.stream, done.first
    turned = first.rotation % 180 != 0
    if (done.start, done.end) != (0.0, math.inf):
        duration = done.times[-1] + float(1 / done.fps)  # the last frame is shown for as long as any
    elif stream.duration:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = len(done.times) / float(done.fps)
    return Source(
        codec=av.Codec(done.context.name, "r").canonical_name,
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        rotation=first.rotation,
        fps=Fraction(done.fps).limit_denominator(100_000),
        duration=duration,
        extradata=bytes(done.context.extradata or b""),
        frames=frames,
    )


def unsliced(times) -> FrameTable:
    """The frame table of frames whose bytes are not looked for: readers decode through the container."""
    count = len(times)
    nowhere, none = np.full(count, -1), np.zeros(count)
    return FrameTable(
        number=np.arange(count, dtype=np.int32),
        time=np.asarray(times, np.float64),
        offset=nowhere.astype(np.int64),
        size=nowhere.astype(np.int32),
        key=np.arange(count) == 0,
        crc32c=none.astype(np.uint32),
    )


def _frame_table(file: BinaryIO, done: Pass) -> FrameTable:
    """Join frames and packets by presentation stamp. Where that is not one to one, or packets are not in the file in
    decode order and one piece, offsets are -1."""
    packets, stamps = done.packets, np.asarray(done.stamps)
    pts = np.asarray(packets.pts)
    order, shown = np.argsort(pts, kind="stable"), np.argsort(stamps, kind="stable")
    if (
        len(pts) != len(stamps)
        or UNKNOWN in pts
        or (np.diff(pts[order]) == 0).any()
        or not np.array_equal(pts[order], stamps[shown])
    ):
        return unsliced(done.times)
    offsets = _locate(file, packets)
    if offsets is None:
        return unsliced(done.times)
    rows = np.empty(len(pts), np.int64)  # frame -> packet
    rows[shown] = order
    return FrameTable(
        number=np.arange(len(pts), dtype=np.int32),
        time=np.asarray(done.times, np.float64),
        offset=offsets[rows],
        size=np.asarray(packets.size, np.int32)[rows],
        key=np.asarray(packets.key, bool)[rows],
        crc32c=np.asarray(packets.crc, np.uint32)[rows],
    )


def _locate(file: BinaryIO, packets: Packets) -> np.ndarray | None:
    """Offsets of the packets' bytes, int64 [packets]; None if they do not stand in the file in order and one piece.

    MP4 states the offset; Matroska states where the block begins, a few bytes before; MPEG-TS cuts packets up.
    """
    offsets, shift, last = np.empty(len(packets), np.int64), 0, -1
    for i in range(len(packets)):
        place, size, crc = packets.place[i], packets.size[i], packets.crc[i]
        if place < 0:
            return None
        file.seek(place)
        window = memoryview(file.read(size + _HEADER))
        for guess in (shift, *range(min(_HEADER, len(window) - size) + 1)):
            if crc32c(window[guess : guess + size]) == crc:
                shift = guess
                break
        else:
            return None
        offsets[i] = place + shift
        if offsets[i] <= last:
            return None
        last = offsets[i]
    return offsets

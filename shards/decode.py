"""One pass over the frames of a video file: all of them, or a cut, decoding no more than what is wanted needs.

Two ways. The exact one starts at the beginning, decodes everything and counts what comes out. The thrifty one goes to
the keyframe before the cut, reads each packet's number off the stamps of the packets around it, and leaves out
packets that nobody wants and no other frame refers to; whatever it meets that it did not expect makes it give up with
`Unpredictable`, and the exact way decides.
"""

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av

from shards.frames import VideoError, short

av.logging.set_level(av.logging.PANIC)  # libav's own lines say nothing that our errors do not

UNKNOWN = -(2**63)  # a packet without stamp or place
_LOOK_AHEAD = 300  # packets held back while their number is not certain; codecs reorder by 16 at most
_BUFFER = 1 << 18  # bytes a read


class Unpredictable(Exception):
    """The thrifty way cannot be sure of this file: decode it the exact way."""


@dataclass(frozen=True)
class Shown:
    """A frame of the cut: its number and its time in seconds, both from the first frame of the cut on."""

    number: int
    time: float
    frame: av.VideoFrame


class Packets:
    """Stamp, place in the file, size, keyframe and crc32c of packets, in decode order; 29 bytes each."""

    def __init__(self):
        self.pts, self.place, self.size = array("q"), array("q"), array("i")
        self.key, self.crc = array("b"), array("I")

    def __len__(self) -> int:
        return len(self.pts)

    def add(self, packet: av.Packet, crc: int = 0) -> None:
        self.pts.append(UNKNOWN if packet.pts is None else packet.pts)
        self.place.append(-1 if packet.pos is None else packet.pos)
        self.size.append(packet.size)
        self.key.append(packet.is_keyframe)
        self.crc.append(crc)


def open_video(file: BinaryIO) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open an encoded video at the beginning of a seekable file; it is read as far as needed, never all into memory.

    The stream is the first that is a video and not a cover picture. Raises VideoError if there is none.
    """
    file.seek(0)
    if not file.read(1):
        raise VideoError("the file is empty (0 bytes)")
    file.seek(0)
    try:
        container = av.open(file, "r", metadata_errors="ignore", buffer_size=_BUFFER)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"not a readable video file ({short(error)})") from error
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition).lower()]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["none"]
        container.close()
        raise VideoError(f"no video stream in the file (streams: {', '.join(kinds)})")
    stream = streams[0]
    if stream.codec_context is None:
        container.close()
        raise VideoError("no decoder for its video stream")
    stream.codec_context.thread_count = 1  # the packer runs one process a core
    return container, stream


def decode(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Every packet that is decoded for packing goes through here."""
    return context.decode(packet)


class Pass:
    """A pass over the frames with start <= time < end, seconds from the file's first frame.

    `wanted(number)`, where given, says which frames `frames()` hands over. Afterwards `times` holds the seconds of all
    frames of the cut, shown or not, and `packets` what was read. Use it as a context manager.
    """

    def __init__(self, file: BinaryIO, start: float = 0.0, end: float = math.inf, on_packet: Callable | None = None):
        self.container, self.stream = open_video(file)
        self.context = self.stream.codec_context
        self.start, self.end = start, end
        base = self.stream.time_base
        self._tick = base.numerator, base.denominator  # a stamp's unit, seconds; in integers, since packets are many
        # the cut in stamps from the first frame on; -inf and inf where it is open
        self._from = math.ceil(_decimal(start) / base) if start > 0 else -math.inf
        self._to = math.ceil(_decimal(end) / base) if end < math.inf else math.inf
        self.packets, self.times = Packets(), array("d")
        self.stamps = array("q")
        self.first: av.VideoFrame | None = None
        self._on_packet = on_packet
        self.fps: Fraction = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        if not self.fps or self.fps <= 0:
            self.container.close()
            raise VideoError("the file states no frame rate")

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def frames(self, wanted: Callable[[int], bool] | None = None, *, thrifty: bool = False) -> Iterator[Shown]:
        """The wanted frames in display order. Raises VideoError at the first that does not decode."""
        if thrifty:
            try:
                yield from self._thrifty(wanted or (lambda number: True))
            except (av.FFmpegError, ValueError) as error:
                raise Unpredictable(str(error)) from error
        else:
            try:
                yield from self._exact(wanted or (lambda number: True))
            except VideoError:
                raise
            except (av.FFmpegError, ValueError) as error:
                raise VideoError(f"decoding fails after frame {len(self.times)} ({short(error)})") from error
        if not self.times:
            raise VideoError(
                "not one frame decodes" if (self.start, self.end) == (0.0, math.inf)
                else f"no frame between {self.start:g} and {self.end:g} s"
            )  # fmt: skip

    # ---- the exact way ----

    def _exact(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        seen, zero, origin = 0, None, 0.0
        for packet in self.container.demux(self.stream):
            if packet.size:
                self._on_packet(self.packets, packet) if self._on_packet else self.packets.add(packet)
                if packet.is_corrupt:
                    raise VideoError(f"packet {len(self.packets) - 1} is damaged")
            for frame in decode(self.context, packet if packet.size else None):
                if frame.is_corrupt:
                    raise VideoError(f"frame {seen} is damaged")
                if seen == 0:
                    self.first, zero = frame, frame.pts
                if frame.pts is not None and zero is not None:
                    time, before = self._seconds(frame.pts - zero), frame.pts - zero < self._from
                    after = frame.pts - zero >= self._to
                else:
                    time = float(seen / self.fps)
                    before, after = time < self.start - 1e-6, time >= self.end - 1e-6
                seen += 1
                if before:
                    continue
                if after:
                    return
                if not self.times:
                    origin = time
                number = len(self.times)
                self.times.append(time - origin)
                self.stamps.append(UNKNOWN if frame.pts is None else frame.pts)
                if wanted(number):
                    yield Shown(number, self.times[-1], frame)
        if seen:
            self._refuse_cut_short()

    def _seconds(self, stamp: int) -> float:
        return stamp * self._tick[0] / self._tick[1]

    def _refuse_cut_short(self) -> None:
        known, found = self.stream.frames, len(self.packets)
        if found < known:
            raise VideoError(f"the file is cut short: its header promises {known} frames, {found} are there")

    # ---- the thrifty way ----

    def _thrifty(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        context, intra_only = self.context, self.context.codec.intra_only
        skips, skipping = _skips_exactly(context), False
        due: dict[int, int] = {}  # {stamp: number} of frames to come
        last = -math.inf
        for packet, number in self.numbered():
            use = number is not None and wanted(number)
            if use:
                due[packet.pts] = number
            elif intra_only and packet is not None:
                continue
            if skips and skipping == use:
                skipping = not use
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            for frame in decode(context, packet):
                pts = frame.pts
                if pts is None or pts <= last or frame.is_corrupt or frame.interlaced_frame:
                    raise Unpredictable("frames do not come as their packets promise")
                last = pts
                if self.first is None:
                    self.first = frame
                if pts in due:
                    found = due.pop(pts)
                    yield Shown(found, self.times[found], frame)
        if due:
            raise Unpredictable(f"{len(due)} packets gave no frame")

    def numbered(self) -> Iterator[tuple[av.Packet | None, int | None]]:
        """Packets in decode order, each with its frame's number in the cut (None: outside), and (None, None) at the end.

        A decode stamp is never above the presentation stamps that are still to come, so the number of a packet is
        certain once a decode stamp has reached its presentation stamp.
        """
        origin: int | None = None
        waiting: deque[av.Packet] = deque()
        pending: list[int] = []  # heap of stamps without number
        numbers: dict[int, int | None] = {}
        zero = self._zero() if self.start > 0 else None  # else the first stamp that settles
        settled, count = -math.inf, 0

        def settle(below: float) -> None:
            nonlocal zero, settled, count, origin
            while pending and pending[0] <= below:
                pts = heapq.heappop(pending)
                if pts <= settled:
                    raise Unpredictable("two packets with one stamp, or stamps out of order")
                settled = pts
                zero = pts if zero is None else zero
                if not self._from <= pts - zero < self._to:
                    numbers[pts] = None
                    continue
                origin = pts if origin is None else origin
                self.times.append(self._seconds(pts - origin))
                self.stamps.append(pts)
                numbers[pts], count = count, count + 1

        for packet in self._from_keyframe(zero):
            if packet.pts is None or packet.is_corrupt or packet.is_discard:
                raise Unpredictable("packets without stamp, damaged, or not to be shown")
            reached = -math.inf if packet.dts is None else packet.dts  # who gets the packet may change it
            self.packets.add(packet)
            waiting.append(packet)
            heapq.heappush(pending, packet.pts)
            settle(reached)
            while waiting and waiting[0].pts in numbers:
                first = waiting.popleft()
                yield first, numbers.pop(first.pts)
            if len(waiting) > _LOOK_AHEAD:
                raise Unpredictable("stamps do not say in which order frames are shown")
            if zero is not None and reached - zero >= self._to:
                break
        else:
            if self.start <= 0:
                self._expect_all()
        settle(math.inf)
        rest = list(waiting)
        while rest and numbers[rest[-1].pts] is None:
            rest.pop()  # shown at or after the end, and nothing that is wanted comes after it
        for packet in rest:
            yield packet, numbers[packet.pts]
        yield None, None

    def _expect_all(self) -> None:
        if len(self.packets) < self.stream.frames:
            raise Unpredictable("fewer packets than the header promises")

    def _from_keyframe(self, zero: int | None) -> Iterator[av.Packet]:
        """Packets from the last keyframe on that is shown no later than the start of the cut."""
        key: int | None = None
        for packet in self.container.demux(self.stream) if zero is None else self._seek(zero):
            if not packet.size:
                continue
            if key is None:
                key = packet.pts
                if key is None or not packet.is_keyframe:
                    raise Unpredictable("it does not begin with a keyframe")
            if packet.pts is not None and packet.pts < key:
                if self.start <= 0:
                    raise Unpredictable("frames are shown before the first keyframe")
                continue  # refers to what is before the keyframe, and is shown before the cut
            yield packet

    def _zero(self) -> int:
        """The stamp of the first frame shown."""
        stamps: list[int] = []
        for packet in self.container.demux(self.stream):
            if packet.pts is None or packet.is_discard:  # among them the empty one at the end
                break
            stamps.append(packet.pts)
            if len(stamps) > 1 and packet.dts is not None and packet.dts >= min(stamps):
                break
        if not stamps:
            raise Unpredictable("the file does not say when it starts")
        return min(stamps)

    def _seek(self, zero: int) -> Iterator[av.Packet]:
        base = self.stream.time_base
        target = zero + self._from
        back = Fraction(0)
        while True:
            aim = target - int(back / base)
            self.container.seek(max(aim, zero), stream=self.stream, backward=True)
            self.context.flush_buffers()
            packets = self.container.demux(self.stream)
            for packet in packets:
                if packet.size and packet.is_keyframe and packet.pts is not None:
                    break
            else:
                raise Unpredictable("no keyframe behind the place it was sought at")
            if packet.pts <= target:
                yield packet
                yield from packets
                return
            if aim <= zero:
                raise Unpredictable("no keyframe before the start of the cut")
            back = back * 3 or Fraction(1)  # seconds


def _decimal(seconds: float) -> Fraction:
    """What was meant: 0.4 is 2/5 and not the float next to it, or the frame at 10/25 s would fall out of the cut."""
    return Fraction(seconds).limit_denominator(1_000_000)


def _skips_exactly(context: av.VideoCodecContext) -> bool:
    """Whether libav leaves out just the frames to which no other refers when it is told to skip those."""
    if context.codec.canonical_name == "hevc":  # with temporal layers, higher ones may refer to them
        extra = context.extradata or b""
        return len(extra) > 22 and extra[0] == 1 and (extra[21] >> 3) & 7 == 1  # numTemporalLayers, ISO 14496-15 8.3.3
    return context.codec.canonical_name == "h264"

"""A pass over the frames of a video file: all of them, or a cut, decoding no more than what is wanted needs.

When each frame is shown is known before the first is decoded. There are three ways to know it, from the cheapest on; each
gives up with `Unpredictable` where it meets what it did not expect, and the next one decides.

    stamps    by the packets' time stamps. A cut begins at the keyframe before it; packets that nobody wants and no other
              frame refers to are not decoded
    all       the same, and every packet is decoded (interlaced video)
    order     of containers without time stamps: what the decoder gives are the packets' places in the file, in order
    decoding  the whole file is decoded once to see what comes out, and a second time for the pictures
"""

import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

from shards import VideoError
from shards.video.picture import Shape, grid, shape_of, short
from shards.video.probe import (
    JUMP,
    UNKNOWN,
    Packets,
    Timeline,
    clock_zero,
    edits_twice,
    has_jumps,
    increasing,
    locally_sorted,
    nearest,
    open_video,
    refuse_cut_short,
    stores_no_stamps,
    timeline,
)

WAYS = ("stamps", "all", "order", "decoding")
_MARKED = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video"}  # parsers find their keyframes
_MARGIN = 1.0  # seconds read beyond the end of a cut
_LAST_OF_A_RECORDING = 2  # packets that the end of a joined recording may mark as damaged
_REORDERED = 17  # frames that a decoder holds back at most, and the one it was given


class Unpredictable(Exception):
    """This way cannot be sure of the file: another one has to decide."""


@dataclass(frozen=True)
class Shown:
    """A frame of the cut: its number, counted from the first frame of the cut, and its time in seconds (see Timeline)."""

    number: int
    time: float
    frame: av.VideoFrame


def decode(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Every packet that is decoded for packing goes through here."""
    return context.decode(packet)


class Pass:
    """A pass over the frames with start <= time < end, in seconds of the clock that a player shows.

    `timeline` says when each is shown. `packets` are those that were read for it, `ranks` their frames' numbers in the cut
    (-1: outside; only by stamps). After `frames` has given the first frame, `shape` is how frames are shown. Use it as a
    context manager. Raises VideoError for a file that cannot be used, Unpredictable if another way has to decide.
    """

    def __init__(
        self, file: BinaryIO, start: float = 0.0, end: float = math.inf, way: str = "stamps",
        on_packet: Callable[[Packets, av.Packet], None] = Packets.add,
    ):  # fmt: skip
        self._file, self.start, self.end, self._way = file, start, end, way
        self._on_packet = on_packet
        self.container, self.stream = open_video(file)
        self.packets, self.ranks = Packets(), np.zeros(0, np.int32)
        self.shape: Shape | None = None
        self._inside_gop = False  # whether the file begins with frames that cannot be decoded
        self._zero = 0  # stamp of the first frame shown
        self._range = 0, 0  # of all frames those of the cut, where all are decoded
        try:
            with _library_errors(Unpredictable if way != "decoding" else None):
                plans = {"order": self._by_order, "decoding": self._by_decoding}
                self.timeline: Timeline = plans.get(way, self._by_stamps)()
        except BaseException:
            self.container.close()
            raise

    @property
    def context(self) -> av.VideoCodecContext:
        return self.stream.codec_context

    @property
    def whole(self) -> bool:
        return self.start <= 0 and self.end == math.inf

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def frames(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Shown]:
        """The wanted frames in display order. Raises VideoError at the first that does not decode."""
        with _library_errors(Unpredictable if self._way != "decoding" else None):
            yield from self._decode_all(wanted) if self._way in ("order", "decoding") else self._decode_stamped(wanted)

    def _note_shape(self, frame: av.VideoFrame) -> None:
        if self.shape is None:
            self.shape = shape_of(frame, self.stream.sample_aspect_ratio)

    # ---- by stamps ----

    def _by_stamps(self) -> Timeline:
        zero = None if self.whole else self._first_shown()
        if not self.whole and edits_twice(self.container, self.stream):
            raise Unpredictable("its edit list shows parts of the file in another order, or apart")
        for packet in self._from_keyframe(zero):
            if packet.pts is None or packet.is_corrupt:
                raise Unpredictable("packets without stamp, or damaged")
            self._on_packet(self.packets, packet)
            if zero is not None and packet.dts is not None and packet.dts >= self._stamp(zero, self.end):
                break
        packets = self.packets
        if self.whole:
            refuse_cut_short(self._file, self.container, self.stream, packets)
        if not packets:
            raise Unpredictable("no packets")
        self._refuse_odd(np.asarray(packets.pts), np.asarray(packets.dts))
        if self.start > 0:
            self._refuse_false_keys()
            if has_jumps(self.container):
                packets = self._drop_before(self._stamp(zero, self.start))
        pts = np.asarray(packets.pts)
        order = np.argsort(pts, kind="stable")
        if (np.diff(pts[order]) == 0).any():
            raise Unpredictable("two packets with one stamp")
        shown = order[np.asarray(packets.discard)[order] == 0]
        if not len(shown):
            raise VideoError("not one frame is shown: its edit list hides all of them")
        zero = self._zero = int(pts[shown[0]]) if zero is None else zero
        # compared as integers: a frame at exactly the start or the end of the cut must not fall on the wrong side
        inside = shown[(pts[shown] >= self._stamp(zero, self.start)) & (pts[shown] < self._stamp(zero, self.end))]
        if not len(inside):
            self._refuse_empty()
        self.ranks = np.full(len(packets), -1, np.int32)
        self.ranks[inside] = np.arange(len(inside))
        times = np.maximum(self.seconds(pts[inside]), 0.0)  # what is rounded must not fall before the cut
        told = [packets.duration[i] * self._tick for i in inside[-2:]]
        return timeline(times, (told[0], told[-1]), self._claimed, self._tick)

    def _refuse_odd(self, pts: np.ndarray, dts: np.ndarray) -> None:
        known = dts[dts != UNKNOWN]
        if (np.diff(known) < 0).any() or (pts < dts).any():
            raise Unpredictable("stamps out of order")
        if (self.start <= 0 or has_jumps(self.container)) and (pts < pts[0]).any():
            raise Unpredictable("frames are shown before the first keyframe")
        if stores_no_stamps(self.container) and not np.array_equal(pts, dts):
            raise Unpredictable("the container stores no time of presentation")
        if has_jumps(self.container) and len(known) > 1 and np.diff(known).max() * self._tick > JUMP:
            raise Unpredictable("stamps jump")

    def _refuse_false_keys(self) -> None:
        """A cut begins at a keyframe. Containers of old codecs mark them wrongly, and some mark every packet."""
        codec = self.context.codec
        if codec.intra_only:
            return
        if codec.canonical_name not in _MARKED or (len(self.packets) > 2 and all(self.packets.key)):
            raise Unpredictable("which frames are keyframes is not certain")

    def _drop_before(self, target: float) -> Packets:
        """The packets from the last keyframe on that is shown no later than `target`, of all from the beginning."""
        pts, key = np.asarray(self.packets.pts), np.asarray(self.packets.key, bool)
        first = max(np.flatnonzero(key & (pts <= target)).tolist(), default=0)
        self.packets = self.packets.only([i for i in range(first, len(pts)) if pts[i] >= pts[first]])
        return self.packets

    @property
    def _tick(self) -> float:
        return float(self.stream.time_base)

    @property
    def _claimed(self) -> Fraction | None:
        return self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate

    def _stamp(self, first: int, seconds: float) -> float:
        """The first stamp at or after a player's clock shows `seconds`; `first` is that of the first frame shown."""
        if math.isinf(seconds) or seconds <= 0:
            return math.inf if seconds > 0 else -math.inf
        base = self.stream.time_base
        return math.ceil((_decimal(seconds) + clock_zero(self.container, first * base)) / base)

    def seconds(self, stamps: np.ndarray) -> np.ndarray:
        """Stamps as seconds of the player's clock, from the start of the cut on. Only by stamps."""
        return self._clock(stamps, self._zero, _decimal(max(0.0, self.start)))

    def _clock(self, stamps: np.ndarray, first: int, start: Fraction | int = 0) -> np.ndarray:
        """Stamps as seconds of the player's clock since `start`; `first` is the stamp of the first frame shown."""
        base = self.stream.time_base
        origin = clock_zero(self.container, first * base) + start
        whole = math.floor(origin / base)  # in ticks; so only a rest is rounded
        return (stamps - whole) * base.numerator / base.denominator - float(origin - whole * base)

    def _first_shown(self) -> int:
        """The stamp of the first frame shown."""
        stamps: list[int] = []
        for place, packet in enumerate(self.container.demux(self.stream)):
            if packet.pts is None:  # among them the empty one at the end
                break
            if place == 0 and not packet.is_keyframe:
                self._reopen()
                return self._first_decoded()
            if not packet.is_discard:
                stamps.append(packet.pts)
            if len(stamps) > 1 and packet.dts is not None and packet.dts >= min(stamps):
                break
        if not stamps:
            raise Unpredictable("the file does not say when it starts")
        return min(stamps)

    def _first_decoded(self) -> int:
        """The stamp of the first frame shown, of a file that begins inside a GOP: its first keyframe, or another way decides."""
        key = None
        for packet in self.container.demux(self.stream):
            if packet.is_keyframe and key is None:
                key = packet.pts
            for frame in decode(self.context, packet if packet.size else None):
                if frame.pts is None or frame.pts != key:
                    raise Unpredictable("frames are shown before the first keyframe")
                self._inside_gop = True
                return key
        raise Unpredictable("not one frame decodes")

    def _from_keyframe(self, zero: int | None) -> Iterator[av.Packet]:
        """Packets from the last keyframe on that is shown no later than the start of the cut; `zero`: of the first frame."""
        key: int | None = None
        seeks = self.start > 0 and not has_jumps(self.container)  # a jump before the cut would not be seen
        if zero is not None and not seeks:
            self._reopen()  # to go back
        for packet in self._seek(zero) if seeks else self.container.demux(self.stream):
            if not packet.size:
                continue
            if key is None and self._inside_gop and not packet.is_keyframe:
                continue
            if key is None and self.whole and not self._inside_gop and not packet.is_keyframe:
                self._reopen()
                self._first_decoded()
                self._reopen()
                yield from self._from_keyframe(None)
                return
            if key is None:
                key = packet.pts
                if key is None or not packet.is_keyframe:
                    raise Unpredictable("it does not begin with a keyframe")
            if (seeks or self._inside_gop) and packet.pts is not None and packet.pts < key:
                continue  # refers to what is before the keyframe, and is shown before the cut
            yield packet

    def _seek(self, zero: int) -> Iterator[av.Packet]:
        base = self.stream.time_base
        target = self._stamp(zero, self.start)
        back = Fraction(0)
        while True:
            aim = target - int(back / base)
            self.container.seek(max(aim, zero), stream=self.stream, backward=True)
            self.context.flush_buffers()
            packets = self.container.demux(self.stream)
            for packet in packets:
                if packet.size and packet.is_keyframe and packet.pts is not None:
                    break
            if packet.size and packet.is_keyframe and packet.pts is not None and packet.pts <= max(target, zero):
                yield packet
                yield from packets
                return
            if aim <= zero:  # where seeking is not exact
                self._reopen()
                yield from self.container.demux(self.stream)
                return
            back = back * 3 or Fraction(1)  # seconds

    def again(self) -> Iterator[tuple[av.Packet | None, int]]:
        """The packets that a decoder needs, each with its frame's number in the cut (-1: outside), and (None, -1) at the end."""
        last = int(np.flatnonzero(self.ranks >= 0)[-1]) if not self.whole else len(self.packets) - 1
        place = 0
        for packet in self._rewound():
            if place > last:
                break
            if packet.pts is None or packet.pts != self.packets.pts[place]:
                if packet.pts is not None and place and packet.pts < self.packets.pts[0]:
                    continue  # as in _from_keyframe
                raise Unpredictable("the second reading differs from the first")
            yield packet, int(self.ranks[place])
            place += 1
        if place <= last:
            raise Unpredictable("the second reading ends before the first")
        yield None, -1

    def _rewound(self) -> Iterator[av.Packet]:
        first = self.packets
        if first.place[0] >= 0 and not has_jumps(self.container):
            packets: Iterator[av.Packet] = iter(())
            with suppress(av.FFmpegError):
                self.container.seek(first.pts[0], stream=self.stream, backward=True)
                packets = (p for p in self.container.demux(self.stream) if p.size)
            self.context.flush_buffers()
            packet = next(packets, None)
            if packet is not None and (packet.pos, packet.pts) == (first.place[0], first.pts[0]):
                yield packet
                yield from packets
                return
        self._reopen()
        found = False
        for packet in self.container.demux(self.stream):
            found = found or (packet.size > 0 and (packet.pos, packet.pts) == (first.place[0], first.pts[0]))
            if found and packet.size:
                yield packet

    def _reopen(self) -> None:
        self.container.close()
        self.container, self.stream = open_video(self._file)

    def _decode_stamped(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        context, intra_only = self.context, self.context.codec.intra_only
        skips, skipping, changed = self._way == "stamps" and skips_exactly(context), False, context
        due: dict[int, int] = {}  # {stamp: number} of frames to come
        last = -math.inf
        for packet, number in self.again():
            if changed is not self.context:  # reopened
                context = changed = self.context
                skipping = False
            use = number >= 0 and wanted(number)
            if use:
                due[packet.pts] = number
            elif intra_only and packet is not None:
                continue
            if skips and skipping == use:
                skipping = not use
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            for frame in decode(context, packet):
                pts = frame.pts
                interlaced = frame.interlaced_frame and self._way == "stamps"
                if pts is None or pts <= last or frame.is_corrupt or interlaced:
                    raise Unpredictable("frames do not come as their packets promise")
                last = pts
                self._note_shape(frame)
                if pts in due:
                    found = due.pop(pts)
                    yield Shown(found, float(self.timeline.times[found]), frame)
        if due:
            raise Unpredictable(f"{len(due)} packets gave no frame")

    # ---- in order ----

    def _by_order(self) -> Timeline:
        if not stores_no_stamps(self.container):
            raise Unpredictable("the container stores times of presentation")
        tick, claimed = self._tick, self._claimed
        packets = self.packets
        for packet in self.container.demux(self.stream):
            if packet.size:
                if packet.is_corrupt:
                    raise VideoError(f"packet {len(packets)} is damaged")
                self._on_packet(packets, packet)
                if packet.dts is not None and packet.dts * tick > self.end + _MARGIN:
                    break
        else:
            refuse_cut_short(self._file, self.container, self.stream, packets)
        if not packets:
            raise VideoError("not one frame decodes")
        dts = np.asarray(packets.dts)
        if (dts == UNKNOWN).all() and claimed:
            at, tick = np.arange(len(dts)) / float(claimed), float(1 / claimed)
            every, told = at - at[0], (tick, tick)
        elif (dts == UNKNOWN).any() or (np.diff(dts) <= 0).any():
            raise Unpredictable("stamps out of order")
        else:
            every = self._clock(dts, int(dts[0]))
            told = (packets.duration[-2] * tick if len(dts) > 1 else 0.0, packets.duration[-1] * tick)
        return self._cut(every, told, tick)

    def _cut(self, every: np.ndarray, told: tuple[float, float], tick: float) -> Timeline:
        """Of the times of all frames those of the cut, from its start on; `_range` is which they are."""
        eps = min(1e-6, tick / 4)
        low, high = np.searchsorted(every, [self.start - eps, self.end - eps]) if not self.whole else (0, len(every))
        self._range = int(low), int(high)
        if low >= high:
            self._refuse_empty()
        told = told if high == len(every) else (0.0, 0.0)
        return timeline(np.maximum(every[low:high] - max(0.0, self.start), 0.0), told, self._claimed, tick)

    def _refuse_empty(self) -> None:
        raise VideoError(
            "not one frame decodes" if self.whole else f"no frame between {self.start:g} and {self.end:g} s"
        )

    def _decode_all(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        """The wanted frames of the range, decoding from the beginning of the file."""
        self._reopen()
        low, high = self._range
        given = seen = 0
        for packet in self.container.demux(self.stream):
            given += packet.size > 0
            for frame in self._frames_of(packet, seen):
                self._note_shape(frame)
                number, seen = seen - low, seen + 1
                if 0 <= number < high - low and wanted(number):
                    yield Shown(number, float(self.timeline.times[number]), frame)
            if seen >= high and not self.whole:
                if self._way == "order" and given - seen > _REORDERED:
                    raise Unpredictable("packets without a frame of their own")
                return
        if self._way == "order" and seen != len(self.packets):
            raise Unpredictable(f"{seen} frames of {len(self.packets)} packets")
        if seen < high:
            raise VideoError(f"{high} frames decode the first time, {seen} the second")

    def _frames_of(self, packet: av.Packet, seen: int) -> list[av.VideoFrame]:
        try:
            frames = decode(self.context, packet if packet.size else None)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"decoding fails after frame {seen} ({short(error)})") from error
        if any(frame.is_corrupt for frame in frames):
            raise VideoError(f"frame {seen + [f.is_corrupt for f in frames].index(True)} is damaged")
        return frames

    # ---- by decoding ----

    def _by_decoding(self) -> Timeline:
        packets = self.packets
        stamps, came, durations = array("q"), array("q"), array("q")  # of each frame; `came`: the packet it came at
        clock, latest = 0.0, None
        suspect = None  # place of a packet that is marked as damaged
        for packet in self.container.demux(self.stream):
            if suspect is not None and self._jumps(packets, packet):
                suspect = None
            if suspect is not None and (not packet.size or len(packets) - suspect > _LAST_OF_A_RECORDING):
                raise VideoError(f"packet {suspect} is damaged")
            if packet.is_corrupt:
                suspect = len(packets)
            if packet.size:
                self._on_packet(packets, packet)
            for frame in self._frames_of(packet, len(stamps)):
                if frame.pts is not None:
                    step = 0.0 if latest is None else (frame.pts - latest) * self._tick
                    clock += step if 0 < step < JUMP else 0.0
                    latest = frame.pts if latest is None or step > 0 or step < -JUMP else latest
                stamps.append(UNKNOWN if frame.pts is None else frame.pts)
                durations.append(frame.duration or 0)
                came.append(len(packets) - 1 if packet.size else len(packets) + len(stamps))
            if clock > self.end + _MARGIN:
                break
        else:
            refuse_cut_short(self._file, self.container, self.stream, packets)
        if not stamps:
            raise VideoError("not one frame decodes")
        at = np.asarray(stamps)
        if stores_no_stamps(self.container):
            at = self._places(np.asarray(came))
        known = np.flatnonzero(at != UNKNOWN)
        interval = self._interval(at[known])
        if len(known):  # what has no stamp follows the one before
            before = np.maximum.accumulate(np.where(at != UNKNOWN, np.arange(len(at)), -1))
            back = np.where(before < 0, known[0], before)
            at = at[back] + np.rint((np.arange(len(at)) - back) * interval / self._tick).astype(np.int64)
        else:
            at = np.rint(np.arange(len(at)) * interval / self._tick).astype(np.int64)
        if not has_jumps(self.container):
            at = locally_sorted(at)
        longest = JUMP / self._tick if has_jumps(self.container) else math.inf
        at = increasing(at, max(1, round(interval / self._tick)), longest)
        told = (durations[-2] * self._tick if len(durations) > 1 else 0.0, durations[-1] * self._tick)
        return self._cut(self._clock(at, int(at[0])), told, self._tick)

    def _jumps(self, before: Packets, packet: av.Packet) -> bool:
        """Whether stamps jump, as where two recordings were joined. The last packets of the first are then marked as damaged,
        since counters do not go on, and are whole; whether their pictures are, the decoder says."""
        if not has_jumps(self.container) or packet.dts is None or not before or before.dts[-1] == UNKNOWN:
            return False
        return not 0 <= (packet.dts - before.dts[-1]) * self._tick < JUMP

    def _places(self, came: np.ndarray) -> np.ndarray:
        """Stamps of frames by the packets they came at, less those that the decoder holds back; -2**63: not known."""
        dts = np.asarray(self.packets.dts)
        if (dts == UNKNOWN).any():
            return np.full(len(came), UNKNOWN)
        flushed = came >= len(dts)
        places = came - came[0] if not flushed.all() else np.arange(len(came))
        if flushed.any() and not flushed.all():
            first = int(np.flatnonzero(flushed)[0])
            places[first:] = places[first - 1] + 1 + np.arange(len(came) - first)
        if len(dts) == len(came):
            places = np.arange(len(came))
        return np.where(places < len(dts), dts[np.minimum(places, len(dts) - 1)], UNKNOWN)

    def _interval(self, stamps: np.ndarray) -> float:
        """Seconds between two frames, most of the time."""
        steps = np.diff(stamps)
        steps = steps[steps > 0]
        return float(np.median(steps)) * self._tick if len(steps) else float(1 / (self._claimed or 25))


@contextmanager
def _library_errors(kind: type[Exception] | None) -> Iterator[None]:
    """Turns libav's errors into `kind`; without one into VideoError, since no other way is left."""
    try:
        yield
    except VideoError:
        raise
    except (av.FFmpegError, ValueError) as error:
        if kind:
            raise kind(str(error)) from error
        raise VideoError(f"it cannot be decoded ({short(error)})") from error


def on_grid(when: Timeline, rate: int) -> Callable[[int], bool]:
    """Which frames are stored at `rate` frames a second: those of the official extractor's grid; where frames are not all
    shown for as long, the nearest to each of `rate` moments of a second, so that no part of the video goes without."""
    if when.steady:
        second = [grid(number, when.fps, rate) for number in range(max(1, int(when.fps)))]
        return lambda number: second[number % len(second)]
    first, last = float(when.times[0]), float(when.times[-1])
    moments = first + np.arange(int((last - first) * rate + 1e-6) + 1) / rate
    chosen = np.zeros(len(when.times), bool)
    chosen[nearest(when.times, moments)] = True
    chosen[-1] = True  # by which the sampling rules know where the video ends
    return lambda number: bool(chosen[number])


def _decimal(seconds: float) -> Fraction:
    """What was meant: 0.4 is 2/5 and not the float next to it, or the frame at 10/25 s would fall out of the cut."""
    return Fraction(seconds).limit_denominator(1_000_000)


def skips_exactly(context: av.VideoCodecContext) -> bool:
    """Whether libav leaves out just the frames to which no other refers when it is told to skip those."""
    if context.codec.canonical_name == "hevc":  # with temporal layers, higher ones may refer to them
        extra = context.extradata or b""
        return len(extra) > 22 and extra[0] == 1 and (extra[21] >> 3) & 7 == 1  # numTemporalLayers, ISO 14496-15 8.3.3
    return context.codec.canonical_name == "h264"

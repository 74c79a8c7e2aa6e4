"""A pass by the packets' time stamps: a cut begins at the keyframe before it, and only what is needed is decoded."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
from av.packet import PktSideDataT

from shards import VideoError
from shards.video import frame_pass
from shards.video.cuts import stands, within
from shards.video.damage import may_restart
from shards.video.frame_pass import Pass, Shown, Unpredictable
from shards.video.probe import (
    JUMP,
    UNKNOWN,
    Packets,
    Timeline,
    clock_zero,
    edits_twice,
    has_jumps,
    stores_no_stamps,
    timeline,
)

# of what stands beside packets, that which libav does not tell again after it was sent back
_TOLD_ONCE: tuple[PktSideDataT, ...] = ("palette", "new_extradata", "param_change")
_MARKED = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video"}  # parsers find their keyframes


class StampPass(Pass):
    """Goes by the packets' time stamps; packets that nobody wants and no other frame refers to are not decoded.

    `ranks` are the numbers in the cut of the packets' frames (-1: outside), int32 [packets].
    """

    leaves_out = True  # whether packets to which no other frame refers may be left out

    told_beside = False  # whether packets carry beside their bytes what the decoder has to know, such as a palette

    ranks = np.zeros(0, np.int32)
    _inside_gop = False  # whether the file begins with frames that cannot be decoded
    _zero = 0  # stamp of the first frame shown
    _seeks = False  # whether the packets before the cut's keyframe are passed over

    def seconds(self, stamps: np.ndarray) -> np.ndarray:
        """Stamps as seconds of the player's clock, from the start of the cut on."""
        return self._clock(stamps, self._zero, _decimal(max(0.0, self.start)))

    def again(self) -> Iterator[tuple[av.Packet | None, int]]:
        """The packets that a decoder needs, each with its frame's number in the cut (-1: outside), and (None, -1) at the end."""
        last = int(np.flatnonzero(self.ranks >= 0)[-1]) if not self.is_whole else len(self.packets) - 1
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

    def _plan(self) -> Timeline:
        zero = None if self.is_whole else self._first_shown()
        if not self.is_whole and edits_twice(self.container, self.stream):
            raise Unpredictable("its edit list shows parts of the file in another order, or apart")
        self._seeks = self.start > 0 and not may_restart(self._file, self.container)
        for packet in self._from_keyframe(zero):
            if packet.pts is None or packet.is_corrupt:
                raise Unpredictable("packets without stamp, or damaged")
            self._heed(packet)
            self._on_packet(self.packets, packet)
            if zero is not None and packet.dts is not None and packet.dts >= self._stamp(zero, self.end):
                break
        else:
            self._refuse_cut_short()
        packets = self.packets
        if self.told_beside and self.start > 0:
            raise Unpredictable("what its decoder has to know stands beside packets before the cut")
        if not packets:
            raise Unpredictable("no packets")
        self._refuse_odd(np.asarray(packets.pts), np.asarray(packets.dts))
        if zero is not None and self.start > 0:
            self._refuse_false_keys()
            if not self._seeks:
                packets = self._drop_before(self._stamp(zero, self.start))
        pts = np.asarray(packets.pts)
        order = np.argsort(pts, kind="stable")
        if (np.diff(pts[order]) == 0).any():
            raise Unpredictable("two packets with one stamp")
        shown = order[np.asarray(packets.discard)[order] == 0]
        if not len(shown):
            raise VideoError("not one frame is shown: its edit list hides all of them")
        zero = self._zero = int(pts[shown[0]]) if zero is None else zero
        low, high = self._range(shown, pts[shown])
        if low == high:
            self._refuse_empty()
        inside = shown[low:high]
        self.ranks = np.full(len(packets), -1, np.int32)
        self.ranks[inside] = np.arange(len(inside))
        last = [packets.duration[i] * self._tick for i in inside[-2:]]
        when = timeline(self.seconds(pts[inside]), (last[0], last[-1]), self._claimed, self._tick)
        return within(when, self.end - max(0.0, self.start), high < len(shown))

    def _range(self, shown: np.ndarray, stamps: np.ndarray) -> tuple[int, int]:
        """Which frames are those of the cut, of all that are `shown` (packets), in order."""
        # compared as integers: a frame at exactly the start or the end of the cut must not fall on the wrong side
        low = int(np.searchsorted(stamps, self._stamp(self._zero, self.start)))
        high = int(np.searchsorted(stamps, self._stamp(self._zero, self.end)))
        if self.start > 0 and low > 0:
            last = self.packets.duration[shown[-1]] * self._tick or float(1 / (self._claimed or 25))
            over = float(self.seconds(stamps[-1:])[0] + last)
            until = float(self.seconds(stamps[low:])[0]) if low < len(stamps) else over
            low -= stands(0.0, min(self.end - self.start, over), until)
        return low, high

    def _heed(self, packet: av.Packet) -> None:
        self.told_beside = self.told_beside or any(packet.has_sidedata(kind) for kind in _TOLD_ONCE)

    def _refuse_odd(self, pts: np.ndarray, dts: np.ndarray) -> None:
        known = dts[dts != UNKNOWN]
        if (np.diff(known) < 0).any() or (pts < dts).any():
            raise Unpredictable("stamps out of order")
        if not self._seeks and (pts < pts[0]).any():
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

    def _stamp(self, first: int, seconds: float) -> float:
        """The first stamp at or after a player's clock shows `seconds`; `first` is that of the first frame shown."""
        if math.isinf(seconds) or seconds <= 0:
            return math.inf if seconds > 0 else -math.inf
        base = self._base
        return math.ceil((_decimal(seconds) + clock_zero(self.container, self._sounds, first * base)) / base)

    def _first_shown(self) -> int:
        """The stamp of the first frame shown."""
        stamps: list[int] = []
        first = UNKNOWN  # stamp of the first packet
        for place, packet in enumerate(self.container.demux(self.stream)):
            if packet.pts is None:  # among them the empty one at the end
                break
            self._heed(packet)
            first = packet.pts if place == 0 else first
            if place == 0 and not packet.is_keyframe:
                self._reopen()
                return self._first_decoded()
            if not packet.is_discard:
                stamps.append(packet.pts)
                if packet.pts < first:  # it may refer to what was before the file, and give no picture
                    raise Unpredictable("frames are shown before the first keyframe")
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
            for frame in frame_pass.decode(self.context, packet if packet.size else None):
                if frame.pts is None or frame.pts != key:
                    raise Unpredictable("frames are shown before the first keyframe")
                self._inside_gop = True
                return key
        raise Unpredictable("not one frame decodes")

    def _from_keyframe(self, zero: int | None) -> Iterator[av.Packet]:
        """Packets from the last keyframe on that is shown no later than the start of the cut; `zero`: of the first frame."""
        key: int | None = None
        if zero is not None and not self._seeks:
            self._reopen()  # to go back
        read = self.container.demux(self.stream) if zero is None or not self._seeks else self._seek(zero)
        for packet in read:
            if not packet.size:
                continue
            if key is None and self._inside_gop and not packet.is_keyframe:
                continue
            if key is None and self.is_whole and not self._inside_gop and not packet.is_keyframe:
                self._reopen()
                self._first_decoded()
                self._reopen()
                yield from self._from_keyframe(None)
                return
            if key is None:
                key = packet.pts
                if key is None or not packet.is_keyframe:
                    raise Unpredictable("it does not begin with a keyframe")
            if (self._seeks or self._inside_gop) and packet.pts is not None and packet.pts < key:
                continue  # refers to what is before the keyframe, and is shown before the cut
            yield packet

    def _seek(self, zero: int) -> Iterator[av.Packet]:
        base = self._base
        target = int(self._stamp(zero, self.start))
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

    def _rewound(self) -> Iterator[av.Packet]:
        first = self.packets
        if first.place[0] >= 0 and not has_jumps(self.container) and not self.told_beside:
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
        begun = False
        for packet in self.container.demux(self.stream):
            begun = begun or (packet.size > 0 and (packet.pos, packet.pts) == (first.place[0], first.pts[0]))
            if begun and packet.size:
                yield packet

    def _decode(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        context, intra_only = self.context, self.context.codec.intra_only
        skips, skipping, changed = self.leaves_out and skips_exactly(context), False, context
        due: dict[int, int] = {}  # {stamp: number} of frames to come
        last = -math.inf
        for packet, number in self.again():
            if changed is not self.context:  # reopened
                context = changed = self.context
                skipping = False
            use = number >= 0 and wanted(number)
            if use and packet is not None and packet.pts is not None:
                due[packet.pts] = number
            elif intra_only and packet is not None and not self.told_beside:
                continue
            if skips and skipping == use:
                skipping = not use
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            for frame in frame_pass.decode(context, packet):
                pts = frame.pts
                interlaced = frame.interlaced_frame and self.leaves_out
                if pts is None or pts <= last or frame.is_corrupt or interlaced:
                    raise Unpredictable("frames do not come as their packets promise")
                last = pts
                self._note_shape(frame)
                if pts in due:
                    number = due.pop(pts)
                    yield Shown(number, float(self.timeline.times[number]), frame)
        if due:
            raise Unpredictable(f"{len(due)} packets gave no frame")


class AllStampPass(StampPass):
    """Goes by the time stamps, and decodes every packet: interlaced video needs it."""

    leaves_out = False


def _decimal(seconds: float) -> Fraction:
    """What was meant: 0.4 is 2/5 and not the float next to it, or the frame at 10/25 s would fall out of the cut."""
    return Fraction(seconds).limit_denominator(1_000_000)


def skips_exactly(context: av.VideoCodecContext) -> bool:
    """Whether libav leaves out just the frames to which no other refers when it is told to skip those."""
    if context.codec.canonical_name == "hevc":  # with temporal layers, higher ones may refer to them
        extra = context.extradata or b""
        return len(extra) > 22 and extra[0] == 1 and (extra[21] >> 3) & 7 == 1  # numTemporalLayers, ISO 14496-15 8.3.3
    return context.codec.canonical_name == "h264"

"""Passes that decode a file from its beginning: of containers without time stamps, and of files whose stamps are wrong."""

import math
from array import array
from collections.abc import Callable, Iterator

import av
import numpy as np

from shards import VideoError
from shards.video.cuts import stands, within
from shards.video.frame_pass import CUT_MARGIN, Pass, Shown, Unpredictable, WholeDecoder, resized_note
from shards.video.picture import short
from shards.video.probe import (
    JUMP,
    UNKNOWN,
    Packets,
    Timeline,
    has_jumps,
    increasing,
    locally_sorted,
    stores_no_stamps,
    timeline,
)

_LAST_OF_A_RECORDING = 2  # packets that the end of a joined recording may mark as damaged
_REORDERED = 17  # frames that a decoder holds back at most, and the one it was given


class _FullPass(Pass):
    """Decodes all frames from the beginning of the file to the end of the cut."""

    is_one_to_one = False  # whether each packet has to give a frame
    _range = 0, 0  # of all frames those of the cut

    def _decode(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        """The wanted frames of the range, decoding from the beginning of the file."""
        self._reopen()
        low, high = self._range
        given = seen = 0
        decoder = WholeDecoder(self.container, self.stream)
        for packet in self.container.demux(self.stream):
            given += packet.size > 0
            for frame in _frames_of(decoder, packet, seen):
                self._note_shape(frame)
                number, seen = seen - low, seen + 1
                if 0 <= number < high - low and wanted(number):
                    yield Shown(number, float(self.timeline.times[number]), frame)
            if seen >= high and not self.is_whole:
                if self.is_one_to_one and given - seen > _REORDERED:
                    raise Unpredictable("packets without a frame of their own")
                return
        if self.is_one_to_one and seen != len(self.packets):
            raise Unpredictable(f"{seen} frames of {len(self.packets)} packets")
        if seen < high:
            raise VideoError(f"{high} frames decode the first time, {seen} the second")

    def _cut(self, every: np.ndarray, last_two: tuple[float, float], tick: float) -> Timeline:
        """The times of the cut's frames, from its start on, of the times of all; `_range` is which they are.

        `last_two`: for how long the last two frames of the file are shown, by their packets; seconds."""
        eps = min(1e-6, tick / 4)
        low, high = np.searchsorted(every, [self.start - eps, self.end - eps]) if not self.is_whole else (0, len(every))
        if self.start > 0 and low > 0:
            over = float(every[-1]) + (last_two[1] or float(1 / (self._claimed or 25)))  # as by stamps
            low -= stands(self.start, min(self.end, over), float(np.append(every, over)[low]))
        self._range = int(low), int(high)
        if low >= high:
            self._refuse_empty()
        last_two = last_two if high == len(every) else (0.0, 0.0)
        start = max(0.0, self.start)
        when = timeline(every[low:high] - start, last_two, self._claimed, tick)
        return within(when, self.end - start, bool(high < len(every)))


def _frames_of(decoder: WholeDecoder, packet: av.Packet, seen: int) -> list[av.VideoFrame]:
    try:
        frames = decoder(packet)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"decoding fails after frame {seen} ({short(error)})") from error
    if any(frame.is_corrupt for frame in frames):
        raise VideoError(f"frame {seen + [f.is_corrupt for f in frames].index(True)} is damaged")
    return frames


class OrderPass(_FullPass):
    """Goes by the packets' places in the file: what the decoder gives are these, in order."""

    is_one_to_one = True

    def _plan(self) -> Timeline:
        if not stores_no_stamps(self.container):
            raise Unpredictable("the container stores times of presentation")
        tick, claimed = self._tick, self._claimed
        packets = self.packets
        for packet in self.container.demux(self.stream):
            if packet.size:
                if packet.is_corrupt:
                    raise VideoError(f"packet {len(packets)} is damaged")
                self._on_packet(packets, packet)
                if packet.dts is not None and packet.dts * tick > self.end + CUT_MARGIN:
                    break
        else:
            self._refuse_cut_short()
        if not packets:
            raise VideoError("not one frame decodes")
        dts = np.asarray(packets.dts)
        if (dts == UNKNOWN).all() and claimed:
            at, tick = np.arange(len(dts)) / float(claimed), float(1 / claimed)
            every, last_two = at - at[0], (tick, tick)
        elif (dts == UNKNOWN).any() or (np.diff(dts) <= 0).any():
            raise Unpredictable("stamps out of order")
        else:
            every = self._clock(dts, int(dts[0]))
            last_two = (packets.duration[-2] * tick if len(dts) > 1 else 0.0, packets.duration[-1] * tick)
        return self._cut(every, last_two, tick)


class DecodingPass(_FullPass):
    """Decodes the whole file once to see what comes out, and a second time for the pictures."""

    gives_up = None

    def _plan(self) -> Timeline:
        packets = self.packets
        stamps, came, durations = array("q"), array("q"), array("q")  # of each frame; `came`: the packet it came at
        clock, latest = 0.0, None
        suspect = None  # place of a packet that is marked as damaged
        resized = -1  # the first frame of another size
        decoder = WholeDecoder(self.container, self.stream)
        for packet in self.container.demux(self.stream):
            if suspect is not None and self._jumps(packets, packet):
                suspect = None
            if suspect is not None and (not packet.size or len(packets) - suspect > _LAST_OF_A_RECORDING):
                raise VideoError(f"packet {suspect} is damaged")
            if packet.is_corrupt:
                suspect = len(packets)
            if packet.size:
                self._on_packet(packets, packet)
            for frame in _frames_of(decoder, packet, len(stamps)):
                resized = len(stamps) if self._heed_size(frame) else resized
                if frame.pts is not None:
                    step = 0.0 if latest is None else (frame.pts - latest) * self._tick
                    clock += step if 0 < step < JUMP else 0.0
                    latest = frame.pts if latest is None or step > 0 or step < -JUMP else latest
                stamps.append(UNKNOWN if frame.pts is None else frame.pts)
                durations.append(frame.duration or 0)
                came.append(len(packets) - 1 if packet.size else len(packets) + len(stamps))
            if clock > self.end + CUT_MARGIN:
                break
        else:
            self._refuse_cut_short()
        if not stamps:
            raise VideoError("not one frame decodes")
        at = np.asarray(stamps)
        self.jumbled = bool((at[1:] <= at[:-1]).any())
        if stores_no_stamps(self.container):
            at = self._places(np.asarray(came))
        known = np.flatnonzero(at != UNKNOWN)
        interval = self._interval(at[known], known)
        if len(known):  # what has no stamp follows the one before
            before = np.maximum.accumulate(np.where(at != UNKNOWN, np.arange(len(at)), -1))
            back = np.where(before < 0, known[0], before)
            at = at[back] + np.rint((np.arange(len(at)) - back) * interval / self._tick).astype(np.int64)
        else:
            at = np.rint(np.arange(len(at)) * interval / self._tick).astype(np.int64)
        ticks = max(1, round(interval / self._tick))
        at = at if has_jumps(self.container) else locally_sorted(at)
        if not stores_no_stamps(self.container):
            self._refuse_disorder(at, np.asarray(came), ticks)
        longest = JUMP / self._tick if has_jumps(self.container) else math.inf
        at = increasing(at, ticks, longest, self._pauses(at, np.asarray(came)))
        last_two = (durations[-2] * self._tick if len(durations) > 1 else 0.0, durations[-1] * self._tick)
        when = self._cut(self._clock(at, int(at[0])), last_two, self._tick)
        if self._range[0] < resized < self._range[1]:
            self.notes.append(resized_note(float(when.times[resized - self._range[0]])))
        return when

    def _jumps(self, before: Packets, packet: av.Packet) -> bool:
        """Whether stamps jump, as where two recordings were joined. The last packets of the first are then marked as damaged,
        since counters do not go on, and are whole; whether their pictures are, the decoder says."""
        if not has_jumps(self.container) or packet.dts is None or not before or before.dts[-1] == UNKNOWN:
            return False
        return not 0 <= (packet.dts - before.dts[-1]) * self._tick < JUMP

    def _pauses(self, stamps: np.ndarray, came: np.ndarray) -> list[int]:
        """The frames before which the picture stands still for long while the sound goes on: no jump of the stamps."""
        leaps = np.flatnonzero(np.diff(stamps) * self._tick > JUMP).tolist()
        if not leaps or not has_jumps(self.container) or not self._sounds:
            return []
        times, places = self._heard()
        near = np.minimum(came, len(self.packets))
        out = []
        for i in leaps:
            span = stamps[i : i + 2] * self._tick
            there = (places >= near[i] - _REORDERED) & (places <= near[i + 1] + _REORDERED)
            played = times[there & (times > span[0]) & (times < span[1])]
            if np.diff(np.sort(np.append(played, span))).max() < JUMP:
                out.append(i + 1)
        return out

    def _heard(self) -> tuple[np.ndarray, np.ndarray]:
        """When the packets of sound are played, seconds, and how many packets of pictures stand before each in the file."""
        self._reopen()
        sound, times, places, place = self._sounds[0], array("d"), array("q"), 0
        for packet in self.container.demux(self.stream, sound):
            if packet.stream == self.stream:
                place += 1
            elif packet.pts is not None and packet.time_base is not None:
                times.append(float(packet.pts * packet.time_base))
                places.append(place)
            if place > len(self.packets) + _REORDERED:
                break
        return np.asarray(times), np.asarray(places)

    def _refuse_disorder(self, stamps: np.ndarray, came: np.ndarray, interval: int) -> None:
        """Raise VideoError where a frame steps back in time though the packets do not: what it refers to is lost."""
        dts = np.asarray(self.packets.dts)
        known = np.flatnonzero(dts != UNKNOWN)
        anew = known[1:][np.diff(dts[known]) < 0]
        for i in np.flatnonzero(np.diff(stamps) < -2 * interval) + 1:
            at = min(int(came[i]), len(dts))
            if not ((anew >= at - 2 * _REORDERED) & (anew <= at)).any():
                back = (stamps[i - 1] - stamps[i]) * self._tick
                raise VideoError(f"it is damaged: frame {i} should be shown {back:.2f} s before frame {i - 1}")

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

    def _interval(self, stamps: np.ndarray, numbers: np.ndarray) -> float:
        """Seconds between two frames, most of the time; `numbers` of frames have `stamps`."""
        steps = np.diff(stamps) / np.diff(numbers)
        steps = steps[steps > 0]
        return float(np.median(steps)) * self._tick if len(steps) else float(1 / (self._claimed or 25))

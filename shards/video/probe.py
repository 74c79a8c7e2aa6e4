"""What the packets of a video file say before one of them is decoded: which frames there are and when each is shown.

Headers claim rates, durations and counts, and many are wrong: a browser's recording says 1000 frames a second, a trimmed
file counts what its edit list hides, an AVI counts chunks that are empty. So all three follow from the packets.
"""

import errno
import itertools
import logging
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

from shards import VideoError
from shards.video import gif
from shards.video.picture import short

# Of libav's lines those of a demuxer tell damage (see shards.video.damage); all others say nothing that our errors do not.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)  # or the end of a repetition would be told among the lines of another file
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)

UNKNOWN = -(2**63)  # a packet without stamp or place
_BUFFER = 1 << 18  # bytes a read
_TEXT = {"tty", "bin", "xbin", "adf", "idf"}  # by the file's name alone: any text would be a video that shows it
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")  # with which an mp4 may begin
_ALONE = {"protocol_whitelist": "none"}  # a playlist or a list of files names others, which nobody meant to read
_NO_TIMESTAMPS: int = av.format.Flags.no_timestamps.value  # type: ignore[assignment]  # an enum of numbers
_USUAL_RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)] + [Fraction(n) for n in range(1, 241)]


class Packets:
    """Stamps, duration, place in the file, size, flags and crc32c of packets, in decode order; 46 bytes each."""

    def __init__(self):
        self.pts, self.dts, self.place = array("q"), array("q"), array("q")
        self.duration, self.size = array("q"), array("i")
        self.key, self.discard = array("b"), array("b")
        self.crc = array("I")

    def __len__(self) -> int:
        return len(self.pts)

    def add(self, packet: av.Packet, crc: int = 0) -> None:
        """Append what a packet says of itself; `crc` is that of its bytes."""
        self.pts.append(UNKNOWN if packet.pts is None else packet.pts)
        self.dts.append(UNKNOWN if packet.dts is None else packet.dts)
        self.duration.append(packet.duration or 0)
        self.place.append(-1 if packet.pos is None else packet.pos)
        self.size.append(packet.size)
        self.key.append(packet.is_keyframe)
        self.discard.append(packet.is_discard)
        self.crc.append(crc)

    def only(self, places: list[int]) -> "Packets":
        """The packets at these places."""
        out = Packets()
        for name, values in vars(self).items():
            getattr(out, name).extend(values[i] for i in places)
        return out


def open_video(file: BinaryIO) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open an encoded video at the beginning of a seekable file; it is read as far as needed, never all into memory.

    The stream is the one that libav calls best, and never a cover picture. Raises VideoError if there is none.
    """
    file.seek(0)
    if not file.read(1):
        raise VideoError("the file is empty (0 bytes)")
    file = gif.as_browsers_time_it(file) if gif.begins_like_a_gif(file) else file
    try:
        container = av.open(file, "r", metadata_errors="ignore", buffer_size=_BUFFER, options=_ALONE)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(_unreadable(error, file)) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # the disk's
            raise
        raise VideoError("not a readable video file (it leads libav to a place before its beginning)") from error
    if container.format.name in _TEXT:
        container.close()
        raise VideoError("it is text, and no video")
    films = [s for s in container.streams.video if "attached_pic" not in str(s.disposition).lower()]
    if not films:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
        container.close()
        raise VideoError(f"no video stream in the file (streams: {kinds})")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    if stream.codec_context is None:
        container.close()
        raise VideoError("no decoder for its video stream")
    stream.codec_context.thread_count = 1  # the packer runs one process a core
    return container, stream


def _unreadable(error: Exception, file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(512)
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        with suppress(UnicodeDecodeError):
            head[:-3].decode()  # the last letter may be cut
            return "not a readable video file: it is text. Did a server send a page in its place?"
    log = getattr(error, "log", None)
    if log and "moov atom not found" in str(log) and head[4:8] in _BOXES:
        return (
            "not a readable video file: its index (the moov box of an mp4) is missing. Was it downloaded, or recorded, "
            "to its end?"
        )
    return f"not a readable video file ({short(error)})"


def stores_no_stamps(container: av.container.InputContainer) -> bool:
    """Whether frames have no presentation times in this container, so that libav's are guesses: AVI and bare streams."""
    return container.format.name == "avi" or bool(container.format.flags & _NO_TIMESTAMPS)


def has_jumps(container: av.container.InputContainer) -> bool:
    """Whether time stamps of this container may jump, as those of a broadcast do (MPEG-TS and MPEG-PS)."""
    return container.format.name in ("mpegts", "mpeg")


def edits_twice(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether the edit list of an mp4 goes to and fro, so that what is shown later may stand earlier."""
    if container.format.name.split(",")[0] != "mov":
        return False
    stamps = [entry.timestamp for entry in stream.index_entries]
    return any(after < before for before, after in itertools.pairwise(stamps))


def clock_zero(container: av.container.InputContainer, sounds: Iterable[av.AudioStream], first: Fraction) -> Fraction:
    """The time stamp, in seconds, at which a player's clock shows 0: where the first of picture and sound begins.

    `first` is that of the first picture shown, `sounds` what is played with it (see `sound_of`). Sound before 0 is what a decoder needs to start, and is not played.
    """
    starts = ((s.start_time, s.time_base) for s in sounds)
    zero = min([first, *(start * base for start, base in starts if start is not None and base is not None)])
    if zero >= 0 or has_jumps(container):  # there, libav counts down from where stamps start anew
        return zero
    return min(first, Fraction(0))


# ---- what the times make of a video ----


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video, or of a cut of it, are shown.

    times     float64 [frames], seconds, increasing; 0 is where a player's clock shows 0, or where the cut begins
    fps       frames a second: what the header says if the times agree, else what they say
    steady    whether all frames are shown for as long, so that their numbers tell their times
    duration  seconds from 0 to the end of the last frame
    """

    times: np.ndarray
    fps: Fraction
    steady: bool
    duration: float

    @property
    def drift(self) -> float:
        """Seconds by which a frame is at most shown off from where counting frames puts it."""
        return 0.0 if self.steady else drift(self.times, np.arange(len(self.times)), float(self.fps))


def timeline(times: np.ndarray, last_two: tuple[float, float], claimed: Fraction | None, tick: float) -> Timeline:
    """`last_two`: what the packets of the last two frames say of their duration (seconds; 0: nothing). `claimed` is the
    header's rate, and `tick` the unit of the time stamps in seconds."""
    fps = _rate(times, claimed, tick)
    even = steady(times, np.arange(len(times)), tick)
    return Timeline(times, fps, even, float(times[-1]) + _last(times, last_two, float(1 / fps), even, tick))


def _rate(times: np.ndarray, claimed: Fraction | None, tick: float) -> Fraction:
    count, span = len(times) - 1, float(times[-1] - times[0])
    if count < 1 or span <= 0:
        return Fraction(claimed) if claimed else Fraction(1)
    if claimed and abs(count / float(claimed) - span) <= 2 * tick + 0.01 * span:
        return Fraction(claimed).limit_denominator(100_000)
    for usual in _USUAL_RATES:
        if abs(count / float(usual) - span) <= min(2 * tick, 0.01 * span):
            return usual
    return Fraction(count / span).limit_denominator(100_000)


def _last(times: np.ndarray, last_two: tuple[float, float], usual: float, even: bool, tick: float) -> float:
    """For how long the last frame is shown."""
    if len(times) < 2:
        return last_two[1] or usual
    before = float(times[-1] - times[-2])
    believable = last_two[1] > 0 and abs(last_two[0] - before) <= max(1.5 * tick, 0.1 * before)
    if even:  # a rounded or a guessed length is no better than the usual one
        return last_two[1] if believable and last_two[1] > 2 * usual + tick else usual
    return last_two[1] if believable else before


def steady(times: np.ndarray, numbers: np.ndarray, tick: float = 0.0) -> bool:
    """Whether frames `numbers` are shown where a constant rate puts them, to one frame."""
    count = int(numbers[-1] - numbers[0])
    if count < 1:
        return True
    interval = float(times[-1] - times[0]) / count
    off = np.abs(times - times[0] - (numbers - numbers[0]) * interval).max()
    return bool(off <= max(interval, 2 * tick))


def drift(times: np.ndarray, numbers: np.ndarray, fps: float) -> float:
    """Seconds by which a frame is at most shown off from where counting at `fps` puts it."""
    return float(np.abs(times - times[0] - (numbers - numbers[0]) / fps).max())


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted time the position of the nearest of `times` (sorted, not empty); the earlier of two."""
    right = np.minimum(times.searchsorted(wanted), len(times) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - times[left] <= times[right] - wanted, left, right)


def increasing(stamps: np.ndarray, interval: int, longest: float, pauses: Sequence[int] = ()) -> np.ndarray:
    """Stamps (int64, in ticks) as a player's clock goes through them: without leaps back, or over more than `longest` but
    for those to the frames `pauses`.

    A frame that is stamped a little early follows the one before by a tick; one that is far off begins a new count, as
    players and ffmpeg do (its `-dts_delta_threshold` of 10 s).
    """
    out, shift = stamps.tolist(), 0
    for i in range(1, len(out)):
        step = out[i] + shift - out[i - 1]
        if step < -2 * interval or (step > longest and i not in pauses):
            shift += interval - step
        out[i] = max(out[i] + shift, out[i - 1] + 1)
    return np.asarray(out, np.int64)


def locally_sorted(stamps: np.ndarray) -> np.ndarray:
    """Stamps in order, if they are a few places off: those of containers that give the order of decoding as that of showing."""
    order = np.argsort(stamps, kind="stable")
    moved = np.abs(order - np.arange(len(stamps))).max(initial=0)
    return stamps[order] if moved <= 16 else stamps


JUMP = 10.0  # seconds between two frames that are no pause

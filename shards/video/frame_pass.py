"""A pass over the frames of a video file: what every way of doing it has in common (see `shards.video.decode`)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Self

import av
import numpy as np

from shards import VideoError, memory
from shards.video.damage import cut_short_note, decode_checked, is_part, refuse_cut_short, refuse_passed_over
from shards.video.edits import gap_note
from shards.video.picture import Shape, refuse_unknown_colours, shape_of, short
from shards.video.probe import Packets, Timeline, clock_zero, edits_twice, has_jumps, open_video
from shards.video.programs import sound_of

CUT_MARGIN = 1.0  # seconds read beyond the end of a cut


class Unpredictable(Exception):
    """This way cannot be sure of the file: another one has to decide."""


@dataclass(frozen=True)
class Shown:
    """A frame of the cut: its number, counted from the first frame of the cut, and its time in seconds (see Timeline)."""

    number: int
    time: float
    frame: av.VideoFrame


class Pass(ABC):
    """A pass over the frames with start <= time < end, in seconds of the clock that a player shows. Where the first second of
    that, or all, shows no new frame, it begins with the one that is still shown.

    `timeline` says when each is shown. `packets` are those that were read for it. After `frames` has given the first frame,
    `shape` is how frames are shown, and `notes` say what may surprise. `on_packet(packets, packet)` stores each packet that is read. Use it as a context
    manager. Raises VideoError for a file that cannot be used, Unpredictable if another way has to decide.
    """

    gives_up: type[Exception] | None = Unpredictable  # what libav's errors become; None: VideoError, no way is left
    jumbled = False  # whether frames come in another order than that of their stamps

    def __init__(
        self, file: BinaryIO, start: float = 0.0, end: float = math.inf,
        on_packet: Callable[[Packets, av.Packet], None] = Packets.add,
    ):  # fmt: skip
        self._file, self.start, self.end = file, start, end
        self._on_packet = on_packet
        self.packets = Packets()
        self.shape: Shape | None = None
        self.notes: list[str] = []
        self._first_size: tuple | None = None
        self._resized = False
        self._at_end = False  # whether the file was read to its end
        with av.logging.Capture() as lines:  # of this thread
            self._open()
            try:
                try:
                    with _library_errors(self.gives_up):
                        self.timeline: Timeline = self._plan()
                finally:  # where this is why it failed, it is the better reason
                    refuse_passed_over(self.container, self.stream, self.packets, lines, self._at_end)
                self.notes += gap_note(self._file, self.container, self.stream)
            except BaseException:
                self.container.close()
                raise

    @abstractmethod
    def _plan(self) -> Timeline:
        """When the frames of the cut are shown, before `frames` decodes one."""

    @abstractmethod
    def _decode(self, wanted: Callable[[int], bool]) -> Iterator[Shown]:
        """The wanted frames in display order."""

    @property
    def context(self) -> av.VideoCodecContext:
        """The decoder."""
        return self.stream.codec_context

    @property
    def is_whole(self) -> bool:
        """Whether all of the file is meant, not a cut."""
        return self.start <= 0 and self.end == math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def frames(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Shown]:
        """The wanted frames in display order. Raises VideoError at the first that does not decode."""
        with _library_errors(self.gives_up):
            for shown in self._decode(wanted):
                if self._heed_size(shown.frame):
                    self.notes.append(resized_note(shown.time))
                yield shown

    def _heed_size(self, frame: av.VideoFrame) -> bool:
        """Whether this is the first frame that has not the size of the first one."""
        size = frame.width, frame.height, self.context.sample_aspect_ratio
        self._first_size = self._first_size or size
        if self._resized or size == self._first_size:
            return False
        self._resized = True
        return True

    def _note_shape(self, frame: av.VideoFrame) -> None:
        if self.shape is None:
            refuse_unknown_colours(frame)
            self.shape = shape_of(frame, self.stream.sample_aspect_ratio)

    @property
    def _base(self) -> Fraction:
        """The unit of time stamps, in seconds."""
        assert self.stream.time_base is not None, "a demuxer sets it"
        return self.stream.time_base

    @property
    def _tick(self) -> float:
        return float(self._base)

    @property
    def _claimed(self) -> Fraction | None:
        return self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate

    def _clock(self, stamps: np.ndarray, first: int, start: Fraction | int = 0) -> np.ndarray:
        """Stamps as seconds of the player's clock since `start`; `first` is the stamp of the first frame shown."""
        base = self._base
        origin = clock_zero(self.container, self._sounds, first * base) + start
        ticks = math.floor(origin / base)  # so that only the rest of it is rounded
        return (stamps - ticks) * base.numerator / base.denominator - float(origin - ticks * base)

    def _refuse_cut_short(self) -> None:
        self._at_end = True
        refuse_cut_short(self._file, self.container, self.stream, self.packets)
        self.notes += cut_short_note(self._file, self.container, self.stream, self.packets)
        if has_jumps(self.container) and is_part(self._file, self.container, self.packets):
            self.notes.append("its video ends where another stream's begins, as in joined recordings: only one is read")

    def _refuse_empty(self) -> None:
        if self.is_whole:
            raise VideoError("not one frame decodes")
        where = f"from {self.start:g} s on" if self.end == math.inf else f"between {self.start:g} and {self.end:g} s"
        raise VideoError(f"no frame {where}")

    def _reopen(self) -> None:
        self.container.close()
        self._open()

    def _open(self) -> None:
        self.container, self.stream = open_video(self._file)
        self._sounds = sound_of(self._file, self.container, self.stream)


def resized_note(seconds: float) -> str:
    """What is said of a video whose pictures change size after so many seconds."""
    return f"its pictures change size or shape at {seconds:.1f} s: from there on they are stretched to the shape of the first"


def decode(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Every packet that is decoded for packing goes through here; None at the end of the file."""
    return decode_checked(context, packet)


class WholeDecoder:
    """Decodes the packets of a file one after the other. Where the edit list of an mp4 goes back in the file, it gives what is left
    and begins anew: libav's HEVC decoder would take the next frames for repeated ones, and leave them out."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self._context, self._edited = stream.codec_context, edits_twice(container, stream)
        self._before: int | None = None

    def __call__(self, packet: av.Packet) -> list[av.VideoFrame]:
        """The frames that come out for a packet; an empty one ends the file."""
        frames: list[av.VideoFrame] = []
        if self._edited and packet.dts is not None:
            if self._before is not None and packet.dts < self._before:
                frames = decode(self._context, None)
                self._context.flush_buffers()
            self._before = packet.dts
        return frames + decode(self._context, packet if packet.size else None)


@contextmanager
def _library_errors(kind: type[Exception] | None) -> Iterator[None]:
    """Turns libav's errors into `kind`; without one into VideoError, since no other way is left."""
    try:
        yield
    except VideoError:
        raise
    except (av.FFmpegError, ValueError) as error:
        memory.refuse_short(error)
        if kind:
            raise kind(str(error)) from error
        raise VideoError(f"it cannot be decoded ({short(error)})") from error

"""Parts of videos in a form that every browser plays: H.264 and AAC in an mp4. Runs in a process of worker.py."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from shards import VideoError
from shards.split import Split
from shards.video.damage import may_restart
from shards.video.decode import WAYS
from shards.video.frame_pass import Unpredictable
from shards.video.picture import Shape, shape_of, short, standard_range, turned
from shards.video.probe import JUMP, clock_zero, open_video
from shards.video.programs import sound_of
from shards.video.random_access import checked, decode_stored, shape_of_stored
from shards.video.writer import usual_priority

_SHORT_SIDE = 480  # pixels of a clip, at most
_MOST_FPS = 31
_TICKS = 90_000  # a second
_RATE = 48_000  # of sound, samples a second
_CONTAINERS = {"mov": "video/mp4", "matroska": "video/webm"}
_PICTURES = {"mov": ("h264", "av1", "vp9"), "matroska": ("vp8", "vp9", "av1")}
_SOUND = {"mov": ("aac", "mp3", "opus", "flac"), "matroska": ("opus", "vorbis")}
_PLAIN = ("yuv420p", "yuvj420p")
_BESIDE_S = 0.01  # by which a browser's clock, which shows the time stamps themselves, may differ from ours


def source_of(job: dict) -> BinaryIO:
    """The file that a job speaks of: a path, or a video of a split. Raises OSError, ValueError."""
    if "split" not in job:
        return open(job["path"], "rb")
    split = Split(job["split"])
    video = split.video(job["video"])
    file = tempfile.TemporaryFile()  # noqa: SIM115 closed with the process
    file.write(split.read(video))
    file.seek(0)
    return file


def probe(job: dict) -> dict:
    """Whether browsers play the file as it is, and as which media type: {"type": "video/mp4"}, or {"type": None}.

    Raises VideoError for what is no video."""
    with source_of(job) as file:
        container, stream = open_video(file)
        with closing(container):
            frame = next(container.decode(stream), None)
            if frame is None:
                raise VideoError("not one frame of it decodes")
            kind = container.format.name.split(",")[0]
            fits = (
                stream.codec_context.codec.canonical_name in _PICTURES.get(kind, ())
                and frame.format.name in _PLAIN
                and not shape_of(frame, None).mirrored  # players differ
                and all(s.codec_context is not None and _fits(kind, s) for s in container.streams.audio)
                and len(container.streams.video) == 1
                and abs(_zero(file, container, stream)) <= _BESIDE_S
            )
        if kind == "matroska" and fits:
            file.seek(0)
            fits = b"webm" in file.read(64)  # the document's type; no browser promises to play a Matroska file
    return {"type": _CONTAINERS[kind] if fits else None}


def _fits(kind: str, stream: av.AudioStream) -> bool:
    return stream.codec_context.codec.canonical_name in _SOUND[kind]


def _zero(file: BinaryIO, container: av.container.InputContainer, video: av.VideoStream) -> float:
    """Seconds of the file's own time stamps at which the clock shows 0 (see clock_zero)."""
    first = Fraction(video.start_time or 0) * (video.time_base or 0)
    return float(clock_zero(container, sound_of(file, container, video), first))


class Picture(NamedTuple):
    """A frame to be encoded, and when it is shown: seconds of the video."""

    time: float
    frame: av.VideoFrame
    shape: Shape


def clip(job: dict) -> dict:
    """Write seconds [start, end) of a video to the file `out`. Returns {"start": seconds of the video at which it begins}.

    Raises VideoError if that does not decode."""
    start, end = job["start"], job["end"]
    first = None
    draft = job["out"] + ".part"
    with _Encoder(draft) as encoder:
        pictures = _of_split(job, start, end) if "split" in job else _of_file(job["path"], start, end)
        for picture in pictures:
            first = picture.time if first is None else first
            encoder.add(picture, picture.time - first)
        if first is None:
            raise VideoError(f"it shows nothing between {start:.1f} and {end:.1f} s")
        # better without sound than not at all
        with suppress(av.FFmpegError, ValueError, OSError), source_of(job) as file:
            for samples in sound(file, first, end):
                encoder.add_sound(samples)
        encoder.finish(end - first)
    os.replace(draft, job["out"])
    return {"start": first, "size": os.path.getsize(job["out"])}


def _of_file(path: str, start: float, end: float) -> Iterator[Picture]:
    """The frames as a player's clock shows them (see shards.video.decode)."""
    for way in WAYS.values():
        given = 0
        try:
            with open(path, "rb") as file, way(file, start, end) as source:
                keep = _thinned(source.timeline.times)
                for shown in source.frames(keep):
                    assert source.shape is not None, "the first frame tells it"
                    yield Picture(start + shown.time, shown.frame, source.shape)
                    given += 1
                return
        except Unpredictable:
            if given:  # the frames so far are encoded
                return
        except av.FFmpegError as error:
            raise VideoError(f"it does not decode ({short(error)})") from error


def _of_split(job: dict, start: float, end: float) -> Iterator[Picture]:
    """Frames of a packed video by its frame table, which keeps the times of the source."""
    split = Split(job["split"])
    video = split.video(job["video"])
    low, high = video.inside
    times, shape = video.frames.time, shape_of_stored(video)
    wanted = [i for i in range(low, high) if start <= times[i] < end]
    if not wanted and high > low:  # between two stored frames
        wanted = [max(low, min(high, int(np.searchsorted(times[:high], start, "right"))) - 1)]
    keep = _thinned(times[wanted])
    wanted = [frame for place, frame in enumerate(wanted) if keep(place)]
    found = decode_stored(video, checked(video, lambda at, size: split.read(video, at, size)), wanted)
    held: dict[int, av.VideoFrame] = {}
    for position, frame in found:  # not always in order
        held[position] = frame
        while wanted and wanted[0] in held:
            yield Picture(float(times[wanted[0]]), held.pop(wanted.pop(0)), shape)


def _thinned(times: np.ndarray) -> Callable[[int], bool]:
    """Which frames are kept so that there are at most 31 a second."""
    keep, last = np.zeros(len(times), bool), -math.inf
    for place, time in enumerate(times):
        if time - last >= 1 / _MOST_FPS:
            keep[place], last = True, time
    return lambda place: bool(keep[place])


def sound(file: BinaryIO, start: float, end: float) -> Iterator[av.AudioFrame]:
    """The sound of seconds [start, end), stamped from 0 at `start` on. None from where its time stamps start anew."""
    container, video = open_video(file)
    with closing(container):
        stream = next(iter(sound_of(file, container, video)), None)
        if stream is None or stream.time_base is None or video.time_base is None:
            return
        zero = _zero(file, container, video)
        begin = start + zero - 0.5
        if may_restart(file, container):
            decoded = _in_one_count(container, stream, begin)
        else:
            if start > 1:
                container.seek(int(begin * 1e6), backward=True)
            decoded = container.decode(stream)
        resampler = av.AudioResampler("fltp", "stereo", _RATE)
        for frame in decoded:
            if frame.pts is None or frame.time_base is None:
                continue
            at = float(frame.pts * frame.time_base) - zero
            if at >= end:
                break
            if at < start:
                continue
            frame.pts, frame.time_base = round((at - start) * _RATE), Fraction(1, _RATE)
            yield from resampler.resample(frame)


def _in_one_count(
    container: av.container.InputContainer, stream: av.AudioStream, begin: float
) -> Iterator[av.AudioFrame]:
    """The frames whose time stamps are at least `begin` seconds, read from the beginning up to where stamps jump."""
    last = None
    for packet in container.demux(stream):
        if packet.pts is not None and packet.time_base is not None:
            at = float(packet.pts * packet.time_base)
            if last is not None and not 0 <= at - last < JUMP:
                return
            last = at
            if at < begin:
                continue
        yield from packet.decode()


class _Encoder:
    """An mp4 with pictures and, if there are samples, sound."""

    def __init__(self, path: str):
        self._path = path
        self._scaler, self._colours = VideoReformatter(), VideoReformatter()
        self._sound: list[av.AudioFrame] = []
        self._packets: list[av.Packet] = []
        self._container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self._stream: av.VideoStream | None = None
        self._size = (0, 0)

    def __enter__(self) -> "_Encoder":
        return self

    def __exit__(self, kind, *_) -> None:
        with suppress(av.FFmpegError, ValueError, OSError):
            self._container.close()
        if kind is not None:
            with suppress(OSError):
                os.unlink(self._path)

    def add(self, picture: Picture, at: float) -> None:
        """Encode a picture that is shown `at` seconds after the first."""
        if self._stream is None:
            self._open(picture.shape)
        frame = self._converted(picture)
        frame.pts, frame.time_base, frame.pict_type = round(at * _TICKS), Fraction(1, _TICKS), 0
        assert self._stream is not None
        self._packets += self._stream.encode(frame)

    def add_sound(self, samples: av.AudioFrame) -> None:
        """Samples, once all pictures are in."""
        self._sound.append(samples)

    def finish(self, seconds: float) -> None:
        """Write all of it. `seconds`: how long the clip is, so that the last picture stays."""
        assert self._stream is not None
        self._packets += self._stream.encode(None)
        last = max(range(len(self._packets)), key=lambda i: self._packets[i].pts or 0)
        final = self._packets[last]
        final.duration = max(1, round(seconds / (final.time_base or Fraction(1, _TICKS))) - (final.pts or 0))
        packets = self._packets
        if self._sound:
            stream = self._container.add_stream("aac", rate=_RATE, layout="stereo")
            for samples in [*self._sound, None]:
                packets = packets + stream.encode(samples)
        packets.sort(key=lambda packet: float((packet.dts or 0) * (packet.time_base or 0)))
        for packet in packets:
            self._container.mux(packet)
        self._container.close()

    def _open(self, shape: Shape) -> None:
        """Square pixels, the short side 480 at most."""
        ratio = min(1.0, _SHORT_SIDE / min(shape.width, shape.height), 4 * _SHORT_SIDE / max(shape.width, shape.height))
        width, height = round(shape.width * ratio), round(shape.height * ratio)
        self._size = (max(2, width - width % 2), max(2, height - height % 2))
        options = {"preset": "superfast", "tune": "fastdecode", "crf": "23", "bf": "0", "threads": "1"}
        with usual_priority():
            self._stream = self._container.add_stream("libx264", rate=30, options=options)
            self._stream.width, self._stream.height = self._size
            self._stream.pix_fmt, self._stream.time_base = "yuv420p", Fraction(1, _TICKS)
            context = self._stream.codec_context
            context.time_base, context.gop_size = Fraction(1, _TICKS), 30
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = 1, 1  # BT.709

    def _converted(self, picture: Picture) -> av.VideoFrame:
        """The picture as a player shows it, in the clip's size and colours (BT.709)."""
        frame, shape = standard_range(picture.frame), picture.shape
        if shape.rotation or shape.mirrored:
            size = self._size[::-1] if shape.rotation % 180 else self._size
            array = self._scaler.reformat(frame, *size, "rgb24", threads=1).to_ndarray()
            frame = av.VideoFrame.from_ndarray(turned(array, shape), format="rgb24")
        return self._colours.reformat(
            frame, *self._size, "yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
        )

"""Frames of a video's segments, from a plain file or from a packed split, decoded once each and as evaluation makes them.

A plain file is read as packing it with `--profile copy` would: the frames that a player shows, in its order and at its times.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipelines.config import DataConfig
from pipelines.segments import Cutting, VideoSegment, positions_of, segments_of
from pipelines.stages.resize import resized
from shards import ShardError, VideoError
from shards.dataset import Dataset
from shards.disk_cache import Full
from shards.open_files import NoMoreFiles
from shards.remote import Unreachable
from shards.schema import Video
from shards.storage import opened
from shards.video.decode import WAYS
from shards.video.frame_pass import Pass, Unpredictable
from shards.video.picture import upright
from shards.video.random_access import checked, decode_stored, shape_of_stored
from shards.video.source import unsliced

CHUNK = 16  # frames that are handed on at once
THUMBNAIL = 320  # pixels of its long side at most
_QUALITY = 80  # of thumbnails, as PIL counts


@dataclass(frozen=True)
class Described:
    """A video, before its frames. Where one comes again, decoding starts anew, and what came before does not count."""

    duration: float  # seconds
    width: int  # as shown
    height: int
    segments: list[VideoSegment]


@dataclass(frozen=True)
class Frames:
    """Some frames of a video: positions int64 [n], increasing and each once in a video; pixels uint8 [n, S, S, 3], as large as the
    model takes them. thumbnails: {number of a segment: JPEG}, of its middle frame."""

    positions: np.ndarray
    pixels: np.ndarray
    thumbnails: dict[int, bytes] = field(default_factory=dict)


def frames_of_file(path: str | Path, config: DataConfig, cutting: Cutting) -> Iterator[Described | Frames]:
    """Of a video file. Memory does not grow with its length, but for its packets' stamps. Raises VideoError.

    config: the model's, `filled`."""
    with opened(Path(path)) as file:
        for way in WAYS.values():
            try:
                with way(file) as video_pass:
                    yield from _of_pass(video_pass, config, cutting)
                return
            except Unpredictable:
                continue
            except av.FFmpegError as error:
                raise VideoError(f"it cannot be decoded ({error.strerror})") from error
    raise AssertionError("decoding decides")


def _of_pass(video_pass: Pass, config: DataConfig, cutting: Cutting) -> Iterator[Described | Frames]:
    video = video_of_pass(video_pass)
    segments = segments_of(video, config, cutting)
    chosen = np.zeros(len(video.frames), bool)
    chosen[positions_of(segments)] = True
    shown = video_pass.frames(lambda number: bool(chosen[number]))

    def pictures() -> Iterator[tuple[int, np.ndarray]]:
        for one in shown:
            yield one.number, upright(one.frame, video_pass.shape)

    first = next(pairs := pictures(), None)
    shape = video_pass.shape
    if first is None or shape is None:
        raise VideoError("not one frame decodes")
    yield Described(video.duration, shape.width, shape.height, segments)
    yield from frames_of_pictures(chain([first], pairs), segments, config)


def video_of_pass(video_pass: Pass) -> Video:
    """The row of the sample table that packing with `--profile copy` would write, as far as choosing frames needs it."""
    when = video_pass.timeline
    return Video(
        index=0, shard="", key="", id="", ext="", offset=0, size=0, crc32c=0, codec=video_pass.context.name, width=0, height=0,
        rotation=0, fps=Fraction(when.fps), source_frames=len(when.times), duration=when.duration, extradata=b"",
        frames=unsliced(when.times),
    )  # fmt: skip


def frames_of_stored(
    split: Dataset, video: Video, config: DataConfig, cutting: Cutting
) -> Iterator[Described | Frames]:
    """Of a packed video whose frames are not all JPEGs, decoded on the CPU as the loader's `video` lane does it there.

    Bytes of a remote split that fail their checksum are fetched once more. Raises VideoError and ShardError."""
    try:
        yield from _of_stored(split, video, config, cutting)
    except (Unreachable, Full, NoMoreFiles):  # no fault of the video
        raise
    except (VideoError, ShardError):
        if not split.fetch_again(video):
            raise
        yield from _of_stored(split, video, config, cutting)


def _of_stored(split: Dataset, video: Video, config: DataConfig, cutting: Cutting) -> Iterator[Described | Frames]:
    segments, shape = segments_of(video, config, cutting), shape_of_stored(video)
    yield Described(video.duration, video.width, video.height, segments)
    read = checked(video, lambda offset, size: split.read(video, offset, size))
    frames = decode_stored(video, read, positions_of(segments).tolist())
    yield from frames_of_pictures(((position, upright(frame, shape)) for position, frame in frames), segments, config)


def frames_of_pictures(
    pictures: Iterable[tuple[int, np.ndarray]], segments: list[VideoSegment], config: DataConfig
) -> Iterator[Frames]:
    """Frames of whole pictures (position, uint8 RGB [H, W, 3]), a chunk at a time."""
    shows = shown_of(segments)
    positions: list[int] = []
    frames: list[np.ndarray] = []
    thumbnails: dict[int, bytes] = {}
    for position, picture in pictures:
        positions.append(position)
        frames.append(resized([picture], config, uncropped=False))
        if position in shows:
            thumbnails |= dict.fromkeys(shows[position], thumbnail(picture))
        if len(frames) == CHUNK:
            yield Frames(np.array(positions), np.concatenate(frames), thumbnails)
            positions, frames, thumbnails = [], [], {}
    if frames:
        yield Frames(np.array(positions), np.concatenate(frames), thumbnails)


def shown_of(segments: list[VideoSegment]) -> dict[int, list[int]]:
    """{position of a middle frame: numbers of the segments that it is shown for}"""
    shows: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        shows.setdefault(segment.middle, []).append(number)
    return shows


def thumbnail(picture: np.ndarray | Image.Image) -> bytes:
    """JPEG of a picture, uint8 RGB [H, W, 3], scaled down where its long side is above 320 pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if max(image.size) > THUMBNAIL:
        ratio = THUMBNAIL / max(image.size)
        size = [max(1, round(side * ratio)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()

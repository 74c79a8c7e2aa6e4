"""What a clip needs of its shard, fetched and checked against the crc32c of packing."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from pipelines.stages.jpeg_header import header_fault
from shards import ShardError, VideoError
from shards.dataset import Dataset
from shards.disk_cache import Full
from shards.open_files import NoMoreFiles, limit_reached
from shards.remote import Unreachable
from shards.schema import Video
from shards.video.random_access import pick_frames

_PAUSE = 0.2  # seconds before a read that failed is tried again


class BadSample(Exception):
    """A stored video whose wanted frames cannot be had, and why."""


@dataclass
class Source:
    """What was fetched of one clip.

    pieces    JPEGs, pictures uint8 [H, W, 3] or a whole file; of a clip that is `ready` one array uint8 [n, H, W, 3],
              as a graph would make it
    positions int64 [n], which stored frames these are, increasing
    pictures  the pieces are pictures
    """

    pieces: list[np.ndarray]
    positions: np.ndarray
    ready: bool = False
    pictures: bool = False
    cached: bool = False
    bytes_read: int = 0
    decoded: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0


NOTHING = Source([], np.empty(0, np.int64), ready=True)  # of a clip that is not fetched yet, or cannot be


class Reader:
    """Fetches frames of one split. Safe to use from several threads. Raises BadSample, and Unreachable
    or Full where it is not the sample's fault. Bytes of a remote split that fail their checksum are fetched once more."""

    def __init__(self, split: Dataset):
        self._split = split

    def jpegs(self, video: Video, positions: np.ndarray) -> Source:
        """The encoded frames, and nothing else of the file."""
        return self._twice(video, positions, self._jpegs)

    def pictures(
        self, video: Video, positions: np.ndarray, shape: Callable[[list[np.ndarray]], np.ndarray] | None = None
    ) -> Source:
        """The frames, decoded from the keyframe before each; with `shape`, which makes one array of them, ready."""
        source = self._twice(video, positions, self._pictures)
        if shape is not None:
            started = time.perf_counter()
            source.pieces, source.ready, source.pictures = [shape(source.pieces)], True, False
            source.decode_s += time.perf_counter() - started
        return source

    def file(self, video: Video, positions: np.ndarray) -> Source:
        """The whole stored file, of which a GPU decodes the frames."""
        return self._twice(video, positions, self._file)

    def _twice(self, video: Video, positions: np.ndarray, get: Callable[[Video, np.ndarray], Source]) -> Source:
        try:
            return get(video, positions)
        except BadSample:
            if not self._split.fetch_again(video):
                raise
        return get(video, positions)

    def _jpegs(self, video: Video, positions: np.ndarray) -> Source:
        started, frames = time.perf_counter(), video.frames
        sizes = frames.size[positions].tolist()
        offsets = frames.offset[positions].tolist()
        crcs = frames.crc32c[positions].tolist()
        pieces = []
        for position, offset, size, crc in zip(positions, offsets, sizes, crcs, strict=True):
            data = self._bytes(video, offset, size)
            if crc32c(data) != crc:
                raise BadSample(
                    f"crc32c of stored frame {position} differs from the sample table: the shard is damaged"
                )
            if fault := header_fault(data, video.width, video.height):
                raise BadSample(f"stored frame {position} cannot be decoded: {fault}")
            pieces.append(np.frombuffer(data, np.uint8))
        spent = time.perf_counter() - started
        return Source(pieces, positions, bytes_read=sum(sizes), decoded=len(pieces), read_s=spent)

    def _pictures(self, video: Video, positions: np.ndarray) -> Source:
        out = Source([], positions, pictures=True)
        started = time.perf_counter()

        def read(offset: int, size: int) -> bytes:
            begun = time.perf_counter()
            data = self._bytes(video, offset, size)
            if size < 0 and crc32c(data) != video.crc32c:
                raise VideoError("crc32c of the file differs from the sample table: the shard is damaged")
            out.bytes_read += len(data)
            out.read_s += time.perf_counter() - begun
            return data

        try:
            frames = pick_frames(video, read, positions)
        except VideoError as error:
            raise BadSample(str(error)) from error
        out.pieces = [frames[int(p)] for p in positions]
        out.decoded = frames.decoded
        out.decode_s = time.perf_counter() - started - out.read_s
        return out

    def _file(self, video: Video, positions: np.ndarray) -> Source:
        started = time.perf_counter()
        data = self._bytes(video, 0, -1)
        if crc32c(data) != video.crc32c:
            raise BadSample("crc32c of the file differs from the sample table: the shard is damaged")
        spent = time.perf_counter() - started
        return Source(
            [np.frombuffer(data, np.uint8)], positions, bytes_read=len(data), decoded=len(positions), read_s=spent
        )

    def _bytes(self, video: Video, offset: int, size: int) -> bytes:
        """Read once more, after a moment, where that fails: a disk or a network may hiccup, and memory be short."""
        try:
            return self._read(video, offset, size)
        except (_Failed, MemoryError):
            self._split.reopen(video)
        time.sleep(_PAUSE)
        try:
            return self._read(video, offset, size)
        except _Failed as error:
            raise BadSample(str(error)) from error

    def _read(self, video: Video, offset: int, size: int) -> bytes:
        try:
            return self._split.read(video, offset, size)
        except (Unreachable, Full, NoMoreFiles):  # no fault of the video
            raise
        except OSError as error:
            if limit := limit_reached(error):
                raise NoMoreFiles(f"{video.id} cannot be read: {limit}") from error
            raise _Failed(str(error)) from error
        except ShardError as error:
            raise _Failed(str(error)) from error


class _Failed(Exception):
    """Bytes that could not be read at the first try, and why."""

"""Videos into an index: frames by threads, features by the towers, rows into the store, a group of videos in each commit."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from c4c.retrieval.index.plan import IndexJob, VideoSources
from c4c.retrieval.index.rows import SHARD, Failure, IndexedVideo
from c4c.retrieval.index.store import Store
from pipelines.config import DataConfig
from pipelines.reading import Finished, ReadAtOnce
from pipelines.segment_frames import Described, Frames, frames_of_file
from pipelines.segments import Cutting, positions_of

_SEGMENTS_AT_ONCE = 64  # given to the head
_SEGMENTS_A_COMMIT = 2048  # at most
_SAMPLE, _FEWEST = 100, 20  # frames by which a runtime is compared with torch: at least, or not at all
_COMMIT_S = 20.0  # seconds after which what is done is committed, whatever its number


@dataclass
class IndexCounts:
    """What an indexing has done so far, and the seconds that it took: waiting for frames, in the towers, writing, and of all threads
    together reading and decoding."""

    videos: int = 0
    segments: int = 0
    frames: int = 0
    video_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    wait_s: float = 0.0
    towers_s: float = 0.0
    write_s: float = 0.0
    read_s: float = 0.0
    indexing_s: float = 0.0  # from the first video to the last commit
    agreement: float | None = None  # of the runtime with torch in fp32, see `Encoder.loss`

    @property
    def done(self) -> int:
        """Videos that are through, unreadable ones included."""
        return self.videos + len(self.failures)


class _Coming:
    """A video of which frames are coming in."""

    def __init__(self, job: IndexJob, about: Described, width: int):
        self.job, self.about = job, about
        self.positions = positions_of(about.segments)
        self.features = np.zeros((len(self.positions), width), np.float32)
        self.thumbnails: dict[int, bytes] = {}
        self.filled = 0  # frames that have features
        self.finished = False

    @property
    def is_complete(self) -> bool:
        return self.finished and self.filled == len(self.positions)

    def fill(self, positions: np.ndarray, features: np.ndarray) -> None:
        self.features[np.searchsorted(self.positions, positions)] = features
        self.filled += len(positions)


class _Framewise:
    """Encodes frames of whichever videos in blocks of the size that the tower is given at once."""

    def __init__(self, encoder: Any, counts: IndexCounts):
        self._encoder, self._counts = encoder, counts
        self._waiting: list[tuple[_Coming, np.ndarray, np.ndarray]] = []
        self._rows = 0
        self._sample: list[np.ndarray] | None = None if encoder.runtime == "torch" else []

    def add(self, coming: _Coming, frames: Frames) -> None:
        self._waiting.append((coming, frames.positions, frames.pixels))
        self._rows += len(frames.positions)
        if self._sample is not None and len(self._sample) < _SAMPLE:
            self._sample += [frames.pixels[0], frames.pixels[-1]][: len(frames.pixels)]
        if self._rows >= self._encoder.block:
            self.encode(self._rows - self._rows % self._encoder.block)

    def forget(self, coming: _Coming | None) -> None:
        """Nothing: its frames are few."""

    def encode(self, rows: int | None = None) -> None:
        """The first `rows` of the frames that wait, or all."""
        rows = self._rows if rows is None else rows
        if not rows:
            return
        taken, self._waiting, left = self._waiting, [], rows
        batch = []
        for coming, positions, pixels in taken:
            batch.append((coming, positions[:left], pixels[:left]))
            if left < len(positions):
                self._waiting.append((coming, positions[left:], pixels[left:]))
            left = max(0, left - len(positions))
        self._rows -= rows
        began = time.perf_counter()
        features = self._encoder.frames(np.concatenate([pixels for _, _, pixels in batch])).float().cpu().numpy()
        self._counts.towers_s += time.perf_counter() - began
        self._counts.frames += rows
        at = 0
        for coming, positions, _ in batch:
            if len(positions):
                coming.fill(positions, features[at : at + len(positions)])
                at += len(positions)

    def agreement(self) -> float | None:
        """How well the runtime does on a sample of the frames; None if it is torch's fp32, or there are too few."""
        if self._sample is None or len(self._sample) < _FEWEST:
            return None
        return self._encoder.loss(np.stack(self._sample))

    def clip_features(self, coming: _Coming, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame features [M, F, D] and mask [M, F] of segments [first, last)."""
        segments = coming.about.segments[first:last]
        features, mask = _empty(len(segments), self._encoder)
        for row, segment in enumerate(segments):
            places = np.searchsorted(coming.positions, segment.positions)
            features[row, : len(places)] = torch.from_numpy(coming.features[places])
            mask[row, : len(places)] = True
        return features, mask


class _Clipwise:
    """Encodes whole clips, for towers in which frames meet. Frames are kept as long as a segment to come shows them."""

    def __init__(self, encoder: Any, counts: IndexCounts):
        self._encoder, self._counts = encoder, counts
        self._pixels: dict[_Coming, dict[int, np.ndarray]] = {}
        self._clips: dict[_Coming, list[torch.Tensor]] = {}

    def add(self, coming: _Coming, frames: Frames) -> None:
        have = self._pixels.setdefault(coming, {})
        have |= dict(zip(frames.positions.tolist(), frames.pixels, strict=True))
        clips, segments = self._clips.setdefault(coming, []), coming.about.segments
        while len(clips) < len(segments) and have.keys() >= set((needed := segments[len(clips)].positions).tolist()):
            clips.append(self._encode(np.stack([have[p] for p in needed.tolist()])))
        if len(clips) < len(segments):
            first = min(int(segment.positions.min()) for segment in segments[len(clips) :])
            for position in [p for p in have if p < first]:
                del have[position]
        coming.filled += len(frames.positions)

    def encode(self, rows: int | None = None) -> None:
        """Nothing waits."""

    def forget(self, coming: _Coming | None) -> None:
        """Let go of a video that does not come to its end."""
        self._pixels.pop(coming, None)  # type: ignore[arg-type]
        self._clips.pop(coming, None)  # type: ignore[arg-type]

    def agreement(self) -> float | None:
        """Not measured."""
        return None

    def _encode(self, pixels: np.ndarray) -> torch.Tensor:
        frames = self._encoder.data.num_frames
        clip = np.zeros((1, frames, *pixels.shape[1:]), np.uint8)
        clip[0, : len(pixels)] = pixels
        mask = np.arange(frames)[None] < len(pixels)
        began = time.perf_counter()
        features = self._encoder.clips(clip, mask).float().cpu()[0]
        self._counts.towers_s += time.perf_counter() - began
        self._counts.frames += len(pixels)
        return features

    def clip_features(self, coming: _Coming, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As of _Framewise."""
        clips = self._clips[coming][first:last]
        features, mask = _empty(len(clips), self._encoder)
        for row, clip in enumerate(clips):
            features[row, : len(clip)] = clip
            mask[row, : len(coming.about.segments[first + row].positions)] = True
        if last >= len(self._clips[coming]):
            del self._clips[coming], self._pixels[coming]
        return features, mask


def _empty(rows: int, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    frames = encoder.data.num_frames
    return torch.zeros(rows, frames, encoder.identity.width), torch.zeros(rows, frames, dtype=torch.bool)


class Indexing:
    """Puts videos into a store.

    encoder: `c4c.retrieval.encoder.Encoder`; commit: videos a commit at most; before: {video: written} of those that it holds; failed: paths
    that it lists as unreadable; tell: is called whenever a video is through."""

    def __init__(
        self, store: Store, encoder: Any, sources: VideoSources, cutting: Cutting, *, threads: int, commit: int,
        before: dict[str, int], failed: Collection[str] = (), tell: Callable[[IndexCounts], None] = lambda counts: None,
    ):  # fmt: skip
        self._store, self._encoder, self._sources, self._cutting = store, encoder, sources, cutting
        self._threads, self._commit, self._before, self._tell = threads, commit, before, tell
        self._failed = set(failed)
        self._config: DataConfig = encoder.data
        self.counts = IndexCounts()
        self._frames = (_Framewise if encoder.framewise else _Clipwise)(encoder, self.counts)
        self._coming: dict[str, _Coming] = {}  # by path
        self._group: list[IndexedVideo] = []
        self._bad: list[Failure] = []
        self._committed = time.monotonic()
        self._lanes: dict[str, Any] = {}

    def run(self, jobs: Sequence[IndexJob]) -> IndexCounts:
        """Index the videos. What is committed stays, however it ends. Raises OSError if the index cannot be written."""
        started = time.perf_counter()
        try:
            self._open_lanes(jobs)
            before = time.perf_counter()
            with closing(iter(ReadAtOnce(jobs, self._read, self._threads))) as events:
                for job, event in events:
                    self.counts.wait_s += time.perf_counter() - before
                    self._take(job, event)
                    if time.monotonic() - self._committed > _COMMIT_S:
                        self.flush()
                    before = time.perf_counter()
            self._frames.encode()
            self._collect()
            for coming in list(self._coming.values()):
                self._fail(
                    coming.job, f"{len(coming.positions) - coming.filled} of its frames did not come out of the decoder"
                )
        except KeyboardInterrupt:
            self.flush()
            raise
        finally:
            for lane in self._lanes.values():
                lane.close()
        self.flush()
        self.counts.indexing_s = time.perf_counter() - started
        self.counts.agreement = self._frames.agreement()
        return self.counts

    def _open_lanes(self, jobs: Sequence[IndexJob]) -> None:
        for root in sorted({job.listed.root for job in jobs if job.listed.source == SHARD}):
            from pipelines.segment_lane import SegmentLane  # it imports DALI, which plain files do not need

            device = torch.device(self._encoder.device)
            self._lanes[root] = SegmentLane(self._sources.splits[root], self._config, device, self._cutting)

    def _read(self, job: IndexJob) -> Iterator[Described | Frames]:
        listed = job.listed
        if listed.source == SHARD:
            assert isinstance(listed.place, int)
            return self._lanes[listed.root].read(self._sources.splits[listed.root].video(listed.place))
        return frames_of_file(str(listed.place), self._config, self._cutting)

    def _take(self, job: IndexJob, event: Described | Frames | Finished) -> None:
        path = job.listed.path
        if isinstance(event, Described):
            self._frames.forget(self._coming.get(path))
            self._coming[path] = _Coming(job, event, self._encoder.identity.width)
        elif isinstance(event, Frames):
            coming = self._coming[path]
            coming.thumbnails |= event.thumbnails
            self._frames.add(coming, event)
            self._collect()
        else:
            self.counts.read_s += event.seconds
            coming_or_none = self._coming.get(path)
            if event.error or coming_or_none is None:
                self._frames.forget(self._coming.pop(path, None))
                self._fail(job, event.error or "not one frame decodes")
            else:
                coming_or_none.finished = True
                self._collect()

    def _collect(self) -> None:
        """Make rows of the videos that are complete."""
        for path, coming in [(p, c) for p, c in self._coming.items() if c.is_complete]:
            del self._coming[path]
            try:
                self._group.append(self._row(coming))
            except ValueError as error:
                self._fail(coming.job, str(error))
                continue
            self.counts.videos += 1
            self.counts.segments += len(coming.about.segments)
            self.counts.video_s += coming.about.duration
            if len(self._group) >= self._commit or sum(len(v.starts) for v in self._group) >= _SEGMENTS_A_COMMIT:
                self.flush()
            self._tell(self.counts)

    def _row(self, coming: _Coming) -> IndexedVideo:
        job, about, vectors, frames = coming.job, coming.about, [], []
        began = time.perf_counter()
        for first in range(0, len(about.segments), _SEGMENTS_AT_ONCE):
            features, mask = self._frames.clip_features(coming, first, first + _SEGMENTS_AT_ONCE)
            videos = self._encoder.videos(features, mask)
            vectors.append(self._encoder.video_vectors(videos).float().cpu().numpy())
            if self._encoder.late:
                frames.append(videos.half().cpu().numpy())
        self.counts.towers_s += time.perf_counter() - began
        every = np.concatenate(vectors)
        stored = np.concatenate(frames) if frames else None
        if not np.isfinite(every).all():
            raise ValueError("its features are not finite")
        if stored is not None and not np.isfinite(stored).all():
            raise ValueError("its frames' features are too large to be stored in 16 bits")
        listed = job.listed
        return IndexedVideo(
            video=job.video, path=listed.path, source=listed.source, size=listed.size, mtime_ns=listed.mtime_ns,
            duration=about.duration, width=about.width, height=about.height,
            starts=[segment.start for segment in about.segments], ends=[segment.end for segment in about.segments],
            vectors=every, thumbnails=[coming.thumbnails[i] for i in range(len(about.segments))],
            frames=stored,
        )  # fmt: skip

    def _fail(self, job: IndexJob, reason: str) -> None:
        failure = Failure(job.listed.path, reason, job.listed.size, job.listed.mtime_ns)
        self._bad.append(failure)
        self.counts.failures.append(failure)
        if job.changed and job.video in self._before:  # what it was before is not there any more
            self._store.delete_sets([(job.video, self._before[job.video])])
        self._tell(self.counts)

    def flush(self) -> None:
        """Commit what is done."""
        began, self._committed = time.perf_counter(), time.monotonic()
        group, self._group = self._group, []
        bad, self._bad = self._bad, []
        self._store.append(group, self._before)
        self._store.fail(bad)
        if better := self._failed & {video.path for video in group}:
            self._store.forgive(better)
        self.counts.write_s += time.perf_counter() - began

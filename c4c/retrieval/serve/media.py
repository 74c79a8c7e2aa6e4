"""The videos behind the segments of an index: which file it is, whether it is still the same, and what of it is sent.

A request names a segment, never a file. What is opened is the path that the index holds for it, and only if its size and time
are those of the file that was indexed; from a split, bytes at the place in the tar that the sample table names.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from anyio import to_thread

from c4c.retrieval.index.plan import os_path, state_of
from c4c.retrieval.index.rows import SHARD
from c4c.retrieval.serve.batching import Recent
from c4c.retrieval.serve.clips import BrowserClip, Clips
from c4c.retrieval.serve.guard import Refusal, unreadable_index
from c4c.retrieval.serve.jobs import JobFailed, Jobs
from c4c.retrieval.serve.names import from_name, shown, to_name
from c4c.retrieval.serve.ranges import Bytes, FileBytes, RangedResponse, opened
from shards import ShardError
from shards.schema import Video
from shards.split import Split

_BEFORE_S, _AFTER_S = 1.0, 1.0  # of a segment, in a clip
_LONGEST_CLIP_S = 60.0
_PROBE_LIMIT_S = 20
REMOVED = "This video was removed or moved after it was indexed."
CHANGED = "This video was changed after it was indexed. Index it again to play it."


@dataclass(frozen=True)
class Located:
    """A segment and where its video is: `source` in the words of a job (transcode.source_of), with a `state` that changes with
    the file. Of a split, `split` and `row` are it."""

    hit: Any
    source: dict
    split: Split | None = None
    row: Video | None = None


@dataclass
class Splits:
    """The splits that the index speaks of, opened when they are needed."""

    _open: dict[str, tuple[int, Split]] = field(default_factory=dict)
    _rows: Recent[tuple[str, int, str], Video] = field(default_factory=lambda: Recent(4096))
    _lock: Lock = field(default_factory=Lock)

    def find(self, folder: str, key: str) -> tuple[Split, Video]:
        """The video of that key. Raises ShardError if it is not there any more."""
        place = Path(folder) / "dataset.json"
        state = 0 if "://" in folder else (place.stat().st_mtime_ns if place.exists() else -1)
        with self._lock:
            if self._open.get(folder, (None,))[0] != state:
                self._open[folder] = (state, Split(folder))
            split = self._open[folder][1]
        if (row := self._rows.get((folder, state, key))) is None:
            row = split.find(key)
            self._rows.put((folder, state, key), row)
        return split, row


class Media:
    """Sends videos of the index to browsers."""

    def __init__(self, store: Any, jobs: Jobs, clips: Clips):
        self._store, self._jobs, self._clips = store, jobs, clips
        self._splits = Splits()
        self._types: Recent[str, str] = Recent(4096)  # '' where no browser plays the file

    async def play(self, name: str, as_clip: bool) -> dict:
        """What a page needs to play a segment. Raises Refusal."""
        located = await self._located(name)
        hit, kind = located.hit, "" if as_clip else await self._type(located)
        answer = {
            "id": name, "video": shown(hit.video), "video_id": to_name(hit.video), "start": hit.start, "end": hit.end,
            "duration": hit.duration, "kind": "file", "type": kind, "url": f"media/{name}", "offset": 0.0, "until": hit.duration,
        }  # fmt: skip
        if kind:
            return answer
        _, end = self._window(hit)
        clip = await self._clip(located)
        return answer | {
            "kind": "clip", "type": "video/mp4", "url": f"media/{name}?clip=true", "offset": clip.start, "until": end
        }  # fmt: skip

    async def response(self, name: str, as_clip: bool) -> RangedResponse:
        """The bytes. Raises Refusal."""
        located = await self._located(name)
        kind = "" if as_clip else await self._type(located)
        headers = {"Content-Disposition": "inline"}
        if not kind:
            clip = await self._clip(located)
            try:
                source: Bytes = await to_thread.run_sync(opened, str(clip.path))
            except OSError as error:
                raise Refusal(503, "The clip was dropped just now. Try again.") from error
            return RangedResponse(source, "video/mp4", clip.name, headers | {"X-Clip-Start": f"{clip.start:.3f}"})
        if located.split is None:
            source = await to_thread.run_sync(self._open, located)
        else:
            source = _SplitBytes(located.split, located.row)
        return RangedResponse(source, kind, repr(sorted(located.source.items())), headers)

    async def _located(self, name: str) -> Located:
        return await to_thread.run_sync(self._locate, from_name(name))

    def _locate(self, segment: str) -> Located:
        try:
            hit = self._store.segment(segment)
            known = None if hit is None else self._store.known_of(hit.video)
        except (ValueError, OSError, RuntimeError) as error:
            raise unreadable_index(error) from error
        if hit is None or known is None:
            raise Refusal(404, "The index holds no such segment.")
        folder, mark, key = known.path.rpartition("::")
        if mark and known.source == SHARD:
            try:
                split, row = self._splits.find(folder, key)
                if "://" not in folder:
                    split.read(row, 0, 1)  # its shard may be gone, and the answer would break off after its first line
            except (ShardError, OSError) as error:
                raise Refusal(410, REMOVED) from error
            # an index of before knows the crc32c of the bytes alone
            if known.size != row.size or known.mtime_ns not in (state_of(row), row.crc32c):
                raise Refusal(410, CHANGED)
            state = f"{row.size} {state_of(row)}"
            return Located(hit, {"split": folder, "video": row.index, "state": state}, split, row)
        located = Located(hit, {"path": os_path(known.path), "state": f"{known.size} {known.mtime_ns}"})
        self._open(located).close()
        return located

    def _open(self, located: Located) -> FileBytes:
        """The file. Raises Refusal where it is not the one that was indexed."""
        state = located.source["state"]

        def same(status: os.stat_result) -> None:
            if not stat.S_ISREG(status.st_mode) or f"{status.st_size} {status.st_mtime_ns}" != state:
                raise Refusal(410, CHANGED)

        try:
            return opened(located.source["path"], same)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Refusal(410, REMOVED) from error
        except (OSError, ValueError) as error:
            raise Refusal(410, "This video cannot be read any more.") from error

    async def _type(self, located: Located) -> str:
        """The media type, if browsers play the file as it is; else ''."""
        if located.row is not None and located.row.codec in ("mjpeg", "hevc", "mpeg4"):
            return ""
        key = repr(sorted(located.source.items()))
        if (kind := self._types.get(key)) is None:
            try:
                words = {name: value for name, value in located.source.items() if name != "state"}
                kind = (await self._jobs.run({"kind": "probe", **words}, _PROBE_LIMIT_S))["type"] or ""
            except JobFailed as error:
                raise Refusal(415, f"This video cannot be played: {error}.") from error
            if located.row is not None and located.row.inside != (0, len(located.row.frames)):
                kind = ""  # a cut, in whose file frames stand that are not shown
            self._types.put(key, kind)
        return kind

    def _window(self, hit: Any) -> tuple[float, float]:
        end = min(hit.end, hit.start + _LONGEST_CLIP_S)
        return round(max(0.0, hit.start - _BEFORE_S), 3), round(min(end + _AFTER_S, hit.duration), 3)

    async def _clip(self, located: Located) -> BrowserClip:
        try:
            return await self._clips.get(located.source, *self._window(located.hit))
        except JobFailed as error:
            raise Refusal(415, f"This video cannot be played: {error}.") from error


class _SplitBytes:
    """The stored file of a packed video (see ranges.Bytes)."""

    def __init__(self, split: Split, row: Video | None):
        assert row is not None
        self._split, self._row = split, row
        self.size, self.modified = row.size, 0.0

    def read(self, size: int, offset: int) -> bytes:
        """See ranges.Bytes."""
        return self._split.read(self._row, offset, min(size, self.size - offset))

    def close(self) -> None:
        """The split stays open."""

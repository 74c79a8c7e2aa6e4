"""What the routes ask of the index: searches, thumbnails, segments. The slow parts run in threads."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from c4c.retrieval.index.filters import Choice
from c4c.retrieval.index.names import hint
from c4c.retrieval.search.query import clean
from c4c.retrieval.serve import log, uploads
from c4c.retrieval.serve.batching import Recent, TextBatcher
from c4c.retrieval.serve.clips import Clips, ServerFolder
from c4c.retrieval.serve.guard import Refusal, unreadable_index
from c4c.retrieval.serve.jobs import JobFailed, Jobs
from c4c.retrieval.serve.media import Media
from c4c.retrieval.serve.monitor import Monitor
from c4c.retrieval.serve.names import from_name, shown, to_name

LONGEST_QUERY = 10_000  # characters
MOST_RESULTS = 500
_SEARCH_LIMIT_S = 30
_DECODE_LIMIT_S = 60
_MODEL_LIMIT_S = 180  # the first search by example loads the whole model
_UPLOADS = 4  # at once


class Engine:
    """One index, ready to be asked from many tasks at once."""

    def __init__(self, searcher: Any, monitor: Monitor, max_upload_bytes: int, checkpoint: str | None = None):
        """checkpoint: what --ckpt names."""
        self._searcher, self._monitor = searcher, monitor
        self._max_upload_bytes, self._checkpoint = max_upload_bytes, checkpoint
        self._text = TextBatcher(searcher.encode, monitor)
        self._answers: Recent[tuple, list[dict]] = Recent(512)
        self._mark = _mark(searcher.store.uri)
        self._threads = CapacityLimiter(4)  # searches at once: each uses several cores
        self._uploads = asyncio.Semaphore(_UPLOADS)
        self._folder = ServerFolder()
        self._videos = Jobs("clip", monitor, 2, self._folder.empty)
        self._examples = Jobs("example", monitor, 1, self._folder.empty)
        self.media = Media(searcher.store, self._videos, Clips(self._videos, self._folder.path))

    async def start(self) -> None:
        """Start the processes that make clips. Those that read examples import torch, and come with the first example."""
        await self._videos.start()

    async def close(self) -> None:
        """End its processes and delete its temporary files."""
        await self._text.close()
        await self._videos.close()
        await self._examples.close()
        self._folder.close()

    async def search(self, query: str, k: int, choice: Choice) -> tuple[str, str, list[dict]]:
        """(the sentence that was searched for, a note, results)."""
        if len(query) > LONGEST_QUERY:
            raise Refusal(422, f"The sentence is too long: {len(query)} characters, and {LONGEST_QUERY} at most.")
        try:
            sentence = clean(query)
        except ValueError as error:
            raise Refusal(422, "The sentence is empty. Type what the video shows.") from error
        features = await self._safely(self._text.features(sentence), _SEARCH_LIMIT_S)
        note = await self._run(self._searcher.note, sentence)
        rows = await self._found(("text", sentence), k, choice, partial(self._searcher.find, features))
        return sentence, " ".join(filter(None, (_sentence(note), await self._hint(choice, rows)))), rows

    async def similar(self, name: str, k: int, choice: Choice) -> tuple[str, str, list[dict]]:
        """(name of the video, a note, results)."""
        segment = from_name(name)
        hit = await self._run(self._searcher.store.segment, segment)
        if hit is None:
            raise Refusal(404, "The index holds no such segment.")
        rows = await self._found(("similar", segment), k, choice, partial(self._searcher.similar, segment))
        return shown(hit.video), await self._hint(choice, rows), rows

    async def by_example(self, request: Request, k: int, choice: Choice) -> tuple[str, list[dict]]:
        """(a note, results) for an uploaded clip or picture."""
        if self._uploads.locked():
            raise Refusal(503, "Too many files are being uploaded. Try again in a moment.", {"Retry-After": "10"})
        place = self._folder.path / f"upload-{uuid4().hex}"
        async with self._uploads:
            try:
                await uploads.receive(request, place, self._max_upload_bytes)
                job = {
                    "kind": "example",
                    "path": str(place),
                    "out": f"{place}.npz",
                    "settings": self._searcher.example_settings,
                }
                try:
                    await self._examples.run(job, _DECODE_LIMIT_S)
                except JobFailed as error:
                    raise Refusal(415, f"This is no clip or picture that can be read: {error}.") from error
                find = partial(self._by_frames, f"{place}.npz")
                rows = await self._found(None, k, choice, find, _MODEL_LIMIT_S)
                return await self._hint(choice, rows), rows
            finally:
                await asyncio.shield(asyncio.to_thread(_delete, place))

    def _by_frames(self, file: str, k: int, **how: Any) -> list:
        try:
            return self._searcher.by_frames(file, k, **how)
        except (ValueError, OSError) as error:
            log.report(error)
            what = "names another, or cannot be read" if self._checkpoint else "can name it"
            raise Refusal(
                503,
                f"A search by a clip or picture needs the checkpoint that made the index. The server's --ckpt {what}; its log says more.",
            ) from error

    async def segments(self, name: str) -> dict:
        """All segments of a video."""
        video = from_name(name)
        hits = await self._run(self._searcher.store.segments_of, video)
        if not hits:
            raise Refusal(404, "The index holds no such video.")
        rows = [{"id": to_name(hit.id), "start": hit.start, "end": hit.end} for hit in hits]
        return {"video": shown(video), "duration": hits[0].duration, "segments": rows}

    async def thumbnail(self, name: str) -> bytes:
        """JPEG."""
        segment = from_name(name)

        def find() -> bytes | None:
            try:
                return self._searcher.thumbnail(segment)
            except ValueError:
                return None

        if (picture := await self._run(find)) is None:
            raise Refusal(404, "The index holds no such segment.")
        return picture

    async def counts(self) -> tuple[int, int]:
        """How many segments and videos the index holds. Raises Refusal where it cannot be read."""
        store = self._searcher.store
        await self._run(self._state)
        segments, videos = await self._run(lambda: (len(store), store.n_videos))
        self._monitor.set("c4c_index_segments", segments)
        return segments, videos

    async def _found(
        self, key: tuple | None, k: int, choice: Choice, find: Callable[..., list], limit_s: float = _SEARCH_LIMIT_S
    ) -> list[dict]:
        version = await self._run(self._state)
        known = None if key is None else self._answers.get((key, k, choice, version))
        if known is not None:
            return known
        rows = [_row(result) for result in await self._run(partial(find, k, **asdict(choice)), limit_s=limit_s)]
        if key is not None:
            self._answers.put((key, k, choice, version), rows)
        return rows

    async def _hint(self, choice: Choice, rows: list[dict]) -> str:
        """A sentence on the names that were asked for, where there are none."""
        if rows or choice.path is None:
            return ""
        return _sentence(await self._run(hint, self._searcher.store, choice))

    def _state(self) -> tuple:
        """Changes with the rows. Raises ValueError where the index is another one by now: its vectors would be compared with
        those of this one's model, and the scores would mean nothing."""
        store = self._searcher.store
        mark = _mark(store.uri)
        if mark != self._mark:
            about = store.about_of(store.uri)
            difference = "there is none" if about is None else store.about.difference(about)
            if difference:
                raise ValueError(f"{store.uri} was replaced ({difference}): start the server again")
            self._mark = mark
        return mark, store.version

    async def _run(self, call: Callable, *words: Any, limit_s: float = _SEARCH_LIMIT_S) -> Any:
        """Call in a thread."""
        thread = to_thread.run_sync(partial(call, *words), limiter=self._threads, abandon_on_cancel=True)
        return await self._safely(thread, limit_s)

    async def _safely(self, waiting: Awaitable[Any], limit_s: float) -> Any:
        """What goes wrong here is no fault of the request."""
        try:
            async with asyncio.timeout(limit_s):
                return await waiting
        except TimeoutError as error:
            raise Refusal(503, "The search took too long. Try again.", {"Retry-After": "5"}) from error
        except (ValueError, OSError, RuntimeError) as error:
            raise unreadable_index(error) from error


def _mark(uri: str) -> tuple[int, int] | None:
    """Of the table `about`, which is written once; None for an index that is no folder here. Raises OSError if it is gone."""
    if "://" in uri:
        return None
    status = os.stat(os.path.join(uri, "about.lance", "_versions"))
    return status.st_ino, status.st_mtime_ns


def _sentence(note: str) -> str:
    """A note as the page shows it."""
    return note and f"{note[0].upper()}{note[1:].rstrip('.')}{'' if note.endswith('?') else '.'}"


def _delete(upload: Path) -> None:
    """What is left of an upload."""
    for left in upload.parent.glob(f"{upload.name}*"):
        left.unlink(missing_ok=True)


def _row(result: Any) -> dict:
    name = to_name(result.id)
    return {
        "id": name, "video_id": to_name(result.video), "video": shown(result.video), "start": round(result.start, 3),
        "end": round(result.end, 3), "duration": round(result.duration, 3), "score": round(result.score, 6),
        "thumbnail": f"thumbnail/{name}", "media": f"media/{name}",
    }  # fmt: skip

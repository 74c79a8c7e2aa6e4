"""Clips that were made for browsers, as many as fit into a bounded part of a temporary folder; and that folder."""

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from c4c.retrieval.serve.jobs import Jobs

_PREFIX = "c4c-serve-"
_MOST_BYTES = 512 << 20
_LIMIT_S = 60  # for making one


@dataclass(frozen=True)
class BrowserClip:
    """A file with a part of a video; `start`: seconds of the video at which it begins; `name` tells it from every other."""

    path: Path
    name: str
    start: float
    size: int


class ServerFolder:
    """A folder for the server's temporary files: clips, uploads, and one that is empty, in which processes run that decode, so
    that a file name inside a video leads nowhere."""

    def __init__(self):
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 held while the server lives, see _sweep
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.empty = self.path / "empty"
        self.empty.mkdir()

    def close(self) -> None:
        """Delete it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


class Clips:
    """Makes clips, and keeps those that were asked for last."""

    def __init__(self, jobs: Jobs, folder: Path, most_bytes: int = _MOST_BYTES):
        self._jobs, self._folder, self._most_bytes = jobs, folder, most_bytes
        self._clips: OrderedDict[str, BrowserClip] = OrderedDict()
        self._making: dict[str, asyncio.Task[BrowserClip]] = {}

    async def get(self, source: dict, start: float, end: float) -> BrowserClip:
        """Seconds [start, end) of `source`, words of a job (see transcode.clip). Raises JobFailed, Refusal."""
        name = hashlib.sha256(repr((sorted(source.items()), start, end)).encode()).hexdigest()[:32]
        if (clip := self._clips.get(name)) is not None and clip.path.exists():
            self._clips.move_to_end(name)
            return clip
        if (task := self._making.get(name)) is None:  # who asks while it is made waits for the same one
            task = self._making[name] = asyncio.create_task(self._make(name, source, start, end))
            task.add_done_callback(lambda done: self._made(name, done))
        return await asyncio.shield(task)

    async def _make(self, name: str, source: dict, start: float, end: float) -> BrowserClip:
        path = self._folder / f"{name}.mp4"
        words = {key: value for key, value in source.items() if key != "state"}
        answer = await self._jobs.run({"kind": "clip", **words, "start": start, "end": end, "out": str(path)}, _LIMIT_S)
        return BrowserClip(path, name, answer["start"], answer["size"])

    def _made(self, name: str, task: asyncio.Task[BrowserClip]) -> None:
        self._making.pop(name, None)
        if task.cancelled() or task.exception() is not None:
            for left in self._folder.glob(f"{name}.*"):
                left.unlink(missing_ok=True)
            return
        self._clips[name] = task.result()
        while sum(clip.size for clip in self._clips.values()) > self._most_bytes and len(self._clips) > 1:
            _, oldest = self._clips.popitem(last=False)
            oldest.path.unlink(missing_ok=True)  # whoever is reading it has it open


def _sweep() -> None:
    """Delete what servers left behind that were killed: nobody holds the lock in their folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with open(folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

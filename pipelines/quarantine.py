"""Videos that could not be used: counted, named once, and too many of them end the run."""

import json
import os
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from shards import ShardError

if TYPE_CHECKING:  # the functions below are used where nothing heavy may be imported
    from shards.schema import Video


class Quarantine:
    """Bad samples of the split at `split`; `file` (JSON lines, shared by ranks) lists each video once."""

    def __init__(self, split: object, file: Path | None, max_bad_fraction: float):
        self.split, self._file, self._limit = split, file, max_bad_fraction
        self._bad: dict[int, int] = {}
        self.read = 0  # samples asked for so far, good and bad

    def report(self, video: "Video", reason: Exception) -> None:
        """Raises ShardError once more than `max_bad_fraction` of what was read, or of the first 1000, is bad."""
        self._bad[video.index] = self._bad.get(video.index, 0) + 1
        if self._bad[video.index] == 1:
            warnings.warn(f"{self.split}: {video.id} cannot be used and is replaced: {reason}", stacklevel=2)
            if self._file is not None and not self._listed(self._file, video.key):
                self._list(self._file, video, reason)
        bad = sum(self._bad.values())
        if bad > self._limit * max(self.read, 1000):
            raise ShardError(
                f"{bad} of {self.read} samples read from {self.split} are bad, more than "
                f"data.max_bad_fraction={self._limit} allows. Last: {video.id}: {reason}. Run: {verify_command(self.split)}"
            )

    def _list(self, file: Path, video: "Video", reason: Exception) -> None:
        try:
            append_line(file, {"split": str(self.split), "key": video.key, "id": video.id, "reason": str(reason)})
        except OSError as error:  # a full disk is no reason to end a run
            warnings.warn(f"{file} could not be written: {error.strerror}", stacklevel=2)

    def _listed(self, file: Path, key: str) -> bool:
        """Whether another rank, or this run before it was resumed, has listed the video."""
        entries = json_lines(file)
        return any(entry.get("key") == key and entry.get("split") == str(self.split) for entry in entries)


def verify_command(split: object) -> str:
    """What finds the bad videos of a split, or of several that are joined."""
    return "; ".join(f"python -m c4c.shard verify {shlex.quote(path)}" for path in str(split).split(" + "))


def json_lines(file: Path) -> list[dict]:
    """The objects in a JSON-lines file, [] if there is no file. A kill or a full disk may tear a line: it is left out."""
    text = file.read_text(errors="replace") if file.exists() else ""
    return [row for line in text.split("\n") if (row := json_object(line)) is not None]


def json_object(line: str) -> dict | None:
    """The object that a line holds, None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def append_line(file: Path, row: dict) -> None:
    """Add an object to a JSON-lines file. If the last line is torn, it is ended first."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        torn = False
        if os.fstat(descriptor).st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            torn = os.read(descriptor, 1) != b"\n"
        os.write(descriptor, b"\n" * torn + json.dumps(row).encode() + b"\n")  # one write: ranks share the file
    finally:
        os.close(descriptor)

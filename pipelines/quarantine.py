"""Videos that could not be used: counted, named once, and too many of them end the run."""

import json
import os
import warnings
from pathlib import Path

from shards import ShardError
from shards.schema import Video


class Quarantine:
    """Bad samples of the split at `split`; `file` (JSON lines, shared by ranks) lists each video once."""

    def __init__(self, split: Path, file: Path | None, max_bad_fraction: float):
        self._split, self._file, self._limit = split, file, max_bad_fraction
        self._bad: dict[int, int] = {}
        self.read = 0  # samples asked for so far, good and bad

    def report(self, video: Video, reason: Exception) -> None:
        """Raises ShardError once more than `max_bad_fraction` of what was read, or of the first 1000, is bad."""
        self._bad[video.index] = self._bad.get(video.index, 0) + 1
        if self._bad[video.index] == 1:
            warnings.warn(f"{self._split}: {video.id} cannot be used and is replaced: {reason}", stacklevel=2)
            if self._file is not None and not self._listed(video.key):
                line = (
                    json.dumps({"split": str(self._split), "key": video.key, "id": video.id, "reason": str(reason)})
                    + "\n"
                )
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                end = os.fstat(descriptor).st_size
                if end and os.pread(descriptor, 1, end - 1) != b"\n":  # a kill tore the last line
                    line = "\n" + line
                os.write(descriptor, line.encode())  # one write: ranks share the file
                os.close(descriptor)
        bad = sum(self._bad.values())
        if bad > self._limit * max(self.read, 1000):
            raise ShardError(
                f"{bad} of {self.read} samples read from {self._split} are bad, more than "
                f"data.max_bad_fraction={self._limit} allows. Last: {video.id}: {reason}. Run: python -m c4c.shard verify "
                f"{self._split}"
            )

    def _listed(self, key: str) -> bool:
        """Whether another rank, or this run before it was resumed, has listed the video."""
        if not self._file.exists():
            return False
        for line in self._file.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["key"] == key and entry["split"] == str(self._split):
                    return True
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue
        return False

"""What a batch cost: counts and seconds, for the metrics and `python -m pipelines.bench`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pipelines.frame_sampling import distinct
from pipelines.stages.fetch import Source


@dataclass
class Stats:
    """Counts and seconds of one rank's batch, or of several added up.

    The seconds add up to what the thread that makes batches needs for one. While its workers read and decode, only the
    time that it waits for them counts. Part of the work that is measured during one batch is for the next. A stage near 0
    costs nothing; the largest is the one to speed up.
    """

    clips: int = 0
    bytes_read: int = 0  # of the shards
    frames_used: int = 0  # a frame that a clip shows twice counts once
    frames_decoded: int = 0
    frames_cached: int = 0  # used frames that came out of the cache
    bad: int = 0  # samples replaced
    queued: int = 0  # batches that stood ready when the step asked; 0: the loader is behind, data.prefetch: it is ahead
    order_s: float = 0.0  # which pairs and which frames, captions to tokens
    read_s: float = 0.0
    decode_s: float = 0.0  # with the fused crop, and the resize where one graph does both
    resize_s: float = 0.0  # and augmentation, where a graph does nothing else
    normalise_s: float = 0.0
    copy_s: float = 0.0  # into the cache, and to the device

    def add(self, other: "Stats") -> None:
        """Add what another batch cost."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def spend(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage, a name in STAGES."""
        setattr(self, stage, getattr(self, stage) + seconds)

    def count(self, sources: Sequence[Source], positions: Sequence[np.ndarray]) -> None:
        """Add what was fetched of clips, and divide the wait for that between reading and decoding as its threads did."""
        used = [len(distinct(wanted)) for wanted in positions]
        self.clips += len(sources)
        self.bytes_read += sum(s.bytes_read for s in sources)
        self.frames_used += sum(used)
        self.frames_decoded += sum(s.decoded for s in sources)
        self.frames_cached += sum(n for n, s in zip(used, sources, strict=True) if s.cached)
        reading, decoding = sum(s.read_s for s in sources), sum(s.decode_s for s in sources)
        decoded = self.read_s * decoding / max(reading + decoding, 1e-9)
        self.read_s, self.decode_s = self.read_s - decoded, self.decode_s + decoded

    def minus(self, before: "Stats") -> "Stats":
        """What was added since `before`, a copy of then."""
        return Stats(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})

    def metrics(self) -> dict[str, float]:
        """Names and values for RUN/metrics.jsonl."""
        used = max(1, self.frames_used)
        out = {
            "data/bytes_read": self.bytes_read,
            "data/frames_used": self.frames_used,
            "data/frames_decoded_per_used": self.frames_decoded / used,
            "data/cached_pct": 100 * self.frames_cached / used,
            "data/bad_samples": self.bad,
            "data/queued_batches": self.queued,
        }
        return out | {f"data/{name}": round(getattr(self, name), 6) for name in STAGES}


STAGES = tuple(f.name for f in fields(Stats) if f.name.endswith("_s"))

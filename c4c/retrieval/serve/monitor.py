"""Counters and histograms of the server in the text format of Prometheus."""

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)

_HELP = {
    "c4c_requests_total": "counter\tAnswered requests by route, method and status.",
    "c4c_request_seconds": "histogram\tSeconds from a request to the start of its answer, by route.",
    "c4c_requests_in_flight": "gauge\tRequests that are being answered.",
    "c4c_text_batch_size": "histogram\tSentences in a pass of the text tower.",
    "c4c_text_cache_total": "counter\tSentences whose features were known already (hit) or not (miss).",
    "c4c_jobs_total": "counter\tDecoding jobs by kind and outcome.",
    "c4c_index_segments": "gauge\tSegments of the index.",
}


class Monitor:
    """What the server counts. Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers: dict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._bounds: dict[str, tuple[float, ...]] = {"c4c_request_seconds": SECONDS, "c4c_text_batch_size": SIZES}

    def add(self, name: str, amount: float = 1, **labels: str | int) -> None:
        """Add to a counter or gauge."""
        with self._lock:
            self._numbers[name, _labels(labels)] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._numbers[name, ""] = value

    def observe(self, name: str, value: float, **labels: str | int) -> None:
        """Add a value to a histogram."""
        bounds, key = self._bounds[name], _labels(labels)
        with self._lock:
            counts = self._buckets.setdefault((name, key), [0] * (len(bounds) + 1))
            counts[bisect_left(bounds, value)] += 1
            self._numbers[f"{name}_sum", key] += value

    @contextmanager
    def in_flight(self) -> Iterator[float]:
        """While a request is answered; gives the moment it began."""
        self.add("c4c_requests_in_flight")
        try:
            yield time.perf_counter()
        finally:
            self.add("c4c_requests_in_flight", -1)

    def text(self) -> str:
        """All of it, in Prometheus' text format 0.0.4."""
        with self._lock:
            numbers = dict(self._numbers)
            buckets = {key: list(counts) for key, counts in self._buckets.items()}
        lines = []
        for name, about in _HELP.items():
            kind, _, words = about.partition("\t")
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            if kind == "histogram":
                for (_, labels), counts in sorted(item for item in buckets.items() if item[0][0] == name):
                    lines += self._histogram(name, labels, counts, numbers[f"{name}_sum", labels])
            else:
                rows = sorted((labels, value) for (of, labels), value in numbers.items() if of == name)
                lines += [
                    f"{name}{{{labels}}} {value:.15g}" if labels else f"{name} {value:.15g}" for labels, value in rows
                ]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, labels: str, counts: list[int], total: float) -> list[str]:
        lines, sum_so_far, comma = [], 0, "," if labels else ""
        for bound, count in zip([*(f"{b:g}" for b in self._bounds[name]), "+Inf"], counts, strict=True):
            sum_so_far += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {sum_so_far}')
        braces = f"{{{labels}}}" if labels else ""
        return [*lines, f"{name}_sum{braces} {total:.15g}", f"{name}_count{braces} {sum_so_far}"]


def _labels(labels: dict[str, str | int]) -> str:
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return ",".join(f'{name}="{str(value).translate(escape)}"' for name, value in sorted(labels.items()))

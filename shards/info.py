"""Numbers about a packed split."""

from collections import Counter
from pathlib import Path

import numpy as np

from shards.dataset import Split


def describe(path: Path) -> dict[str, str]:
    """Counts, durations, sizes, codecs and caption statistics, as rows of text to print."""
    split = Split(path)
    videos = [split.video(i) for i in range(len(split))]
    durations = np.array([v.duration for v in videos])
    sizes = np.array([v.size for v in videos])
    stored = np.array([len(v.frames) for v in videos])
    words = np.array([len(c["text"].split()) for i in range(len(split)) for c in split.captions(i)])
    profile = split.info["profile"]
    shapes = Counter(f"{v.width}x{v.height}" for v in videos)
    rates = Counter(f"{float(v.fps):.4g}" for v in videos)
    return {
        "name": title(split.info["name"], split.info["split"]),
        "profile": ", ".join(f"{k} {v}" if k != "name" else v for k, v in profile.items()),
        "videos": f"{len(videos)} in {len(split.shards)} shards",
        "rejected": rejected(split.info),
        "captions": f"{split.info['captions']} ({_span(split.caption_counts)} a video, {_span(words)} words)",
        "duration": f"{durations.sum() / 3600:.2f} h ({_span(durations)} s a video)",
        "stored frames": f"{stored.sum()} ({_span(stored)} a video)",
        "size": f"{sum(s['bytes'] for s in split.info['shards']) / 1e6:.1f} MB ({_span(sizes / 1e3)} kB a video)",
        "codecs": _most(Counter(v.codec for v in videos)),
        "frame size": _most(shapes),
        "source fps": _most(rates),
        "sliceable": f"{sum(v.frames.sliceable for v in videos)} of {len(videos)}",
        "digest": split.digest,
    }


def title(name: str, split: str) -> str:
    return name if name == split else f"{name} {split}"


def rejected(info: dict) -> str:
    """What `dataset.json` says was not packed, or "nothing"."""
    counts = ((info[f"rejected_{what}s"], what) for what in ("video", "caption"))
    return " and ".join(count(n, what) for n, what in counts if n) or "nothing"


def count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _span(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    return f"{np.min(values):.4g} to {np.max(values):.4g}, median {np.median(values):.4g}"


def _most(counter: Counter, n: int = 5) -> str:
    parts = [f"{name} ({count})" for name, count in counter.most_common(n)]
    return ", ".join(parts + ([f"{len(counter) - n} more"] if len(counter) > n else []))

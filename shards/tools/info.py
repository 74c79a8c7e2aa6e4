"""Numbers about a packed split."""

import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from shards import count
from shards.caption_times import impossible
from shards.split import Split, TarPlace
from shards.tools.hashes import hashes, tables

_SOURCES = 1000  # videos of a split whose JSON is read
_COLUMNS = [
    "offset", "size", "codec", "width", "height", "fps_num", "fps_den", "duration", "captions", "frame_number",
    "frame_offset",
]  # fmt: skip


def describe(path: Path) -> dict[str, str]:
    """Counts, durations, sizes, codecs and caption statistics, as rows of text to print."""
    numbers = measure(path)
    captions, frames, profile = numbers["captions"], numbers["stored_frames"], numbers["profile"]
    return {
        "name": title(numbers["name"], numbers["split"]),
        "profile": ", ".join(f"{k} {v}" if k != "name" else v for k, v in profile.items()),
        "videos": f"{numbers['videos']} in {count(numbers['shards'], 'shard')}",
        "left out": numbers["left_out"],
        "captions": f"{captions['count']} ({_range(captions['per_video'])} a video, {_range(captions['words'])} words)",
        "caption trouble": _trouble(captions),
        "timed captions": f"{captions['timed']} of {captions['count']}",
        "duration": f"{(numbers['duration_s'] or {'sum': 0})['sum'] / 3600:.2f} h ({_range(numbers['duration_s'])} s a video)",
        "stored frames": f"{frames['sum'] if frames else 0:.0f} ({_range(frames)} a video)",
        "size": f"{numbers['bytes'] / 1e6:.1f} MB ({_range(numbers['video_bytes'], 1e3)} kB a video)",
        "stored codec": _most(numbers["codecs"]),
        "source codec": _most(numbers["source_codecs"]) + _of(numbers),
        "frame size": _most(numbers["frame_sizes"]),
        "source fps": _most(numbers["source_fps"]),
        "sliceable": f"{numbers['sliceable']} of {numbers['videos']}",
        "digest": numbers["digest"],
    }


def measure(path: Path) -> dict:
    """The same as numbers. Spans are {"min", "median", "max", "sum"}; a caption is repeated if it differs from another
    only in case and spaces. Tables are read shard by shard; memory is about 40 bytes a video and 16 a caption.

    Raises ShardError if `path` is not a finished split.
    """
    split, values = Split(path), _Values()
    for shard, table in zip(split.shards, tables(split, _COLUMNS), strict=True):
        columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
        values.add(columns, _source_codecs(split, shard, columns))
    return {
        "path": str(path),
        "name": split.info["name"],
        "split": split.info["split"],
        "profile": split.info["profile"],
        "videos": len(split),
        "shards": len(split.shards),
        "rejected_videos": split.info["rejected_videos"],
        "rejected_captions": split.info["rejected_captions"],
        "left_out": left_out(split.info),
        "captions": values.captions(),
        "duration_s": values.span("duration"),
        "stored_frames": values.span("stored"),
        "bytes": sum(s["bytes"] for s in split.info["shards"]),
        "video_bytes": values.span("size"),
        "codecs": dict(values.codecs.most_common()),
        "source_codecs": dict(values.sources.most_common()),
        "frame_sizes": dict(values.shapes.most_common()),
        "source_fps": dict(values.rates.most_common()),
        "sliceable": values.sliceable,
        "digest": split.digest,
    }


class _Values:
    """What `measure` keeps of the rows of all shards."""

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {k: [] for k in ("duration", "size", "stored", "captions", "words")}
        self._texts = [np.zeros(0, np.uint64)]
        self.codecs: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self.rates: Counter[str] = Counter()
        self._empty = self._odd_times = self._timed = self._repeated_inside = self.sliceable = 0

    def add(self, columns: dict[str, list], source_codecs: list[str]) -> None:
        """The rows of a shard, as columns."""
        captions = [c for row in columns["captions"] for c in row]
        texts = [" ".join(c["text"].casefold().split()) for c in captions]
        keys = hashes(texts)
        per_video = np.array([len(row) for row in columns["captions"]], np.int32)
        self._texts.append(keys)
        self._values["words"].append(np.array([len(t.split()) for t in texts], np.int32))
        self._values["captions"].append(per_video)
        self._values["stored"].append(np.array([len(row) for row in columns["frame_number"]], np.int32))
        self._values["duration"].append(np.array(columns["duration"], np.float64))
        self._values["size"].append(np.array(columns["size"], np.int64))
        self._empty += texts.count("")
        self._odd_times += sum(
            impossible(c["start"], c["end"], duration)
            for row, duration in zip(columns["captions"], columns["duration"], strict=True)
            for c in row
        )
        self._timed += sum(c["start"] is not None or c["end"] is not None for c in captions)
        rows = np.split(keys, np.cumsum(per_video)[:-1])
        self._repeated_inside += sum(len(row) - len(np.unique(row)) for row in rows if len(row))
        self.sliceable += sum(bool(row) and row[0] >= 0 for row in columns["frame_offset"])
        self.codecs.update(columns["codec"])
        self.sources.update(source_codecs)
        self.shapes.update(f"{w}x{h}" for w, h in zip(columns["width"], columns["height"], strict=True))
        self.rates.update(f"{n / d:.4g}" for n, d in zip(columns["fps_num"], columns["fps_den"], strict=True))

    def span(self, name: str) -> dict[str, float] | None:
        """Smallest, middle and largest value and the sum; None without values."""
        values = np.concatenate([np.zeros(0), *self._values[name]])
        if not len(values):
            return None
        return {name: float(getattr(np, name)(values)) for name in ("min", "median", "max", "sum")}

    def captions(self) -> dict:
        """Numbers about the captions."""
        texts = np.concatenate(self._texts)
        return {
            "count": len(texts),
            "per_video": self.span("captions"),
            "words": self.span("words"),
            "empty": self._empty,
            "repeated": len(texts) - len(np.unique(texts)),
            "repeated_in_a_video": self._repeated_inside,
            "timed": self._timed,
            "impossible_times": self._odd_times,
        }


def _source_codecs(split: Split, shard: str, columns: dict[str, list]) -> list[str]:
    """Of some of the shard's videos: only their JSON in the tar tells, unless the stored bytes are the source's."""
    if split.info["profile"]["name"] == "copy":
        return columns["codec"]
    most, codecs = max(1, _SOURCES // len(split.shards)), []
    rows = len(columns["size"])
    for row in range(0, rows, max(1, -(-rows // most))):
        where = TarPlace(shard, columns["offset"][row], columns["size"][row])
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, tarfile.TarError):  # `verify` names it
            codecs.append(str(split.json(where)["source"]["codec"]))
    return codecs


def _of(numbers: dict) -> str:
    looked = sum(numbers["source_codecs"].values())
    return "" if looked == numbers["videos"] else f", of {count(looked, 'video')} looked at"


def title(name: str, split: str) -> str:
    """How a split is called on the screen: `msrvtt train`, or `mine` where both names are the same."""
    return name if name == split else f"{name} {split}"


def left_out(info: dict) -> str:
    """What `dataset.json` says was not packed, counted as the table at the end of packing does, or "nothing"."""
    counts = info.get("reconciliation") or {}
    if (counts.get("rejected") or {}).get("videos") is None:  # not packed from annotations, or repaired with losses
        counts = {"rejected": {what: info[f"rejected_{what}"] for what in ("videos", "captions")}}
    parts = []
    for why in ("missing", "rejected"):
        numbers = [count(n, what.removesuffix("s")) for what, n in counts.get(why, {}).items() if n]
        parts += [f"{' and '.join(numbers)} {why}"] * bool(numbers)
    return "; ".join(parts) or "nothing"


def _trouble(captions: dict) -> str:
    inside = f" ({captions['repeated_in_a_video']} within one video)" if captions["repeated_in_a_video"] else ""
    parts = [f"{captions['empty']} empty"] * bool(captions["empty"])
    parts += [f"{captions['repeated']} repeat another{inside}"] * bool(captions["repeated"])
    if odd := captions["impossible_times"]:
        parts.append(f"{odd} with times outside their video, or an end before the start")
    return ", ".join(parts) or "none"


def _range(span: dict[str, float] | None, unit: float = 1) -> str:
    if span is None:
        return "none"
    return f"{span['min'] / unit:.4g} to {span['max'] / unit:.4g}, median {span['median'] / unit:.4g}"


def _most(counts: dict[str, int], n: int = 5) -> str:
    parts = [f"{name} ({number})" for name, number in list(counts.items())[:n]]
    return ", ".join(parts + ([f"{len(counts) - n} more"] if len(counts) > n else []))

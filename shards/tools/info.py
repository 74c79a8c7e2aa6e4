"""Numbers about a packed split."""

import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from shards import count
from shards.split import Split, Stored
from shards.tools.hashes import hashes, tables

_SOURCES = 1000  # videos of a split whose JSON is read
_COLUMNS = [
    "offset", "size", "codec", "width", "height", "fps_num", "fps_den", "duration", "captions", "frame_number",
    "frame_offset",
]  # fmt: skip


def describe(path: Path) -> dict[str, str]:
    """Counts, durations, sizes, codecs and caption statistics, as rows of text to print."""
    told = measure(path)
    captions, frames, profile = told["captions"], told["stored_frames"], told["profile"]
    return {
        "name": title(told["name"], told["split"]),
        "profile": ", ".join(f"{k} {v}" if k != "name" else v for k, v in profile.items()),
        "videos": f"{told['videos']} in {count(told['shards'], 'shard')}",
        "left out": told["left_out"],
        "captions": f"{captions['count']} ({_said(captions['per_video'])} a video, {_said(captions['words'])} words)",
        "caption trouble": _trouble(captions),
        "timed captions": f"{captions['timed']} of {captions['count']}",
        "duration": f"{(told['duration_s'] or {'sum': 0})['sum'] / 3600:.2f} h ({_said(told['duration_s'])} s a video)",
        "stored frames": f"{frames['sum'] if frames else 0:.0f} ({_said(frames)} a video)",
        "size": f"{told['bytes'] / 1e6:.1f} MB ({_said(told['video_bytes'], 1e3)} kB a video)",
        "stored codec": _most(told["codecs"]),
        "source codec": _most(told["source_codecs"]) + _of(told),
        "frame size": _most(told["frame_sizes"]),
        "source fps": _most(told["source_fps"]),
        "sliceable": f"{told['sliceable']} of {told['videos']}",
        "digest": told["digest"],
    }


def measure(path: Path) -> dict:
    """The same as numbers. Spans are {"min", "median", "max", "sum"}; a caption is repeated if it differs from another
    only in case and spaces. Tables are read shard by shard; memory is about 40 bytes a video and 16 a caption.

    Raises ShardError if `path` is not a finished split.
    """
    split = Split(path)
    values: dict[str, list[np.ndarray]] = {k: [] for k in ("duration", "size", "stored", "captions", "words", "text")}
    codecs, shapes, rates, sources = Counter(), Counter(), Counter(), Counter()
    empty = timed = repeated_inside = sliceable = 0
    for shard, table in zip(split.shards, tables(split, _COLUMNS), strict=True):
        columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
        captions = [c for row in columns["captions"] for c in row]
        texts = [" ".join(c["text"].casefold().split()) for c in captions]
        keys = hashes(texts)
        values["text"].append(keys)
        values["words"].append(np.array([len(t.split()) for t in texts], np.int32))
        values["captions"].append(np.array([len(row) for row in columns["captions"]], np.int32))
        values["stored"].append(np.array([len(row) for row in columns["frame_number"]], np.int32))
        values["duration"].append(np.array(columns["duration"], np.float64))
        values["size"].append(np.array(columns["size"], np.int64))
        empty += texts.count("")
        timed += sum(c["start"] is not None or c["end"] is not None for c in captions)
        bounds = np.cumsum(values["captions"][-1])[:-1]
        repeated_inside += sum(len(row) - len(np.unique(row)) for row in np.split(keys, bounds) if len(row))
        sliceable += sum(bool(row) and row[0] >= 0 for row in columns["frame_offset"])
        codecs.update(columns["codec"])
        sources.update(_source_codecs(split, shard, columns))
        shapes.update(f"{w}x{h}" for w, h in zip(columns["width"], columns["height"], strict=True))
        rates.update(f"{n / d:.4g}" for n, d in zip(columns["fps_num"], columns["fps_den"], strict=True))
    joined = {name: np.concatenate([np.zeros(0), *parts]) for name, parts in values.items() if name != "text"}
    text = np.concatenate([np.zeros(0, np.uint64), *values["text"]])
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
        "captions": {
            "count": len(text),
            "per_video": _span(joined["captions"]),
            "words": _span(joined["words"]),
            "empty": empty,
            "repeated": len(text) - len(np.unique(text)),
            "repeated_in_a_video": repeated_inside,
            "timed": timed,
        },
        "duration_s": _span(joined["duration"]),
        "stored_frames": _span(joined["stored"]),
        "bytes": sum(s["bytes"] for s in split.info["shards"]),
        "video_bytes": _span(joined["size"]),
        "codecs": dict(codecs.most_common()),
        "source_codecs": dict(sources.most_common()),
        "frame_sizes": dict(shapes.most_common()),
        "source_fps": dict(rates.most_common()),
        "sliceable": sliceable,
        "digest": split.digest,
    }


def _source_codecs(split: Split, shard: str, columns: dict[str, list]) -> list[str]:
    """Of some of the shard's videos: only their JSON in the tar tells, unless the stored bytes are the source's."""
    if split.info["profile"]["name"] == "copy":
        return columns["codec"]
    most, found = max(1, _SOURCES // len(split.shards)), []
    rows = len(columns["size"])
    for row in range(0, rows, -(-rows // most)):
        where = Stored(shard, columns["offset"][row], columns["size"][row])
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, tarfile.TarError):  # `verify` names it
            found.append(str(split.json(where)["source"]["codec"]))
    return found


def _of(told: dict) -> str:
    looked = sum(told["source_codecs"].values())
    return "" if looked == told["videos"] else f", of {count(looked, 'video')} looked at"


def title(name: str, split: str) -> str:
    return name if name == split else f"{name} {split}"


def left_out(info: dict) -> str:
    """What `dataset.json` says was not packed, counted as the table at the end of packing does, or "nothing"."""
    counts = info.get("reconciliation") or {}
    if (counts.get("rejected") or {}).get("videos") is None:  # not packed from annotations, or repaired with losses
        counts = {"rejected": {what: info[f"rejected_{what}"] for what in ("videos", "captions")}}
    told = []
    for why in ("missing", "rejected"):
        numbers = [count(n, what.removesuffix("s")) for what, n in counts.get(why, {}).items() if n]
        told += [f"{' and '.join(numbers)} {why}"] * bool(numbers)
    return "; ".join(told) or "nothing"


def _trouble(captions: dict) -> str:
    inside = f" ({captions['repeated_in_a_video']} within one video)" if captions["repeated_in_a_video"] else ""
    parts = [f"{captions['empty']} empty"] * bool(captions["empty"])
    parts += [f"{captions['repeated']} repeat another{inside}"] * bool(captions["repeated"])
    return ", ".join(parts) or "none"


def _span(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {name: float(getattr(np, name)(values)) for name in ("min", "median", "max", "sum")}


def _said(span: dict[str, float] | None, unit: float = 1) -> str:
    if span is None:
        return "none"
    return f"{span['min'] / unit:.4g} to {span['max'] / unit:.4g}, median {span['median'] / unit:.4g}"


def _most(counts: dict[str, int], n: int = 5) -> str:
    parts = [f"{name} ({number})" for name, number in list(counts.items())[:n]]
    return ", ".join(parts + ([f"{len(counts) - n} more"] if len(counts) > n else []))

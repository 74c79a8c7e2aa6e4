"""Features of videos and their captions in a file, which `train.teacher` learns from: a safetensors file whose arrays are

ids             uint8 [bytes]: the videos' ids, a list in JSON
caption_counts  integers [V]: captions of each video
videos, texts   float16 or float32 [V, ...] and [C, ...]: what stands for each video, and for each caption, those of a video one after another in
                the order of the split; unit vectors [D], or what a head that compares frames one by one takes
caption_crc32   uint32 [C], may be missing: zlib.crc32 of each caption's UTF-8, by which another caption is noticed
head.*          float32, of a head that compares frames one by one: its weights

Its metadata are `format` (FORMAT) and `scale`, the inverse temperature; what c4c writes has `head`, `sizes`, `splits`, `data`, `checkpoint`,
`versions` and `crc32c` beside them, and `unreadable` if rows of `videos` mean nothing: a list of them in JSON. Arrays are mapped, not read, so
that ranks share the memory that a file takes.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor

from c4c.files import replacing
from c4c.models.heads import HEADS, Head
from c4c.models.heads.mean import MeanPooling
from shards import count, first_line

FORMAT = "c4c.features.1"
_NEEDED = ("ids", "caption_counts", "videos", "texts")
_DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
           "I64": "<i8"}  # fmt: skip
_METADATA = "metadata"  # among the checksums of arrays, that of the metadata themselves
_HEADER = 100 << 20  # bytes at most, as in safetensors' own reader
_CHUNK = 64 << 20  # bytes that are looked at at once
_UNIT = 0.01  # by which the length of a unit vector may be another; float16 rounds by a tenth of that
_HOW = "docs/teachers.md says what it holds"


def is_feature_file(name: str) -> bool:
    """Whether this is a file of features, whole or not, rather than weights."""
    try:
        with open(name, "rb") as file:
            header, _ = _read_header(file)
    except (OSError, ValueError):
        return False
    about = header.get("__metadata__")
    ours = isinstance(about, dict) and str(about.get("format")).startswith(FORMAT.rpartition(".")[0])
    return ours or {"videos", "texts"} <= header.keys()


def _read_header(file: BinaryIO) -> tuple[dict, int]:
    """The header, and where the arrays begin. Raises ValueError."""
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= _HEADER:
        raise ValueError("it does not begin as a safetensors file")
    text = file.read(size)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if len(text) < size or not isinstance(header, dict):
        raise ValueError("its header is damaged")
    return header, 8 + size


@dataclass(frozen=True)
class SplitFeatures:
    """One of the splits that a file was written from: its digest, how many videos it has, and whether data.paragraph joined captions."""

    digest: str
    videos: int
    paragraph: bool


class FeatureFile:
    """What such a file holds. Reads all of it once: raises ValueError, naming it, for what is damaged or cannot be a teacher's.

    videos, texts: mapped arrays, see above. ids [V]; counts, starts int64 [V]: captions of a video, and where they begin in `texts`;
    captions: uint32 [C] or None. unreadable: bool [V], which rows of videos mean nothing. splits: none for a file of other programs.
    head: what scores. digest: of all that scores depend on.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            with open(path, "rb") as file:
                header, start = _read_header(file)
            self._arrays = _mapped(path, header, start)
            self._about = _metadata(header)
            self._read()
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error

    def _read(self) -> None:
        arrays, about = self._arrays, self._about
        self.videos, self.texts = arrays["videos"], arrays["texts"]
        self.ids = _ids(arrays["ids"])
        if (counts := arrays["caption_counts"]).dtype.kind not in "iu":
            raise ValueError(f"caption_counts must be integers; it is {counts.dtype}")
        self.counts = counts.astype(np.int64)
        self.captions = arrays.get("caption_crc32")
        self._check_shapes()
        self.starts = np.cumsum(self.counts) - self.counts
        self.scale = _number(about.get("scale"))
        self.head_name = about.get("head", MeanPooling.name)
        self.head = self._head()
        self.splits = self._splits()
        self.unreadable = self._unreadable()
        self.data: dict = _plain(about, "data", {})
        self.checkpoint = about.get("checkpoint", "another program")
        self.digest = self._checked_digest(_plain(about, "crc32c", {}))

    def _check_shapes(self) -> None:
        videos, texts, counts = self.videos, self.texts, self.counts
        for name in ("videos", "texts"):
            array = self._arrays[name]
            if array.dtype.kind != "f" or array.ndim < 2 or not array.size:
                raise ValueError(
                    f"{name} must be float16 or float32 with a row each, [n, ...]; it is {array.dtype} {list(array.shape)}"
                )
        if not len(self.ids) == len(videos) == len(counts):
            raise ValueError(
                f"ids names {count(len(self.ids), 'video')}, videos has {len(videos)} rows, and caption_counts {len(counts)}"
            )
        if counts.ndim != 1:
            raise ValueError(
                f"caption_counts must be [{len(videos)}], a number for each video; it is {list(counts.shape)}"
            )
        if counts.min() < 1 or counts.sum() != len(texts):
            raise ValueError(
                f"caption_counts must be 1 or more for each video and sum to the {len(texts)} rows of texts; it sums to {counts.sum()}"
            )
        if self.captions is not None and (self.captions.dtype != np.uint32 or self.captions.shape != (len(texts),)):
            raise ValueError(f"caption_crc32 must be uint32 [{len(texts)}], a number for each row of texts")

    def _splits(self) -> list[SplitFeatures]:
        try:
            splits = [SplitFeatures(**row) for row in _plain(self._about, "splits", [])]
            right = all(
                type(one.digest) is str and type(one.videos) is int and one.videos > 0 and type(one.paragraph) is bool
                for one in splits
            )
            if splits and not (right and sum(split.videos for split in splits) == len(self.ids)):
                raise TypeError
        except TypeError:
            raise ValueError("its metadata is damaged at splits") from None
        return splits

    def _unreadable(self) -> np.ndarray:
        marked, rows = np.zeros(len(self.ids), bool), _plain(self._about, "unreadable", [])
        if not all(type(row) is int and 0 <= row < len(marked) for row in rows):
            raise ValueError("its metadata is damaged at unreadable: it must be a list of rows of videos in JSON")
        marked[rows] = True
        return marked

    def _head(self) -> Head:
        """What scores features: of a head that compares two vectors, whichever it is, their product."""
        if self.head_name not in HEADS:
            raise ValueError(f"its metadata has head={self.head_name}; it must be one of {', '.join(HEADS)}")
        if not HEADS[self.head_name].late:
            if not (self.videos.ndim == self.texts.ndim == 2 and self.videos.shape[1] == self.texts.shape[1]):
                raise ValueError(
                    f"videos {list(self.videos.shape)} and texts {list(self.texts.shape)} must be vectors [n, D] of one width D"
                )
            return MeanPooling(self.videos.shape[1])
        state = {
            name[5:]: torch.from_numpy(value.copy()) for name, value in self._arrays.items() if name.startswith("head.")
        }
        try:
            with torch.random.fork_rng(devices=[]):  # the run draws what it would without
                head = HEADS[self.head_name](**_plain(self._about, "sizes", {}))
            head.load_state_dict(state)
            head.eval().requires_grad_(False)
            with torch.no_grad():
                head.score(*(torch.from_numpy(array[:1].astype(np.float32)) for array in (self.texts, self.videos)))
        except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"its weights or features do not fit the head {self.head_name} ({first_line(error)})"
            ) from error
        return head

    def _checked_digest(self, before: Mapping[str, str]) -> str:
        """Of names, shapes, types and values, the head and the scale. Raises ValueError for values that cannot be."""
        lines = [FORMAT, self.head_name, repr(self.scale)]
        lines += [f"{name} {self._about[name]}" for name in ("sizes", "splits", "unreadable") if name in self._about]
        if before.get(_METADATA) not in (None, _crc_of(self._about)):
            raise ValueError("it is damaged: its metadata do not match their checksum. Copy or write it again")
        for name in sorted(self._arrays):
            array, crc = np.atleast_1d(self._arrays[name]), 0
            rows = max(1, _CHUNK * len(array) // max(1, array.nbytes))
            for first in range(0, len(array), rows):
                part = np.ascontiguousarray(array[first : first + rows])
                crc = crc32c(part.tobytes(), crc)
                if name == "videos":
                    _check_rows(name, first, part, not self.head.late, ~self.unreadable[first : first + len(part)])
                elif name == "texts":
                    _check_rows(name, first, part, unit=not self.head.late)
            lines.append(f"{name} {array.dtype.str} {list(array.shape)} {crc:08x}")
            if name in before and before[name] != f"{crc:08x}":
                raise ValueError(f"it is damaged: {name} does not match its checksum. Copy or write it again")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _mapped(path: str, header: dict, start: int) -> dict[str, np.ndarray]:
    """Its arrays. Raises ValueError if the header says what cannot be."""
    size, arrays = Path(path).stat().st_size - start, {}
    for name, row in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = str(row["dtype"]), tuple(row["shape"]), row["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"its header is damaged at {name}") from error
        if not all(type(number) is int for number in (*shape, begin, end)):
            raise ValueError(f"its header is damaged at {name}")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is {dtype}; write float16 or float32, and integers for counts")
        known = np.dtype(_DTYPES[dtype])
        if name in _NEEDED and not shape:
            raise ValueError(f"{name} is a single number: {_HOW}")
        if min(shape, default=0) < 0 or not 0 <= begin <= end or end - begin != known.itemsize * math.prod(shape):
            raise ValueError(f"its header is damaged at {name}")
        if end > size:
            raise ValueError("it is cut short. Copy or write it again")
        arrays[name] = np.memmap(path, known, "r", start + begin, shape) if end > begin else np.empty(shape, known)
    if missing := [name for name in _NEEDED if name not in arrays]:
        raise ValueError(f"it has no {' and no '.join(missing)}: {_HOW}")
    return arrays


def _metadata(header: dict) -> dict[str, str]:
    about = header.get("__metadata__")
    found = about.get("format") if isinstance(about, dict) else None
    if not isinstance(about, dict) or found != FORMAT:
        raise ValueError(f"the format in its metadata must be {FORMAT}, and is {found}: {_HOW}")
    if wrong := [key for key, value in about.items() if not isinstance(value, str)]:
        raise ValueError(f"its metadata is damaged at {wrong[0]}: it must be text, as safetensors writes it")
    return about


def _crc_of(about: Mapping[str, str]) -> str:
    """Of all metadata but the checksums."""
    return f"{crc32c(json.dumps({key: about[key] for key in sorted(about) if key != 'crc32c'}).encode()):08x}"


def _plain(about: Mapping[str, str], key: str, default):
    """JSON in the metadata. Raises ValueError if it is of another kind than `default`."""
    try:
        value = json.loads(about[key]) if key in about else default
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, type(default)):
        raise ValueError(f"its metadata is damaged at {key}")
    return value


def _ids(array: np.ndarray) -> list[str]:
    try:
        ids = json.loads(array.tobytes())
    except (ValueError, RecursionError):
        ids = None
    if not (isinstance(ids, list) and all(isinstance(one, str) for one in ids)):
        raise ValueError(f"ids must be the bytes of a list of strings in JSON: {_HOW}")
    return ids


def _number(text: str | None) -> float:
    """The scale. Raises ValueError."""
    try:
        scale = float(text or "")
    except ValueError:
        scale = math.nan
    if not np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max:
        raise ValueError(
            f"the scale in its metadata must be a number above 0 that float32 holds, such as 100; it is {text}"
        )
    return scale


def _check_rows(name: str, first: int, rows: np.ndarray, unit: bool, counted: np.ndarray | bool = True) -> None:
    """Raise ValueError if a row is not of numbers or, where rows are to be unit vectors, not of length 1. counted: bool [n], which
    rows are looked at."""
    values = rows.astype(np.float32)
    numbers = np.isfinite(values.reshape(len(rows), -1)).all(axis=1) | ~np.asarray(counted)
    if not numbers.all():
        row = int(np.flatnonzero(~numbers)[0])
        raise ValueError(f"row {first + row} of {name} holds NaN, or numbers too large for {rows.dtype}")
    if unit:
        lengths = np.linalg.norm(values, axis=1)
        if len(wrong := np.flatnonzero((abs(lengths - 1) > _UNIT) & counted)):
            row = int(wrong[0])
            raise ValueError(
                f"row {first + row} of {name} has length {lengths[row]:.4g}: rows must be unit vectors; divide each by its "
                "length, and write arrays that are contiguous (np.ascontiguousarray)"
            )


@dataclass(frozen=True)
class FeatureHeader:
    """What a file is written with beside features. ids, counts, captions: as `FeatureFile` has them, counts and captions as lists.
    about: further metadata, as JSON. head: with its weights if it compares frames one by one; sizes: how it is made."""

    ids: list[str]
    counts: list[int]
    captions: list[int]
    scale: float
    head: Head
    sizes: dict
    about: dict


def write_features(
    path: Path, header: FeatureHeader, videos: Tensor, texts: Iterator[Tensor], dtype: np.dtype | type = np.float32
) -> None:
    """Write a file. texts: in parts, [n, ...] each, so that they need not fit in memory together. Raises OSError that names the file, and
    ValueError for features that are no numbers; both leave an earlier file as it was."""
    first = next(texts)
    ids = np.frombuffer(json.dumps(header.ids).encode(), np.uint8)
    arrays: dict[str, np.ndarray] = {  # wide numbers first, so that all are aligned
        "caption_counts": np.array(header.counts, np.int64),
        "caption_crc32": np.array(header.captions, np.uint32),
    }
    if header.head.late:
        arrays |= {
            f"head.{name}": value.detach().float().cpu().numpy() for name, value in header.head.state_dict().items()
        }
    arrays["videos"] = videos.cpu().numpy()
    half_or_full = np.dtype(dtype).str
    written = {name: array.dtype.str for name, array in arrays.items()}
    written |= {"videos": half_or_full, "texts": half_or_full, "ids": ids.dtype.str}
    shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}
    shapes |= {"texts": (len(header.captions), *first.shape[1:]), "ids": ids.shape}
    crcs = dict.fromkeys(shapes, 0)
    with replacing(path) as file:
        file.write(_header(header, shapes, written, crcs))
        for name, array in arrays.items():
            values = _checked_bytes(path, name, 0, array, written[name])
            crcs[name] = crc32c(values)
            file.write(values)
        row = 0
        for part in chain([first], texts):
            values, row = _checked_bytes(path, "texts", row, part.cpu().numpy(), half_or_full), row + len(part)
            crcs["texts"] = crc32c(values, crcs["texts"])
            file.write(values)
        crcs["ids"] = crc32c(ids.tobytes())
        file.write(ids.tobytes())
        file.seek(0)
        file.write(_header(header, shapes, written, crcs))  # as long as before: checksums have 8 digits


def _checked_bytes(path: Path, name: str, first: int, rows: np.ndarray, dtype: str) -> bytes:
    with np.errstate(over="ignore"):  # said below
        values = np.ascontiguousarray(rows, dtype)
    if name in ("videos", "texts"):
        try:
            _check_rows(name, first, values, unit=False)
        except ValueError as error:
            raise ValueError(f"{path} is not written: {error}") from error
    return values.tobytes()


def _header(
    header: FeatureHeader, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], crcs: dict[str, int]
) -> bytes:
    codes = {np.dtype(code).str: name for name, code in _DTYPES.items()}
    about = {"format": FORMAT, "scale": repr(header.scale), "head": header.head.name}
    more = header.about | {"sizes": header.sizes}
    about |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in more.items()}
    about["crc32c"] = json.dumps({name: f"{crc:08x}" for name, crc in crcs.items()} | {_METADATA: _crc_of(about)})
    rows: dict[str, dict] = {"__metadata__": about}
    begin = 0
    for name, shape in shapes.items():
        end = begin + np.dtype(dtypes[name]).itemsize * math.prod(shape)
        rows[name] = {"dtype": codes[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

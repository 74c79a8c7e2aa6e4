"""Report duplicates within and across splits: stored bytes, source files, names and captions."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shards.split import Split
from shards.tools.hashes import hashes, key_hashes, repeated, tables

_CHUNK = 1 << 22  # bytes read at a time
_EXAMPLES = 20  # repeated captions that the report spells out

# of a sample's JSON: what it is called, what is said of it, and how it is stored
_NOT_THE_SOURCE = {
    "id", "captions", "meta", "profile", "codec", "width", "height", "frame_number", "frame_time", "rotation", "mirrored",
}  # fmt: skip


@dataclass(frozen=True)
class DuplicateGroup:
    """Videos that share something, as (split, id)."""

    members: tuple[tuple[str, str], ...]

    @property
    def leak(self) -> bool:
        """Whether they are in more than one split."""
        return len({split for split, _ in self.members}) > 1


@dataclass(frozen=True)
class RepeatedCaption:
    """A caption text, how many videos have it, and the splits that these are in."""

    text: str
    videos: int
    splits: tuple[str, ...]


@dataclass(frozen=True)
class DuplicateReport:
    """`content`: the stored files are equal, byte for byte. `source`: not so, but they were made from files of the same
    name, codec, picture size, frames and length, cut alike. `names`: the same id in several splits.

    `captions` (how many texts stand with more than one video), `caption_leaks` (those of them in more than one split)
    and `caption_examples` compare without regard to case and spaces.
    """

    videos: int
    content: list[DuplicateGroup]
    source: list[DuplicateGroup]
    names: list[DuplicateGroup]
    captions: int
    caption_leaks: int
    caption_examples: list[RepeatedCaption]

    @property
    def clean(self) -> bool:
        """No video is there twice, as far as its bytes, source and name tell. Captions may repeat."""
        return not (self.content or self.source or self.names)

    def to_json(self) -> dict:
        """The report as JSON, with every group."""
        groups = {
            k: [{"leak": g.leak, "videos": [{"split": s, "id": i} for s, i in g.members]} for g in getattr(self, k)]
            for k in ("content", "source", "names")
        }
        return asdict(self) | groups | {"clean": self.clean}


def dedup(
    paths: Sequence[Path],
    *,
    sources: bool = True,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DuplicateReport:
    """Compare all videos and captions of the splits `paths` with each other.

    Files are read only where size and crc32c agree, and JSON members (not at all without `sources`) only where frames,
    rate and length agree. Memory: about 50 bytes a video and 12 a caption.
    """
    every = _Every([Split(p) for p in paths])
    content = every.groups(_content_hashes(every), lambda i: _sha256(every, i), "bytes", on_step)
    alike = {member: number for number, group in enumerate(content) for member in group.members}
    source = every.groups(_length_hashes(every), lambda i: _source(every, i), "sources", on_step) if sources else []
    names = every.groups(np.concatenate([key_hashes(s) for s in every.splits]), every.id, "names", on_step)
    captions, leaks, examples = _captions(every)
    return DuplicateReport(
        len(every),
        content,
        [g for g in source if len({alike.get(m, m) for m in g.members}) > 1],
        names,
        captions,
        leaks,
        examples,
    )


class _Every:
    """All videos of several splits under one running number."""

    def __init__(self, splits: list[Split]):
        self.splits = splits
        self._starts = np.cumsum([0] + [len(s) for s in splits])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, index: int) -> tuple[Split, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.splits[which], int(index - self._starts[which])

    def id(self, index: int) -> str:
        split, row = self.find(index)
        return split.video(row).id

    def groups(
        self, suspects: np.ndarray, proof: Callable[[int], object], what: str, on_step: Callable
    ) -> list[DuplicateGroup]:
        """Groups of videos of equal `suspects` [videos] for which `proof` gives equal values, None aside."""
        candidates = repeated(suspects)
        done, total = 0, sum(map(len, candidates))
        on_step(what, 0, total)
        out = []
        for candidate in candidates:
            same: dict[object, list[int]] = {}
            for index in candidate.tolist():
                same.setdefault(proof(index), []).append(index)
                done += 1
                on_step(what, done, total)
            out += [self._group(members) for value, members in same.items() if len(members) > 1 and value is not None]
        return out

    def _group(self, members: list[int]) -> DuplicateGroup:
        return DuplicateGroup(tuple((str(self.find(i)[0].path), self.id(i)) for i in members))


def _content_hashes(every: _Every) -> np.ndarray:
    parts = [np.zeros(0, np.uint64)]
    for split in every.splits:
        for table in tables(split, ["size", "crc32c"]):
            size, crc = (table.column(c).to_numpy().astype(np.uint64) for c in ("size", "crc32c"))
            parts.append(size << np.uint64(32) | crc)  # a size of 4 GiB and more wraps; sha256 decides
    return np.concatenate(parts)


def _length_hashes(every: _Every) -> np.ndarray:
    columns = ["source_frames", "fps_num", "fps_den", "duration"]
    parts = [
        hashes(map(repr, zip(*(table.column(c).to_pylist() for c in columns), strict=True)))
        for split in every.splits
        for table in tables(split, columns)
    ]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _sha256(every: _Every, index: int) -> bytes:
    split, row = every.find(index)
    video, digest = split.video(row), hashlib.sha256()
    for start in range(0, video.size, _CHUNK):
        digest.update(split.read(video, start, min(_CHUNK, video.size - start)))
    return digest.digest()


def _source(every: _Every, index: int) -> str | None:
    split, row = every.find(index)
    described = split.json(split.video(row))
    described["source"].pop("bytes")  # a file that was downloaded again may have another size
    return json.dumps({k: v for k, v in described.items() if k not in _NOT_THE_SOURCE}, sort_keys=True)


def _captions(every: _Every) -> tuple[int, int, list[RepeatedCaption]]:
    """Texts that stand with several videos: how many, how many of these in several splits, and the commonest."""
    texts, owners, first = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for split in every.splits:
        for table in tables(split, ["captions"]):
            rows = [sorted({_normal(c["text"]) for c in row}) for row in table.column("captions").to_pylist()]
            texts.append(hashes(text for row in rows for text in row))
            owners.append(np.repeat(np.arange(first, first + len(rows)), [len(row) for row in rows]))
            first += len(rows)
    owner, text = np.concatenate(owners), np.concatenate(texts)
    alike = repeated(text)
    groups = [owner[g] for g in alike]
    where = [np.unique(np.searchsorted(every._starts, g, side="right") - 1) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (-len(where[i]), -len(groups[i])))[:_EXAMPLES]
    examples = [_example(every, text[alike[i][0]], groups[i], where[i]) for i in order]
    return len(groups), sum(len(w) > 1 for w in where), examples


def _example(every: _Every, wanted: np.uint64, owners: np.ndarray, where: np.ndarray) -> RepeatedCaption:
    """Spells out the caption with the hash `wanted`, as its first owner has it."""
    split, row = every.find(owners[0])
    text = next(c["text"] for c in split.captions(row) if hashes([_normal(c["text"])])[0] == wanted)
    return RepeatedCaption(text, len(owners), tuple(str(every.splits[w].path) for w in where))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())

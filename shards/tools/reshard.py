"""Several splits into one, and one into several, without copying video bytes where a whole shard goes one way."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards import ShardError, count, first_few
from shards.split import Split
from shards.tar import safe_key
from shards.tools.hashes import hashes, key_hashes, repeated, tables
from shards.tools.regroup import Made, Piece, SourceSplit, new_folder, write_split


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    name: str | None = None,
    split: str | None = None,
    prefix: bool = False,
    copy: bool = False,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """All videos of the splits `paths`, in that order, as one split at `out`; its tars share their bytes with the sources'
    unless `copy`.

    A video whose name an earlier split has too is an error, or with `prefix` becomes FOLDER/NAME after its split's
    folder. Raises ShardError if the splits differ in their profile.
    """
    if len({p.resolve() for p in paths}) != len(paths) or len(paths) < 2:
        raise ShardError("merge takes at least two different splits")
    splits = [Split(p) for p in paths]
    _refuse_other_profile(splits)
    sources = _named_apart(splits, prefix)
    pieces = [[Piece(s, i)] for s, one in enumerate(splits) for i in range(len(one.shards))]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_shard(done, len(pieces))

    on_shard(0, len(pieces))
    merged = [{"name": s.info["name"], "split": s.info["split"], "digest": s.digest} for s in splits]
    with new_folder(out) as folder:
        made = write_split(
            folder, sources, pieces, name=name or splits[0].info["name"], split=split or out.resolve().name,
            origin={"merged": merged}, copy=copy, on_shard=step,
        )  # fmt: skip
    return Made(out, made.info, made.how)


def _refuse_other_profile(splits: list[Split]) -> None:
    first = splits[0].info["profile"]
    for other in splits[1:]:
        second = other.info["profile"]
        if differing := sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k)):
            details = "; ".join(f"{k}: {first.get(k)} and {second.get(k)}" for k in differing)
            raise ShardError(
                f"{splits[0].path} and {other.path} differ in their profile ({details}), and a split has one profile. "
                "Pack one of them again with the other's settings."
            )


def _named_apart(splits: list[Split], prefix: bool) -> list[SourceSplit]:
    """The sources with new names for the videos whose name an earlier split has. Raises ShardError unless `prefix`."""
    clashes = _clashes(splits)
    if not any(clashes):
        return [SourceSplit(s) for s in splits]
    if not prefix:
        which = next(i for i, c in enumerate(clashes) if c)
        raise ShardError(
            f"{count(sum(map(len, clashes)), 'name')} in more than one of the splits (in {splits[which].path}: {first_few(map(repr, clashes[which].values()))}). If they "
            "are the same videos, see `python -m c4c.shard dedup`; if not, --prefix renames the later ones FOLDER/NAME."
        )
    labels = _labels([s.path for s in splits])
    renamed = [{key: f"{label}/{id}" for key, id in c.items()} for label, c in zip(labels, clashes, strict=True)]
    taken = np.concatenate([key_hashes(s) for s in splits])
    new = [name for names in renamed for name in names.values()]
    try:
        keys = [safe_key(name) for name in new]
    except ValueError as error:
        raise ShardError(f"--prefix: {error}") from error
    for name, again in zip(new, np.isin(hashes(keys), taken), strict=True):
        if again:
            raise ShardError(f"--prefix would make {name!r} of one name, and there is a video of that name already")
    return [SourceSplit(s, names) for s, names in zip(splits, renamed, strict=True)]


def _clashes(splits: list[Split]) -> list[dict[str, str]]:
    """For each split {key: id} of the videos whose key an earlier split has."""
    columns = [key_hashes(s) for s in splits]
    every = np.concatenate(columns)
    suspects = np.array([every[group[0]] for group in repeated(every)], np.uint64)
    seen: set[str] = set()
    out: list[dict[str, str]] = []
    for split, column in zip(splits, columns, strict=True):
        hit, first = np.isin(column, suspects), 0
        suspected: dict[str, str] = {}
        for table in tables(split, ["key", "id"]) if hit.any() else ():
            rows = np.flatnonzero(hit[first : first + table.num_rows])
            first += table.num_rows
            for row in table.take(rows).to_pylist() if len(rows) else ():
                suspected[row["key"]] = row["id"]
        out.append({key: id for key, id in suspected.items() if key in seen})
        seen |= suspected.keys()
    return out


def _labels(paths: list[Path]) -> list[str]:
    """A short name for each path: its folder's, with the parent's where two are called alike."""
    names = [p.resolve().name for p in paths]
    if len(set(names)) == len(names):
        return names
    names = [f"{p.resolve().parent.name}-{p.resolve().name}" for p in paths]
    return names if len(set(names)) == len(names) else [f"{n}-{i}" for i, n in enumerate(names)]


@dataclass(frozen=True)
class SplitPart:
    """A split to be made: `size` is a number of videos (int), a fraction of all (float), or None for what the others
    leave; `ids` names the videos instead."""

    name: str
    size: int | float | None = None
    ids: frozenset[str] | None = None


def split(
    path: Path,
    out: Path,
    parts: Sequence[SplitPart],
    *,
    seed: int = 0,
    whole_shards: bool = False,
    copy: bool = False,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> list[Made]:
    """Divide the split `path` into `out`/NAME for each part. Videos that no part wants are left out.

    A shard of the source that goes whole into a part is kept as it is; the part's other videos are gathered into new
    shards. Each kind follows the order of the source, but a whole shard may stand before a gathered video that the source
    has earlier. Parts of a size are drawn at random with `seed`; with `whole_shards` shard by shard, so that every tar is linked and
    sizes are only nearly those asked for. Raises ShardError if the parts want more than there is, or nothing.
    """
    source = Split(path)
    part_of = _draw_shards(source, parts, seed) if whole_shards else _draw(source, parts, seed)
    layouts = _layouts(source, part_of, len(parts))
    for part, layout in zip(parts, layouts, strict=True):
        if not any(piece.rows is None or len(piece.rows) for pieces in layout for piece in pieces):
            raise ShardError(
                f"part {part.name} would be empty: {count(len(source), 'video')} in {count(len(source.shards), 'shard')}"
            )
    total = sum(map(len, layouts))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_shard(done, total)

    on_shard(0, total)
    made = []
    with ExitStack() as stack:  # all parts appear at the end, or none
        folders = [stack.enter_context(new_folder(out / part.name)) for part in parts]
        for part, folder, layout in zip(parts, folders, layouts, strict=True):
            origin = {"divided": {"digest": source.digest, "part": part.name, "seed": seed}}
            one = write_split(
                folder, [SourceSplit(source)], layout, name=source.info["name"], split=part.name, origin=origin, copy=copy,
                on_shard=step,
            )  # fmt: skip
            made.append(Made(out / part.name, one.info, one.how))
    return made


def _draw(source: Split, parts: Sequence[SplitPart], seed: int) -> np.ndarray:
    """int16 [videos]: the part of each video, -1 for none."""
    part_of = np.full(len(source), -1, np.int16)
    if any(p.ids is not None for p in parts):
        _give_listed(source, parts, part_of)
    free = np.random.default_rng(seed).permutation(np.flatnonzero(part_of < 0))
    for number, size in _sizes(parts, len(source)).items():
        if size > len(free):
            raise ShardError(
                f"part {parts[number].name} asks for {count(size, 'video')}, but only {len(free)} of {len(source)} are left"
            )
        part_of[free[:size]], free = number, free[size:]
    for number, part in enumerate(parts):
        if part.size is None and part.ids is None:
            part_of[free] = number
    return part_of


def _sizes(parts: Sequence[SplitPart], total: int) -> dict[int, int]:
    """{position of the part: videos}; fractions are rounded so that parts that add up to 1 take all."""
    out: dict[int, int] = {}
    fraction = 0.0
    for number, part in enumerate(parts):
        if isinstance(part.size, float):
            before, fraction = round(fraction * total), fraction + part.size
            out[number] = round(fraction * total) - before
        elif part.size is not None:
            out[number] = part.size
    return out


def _give_listed(source: Split, parts: Sequence[SplitPart], part_of: np.ndarray) -> None:
    wanted: dict[str, int] = {}
    for number, part in enumerate(parts):
        for id in part.ids or ():
            if wanted.setdefault(id, number) != number:
                raise ShardError(f"{id!r} is in the lists of both {parts[wanted[id]].name} and {part.name}")
    index = 0
    for table in tables(source, ["id"]):
        for id in table.column("id").to_pylist():
            part_of[index] = wanted.pop(id, -1)
            index += 1
    if wanted:
        raise ShardError(
            f"{len(wanted)} of the listed ids are not in {source.path}: {first_few(map(repr, sorted(wanted)))}"
        )


def _draw_shards(source: Split, parts: Sequence[SplitPart], seed: int) -> np.ndarray:
    """As `_draw`, but the videos of a shard stay together."""
    if any(p.ids is not None for p in parts):
        raise ShardError("--whole-shards cannot be combined with a list of ids")
    videos = [s["videos"] for s in source.info["shards"]]
    free = np.random.default_rng(seed).permutation(len(videos)).tolist()
    shard_part = np.full(len(videos), -1, np.int16)
    for number, size in _sizes(parts, len(source)).items():
        taken = 0
        while free and abs(taken + videos[free[0]] - size) < abs(taken - size):
            shard_part[free[0]] = number
            taken += videos[free.pop(0)]
    for number, part in enumerate(parts):
        if part.size is None:
            shard_part[free] = number
    return np.repeat(shard_part, videos)


def _layouts(source: Split, part_of: np.ndarray, parts: int) -> list[list[list[Piece]]]:
    """For each part its shards: a whole one of the source where all of it goes there, else filled from several."""
    sizes = [s["videos"] for s in source.info["shards"]]
    layouts: list[list[list[Piece]]] = [[] for _ in range(parts)]
    filling = [_Filling(max(sizes), layout) for layout in layouts]
    first = 0
    for shard, size in enumerate(sizes):
        here = part_of[first : first + size]
        first += size
        used = here[here >= 0]
        if not size:
            layouts[0].append([Piece(0, shard)])  # its rejects are all it holds
        elif len(used) == size and (used == used[0]).all():
            layouts[used[0]].append([Piece(0, shard)])
        else:
            for number in np.unique(used).tolist():
                filling[number].add(shard, np.flatnonzero(here == number), with_rejects=number == used[0])
    for one in filling:
        one.close()
    return layouts


class _Filling:
    """Collects rows of several shards into shards of `capacity` videos."""

    def __init__(self, capacity: int, layout: list[list[Piece]]):
        self._capacity, self._layout = capacity, layout
        self._pieces: list[Piece] = []
        self._rows = 0

    def add(self, shard: int, rows: np.ndarray, with_rejects: bool) -> None:
        while len(rows):
            some, rows = np.split(rows, [min(len(rows), self._capacity - self._rows)])
            self._pieces.append(Piece(0, shard, some, with_rejects))
            self._rows, with_rejects = self._rows + len(some), False
            if self._rows == self._capacity:
                self.close()

    def close(self) -> None:
        if self._pieces:
            self._layout.append(self._pieces)
            self._pieces, self._rows = [], 0

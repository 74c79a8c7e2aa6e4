"""New splits out of the shards of others: whole shards are linked, single samples copied from tar to tar."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from shards import ShardError
from shards.packing.finish import finish
from shards.packing.rows import write_table
from shards.schema import FORMAT_VERSION, JSON_CRCS, REJECTS, SCHEMA
from shards.split import Split
from shards.table import read_table
from shards.tar import commit, draft_name, naming, read_index, safe_key, write_atomic
from shards.tarcopy import Members, TarCopier, copy_file, link_or_copy


@dataclass(frozen=True)
class SourceSplit:
    """A split to take samples from; the videos in `renamed` ({key: new id}) get another name on the way."""

    split: Split
    renamed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Rows of one shard (`shard` of `source`, both positions), or all of it. `with_rejects`: the rejected videos of the
    shard are listed, too."""

    source: int
    shard: int
    rows: np.ndarray | None = None
    with_rejects: bool = True


@dataclass(frozen=True)
class Made:
    """A new split: what its dataset.json says, and how many of its shards are "reflink", "link", "copy" or "rewritten"."""

    path: Path
    info: dict
    how: Counter


def write_split(
    out: Path,
    sources: Sequence[SourceSplit],
    shards: Sequence[Sequence[Piece]],
    *,
    name: str,
    split: str,
    origin: dict,
    copy: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> Made:
    """Write the split `out`, one shard for each list of pieces. Nothing is decoded and no crc is checked on the way.

    `origin` is kept in dataset.json; `copy` shares no file with the sources. `out` must be a folder that
    `new_folder` gave, and is complete when this returns.
    """
    how: Counter = Counter()
    names = [f"{i:06d}" for i in range(len(shards))]
    for shard, pieces in zip(names, shards, strict=True):
        piece = pieces[0]
        source = sources[piece.source]
        base = source.split.path / source.split.shards[piece.shard]
        if len(pieces) == 1 and piece.rows is None and not _any_renamed(source, base):
            how[link_or_copy(base.with_suffix(".tar"), out / f"{shard}.tar", copy)] += 1
            for suffix in ("idx", "parquet"):
                copy_file(base.with_suffix(f".{suffix}"), out / f"{shard}.{suffix}")
        else:
            _rewrite(out / shard, sources, pieces)
            how["rewritten"] += 1
        on_shard()
    profile = sources[0].split.info["profile"]
    plan = {"format": FORMAT_VERSION, "name": name, "split": split, "profile": profile, **origin}
    return Made(out, finish(out, plan, names), how)


@contextmanager
def new_folder(out: Path):
    """A folder to fill, which becomes `out` at the end and vanishes on an error; an OSError then names files of `out`.

    Raises ShardError if `out` holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShardError(f"{out} exists already and is not empty. Choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft_name(out)
    temporary.mkdir()
    try:
        yield temporary
        commit(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and (name := str(error.filename)).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror, name.replace(str(temporary), str(out), 1)) from error
        raise


def _any_renamed(source: SourceSplit, base: Path) -> bool:
    if not source.renamed:
        return False
    keys = read_table(base.with_suffix(".parquet"), ["key"]).column("key").to_pylist()
    return any(key in source.renamed for key in keys)


def _rewrite(target: Path, sources: Sequence[SourceSplit], pieces: Sequence[Piece]) -> None:
    """Write one shard from samples of others; committed as the packer does, table last."""
    temporary = draft_name(target.with_suffix(".tar"))
    copier = TarCopier(temporary, target.with_suffix(".tar"))
    tables, rejects, crcs = [], [], []
    try:
        for piece in pieces:
            table, more, some = _copy_piece(copier, sources[piece.source], piece)
            tables.append(table)
            rejects += more
            crcs += some
        copier.close()
        commit(temporary, target.with_suffix(".tar"))
    except BaseException:
        copier.discard()
        raise
    write_atomic(target.with_suffix(".idx"), copier.index())
    table = pa.concat_tables(tables).combine_chunks().cast(SCHEMA)  # Parquet calls what is in a list by another name
    write_table(target.with_suffix(".parquet"), table, rejects, crcs)


def _copy_piece(copier: TarCopier, source: SourceSplit, piece: Piece) -> tuple[pa.Table, list[dict], list[int]]:
    """Append the samples; returns their rows with the new places, their rejects and the crc32c of their JSONs."""
    base = source.split.path / source.split.shards[piece.shard]
    table_crc = source.split.info["shards"][piece.shard]["table_crc32c"]
    shard_table = read_table(base.with_suffix(".parquet"), crc=table_crc)
    rows = np.arange(shard_table.num_rows) if piece.rows is None else piece.rows
    index = read_index(base.with_suffix(".idx"))
    old_crcs = json.loads(shard_table.schema.metadata[JSON_CRCS])
    all_rejects = json.loads(shard_table.schema.metadata[REJECTS])
    table = shard_table.take(pa.array(rows, pa.int64())).combine_chunks()
    keys, ids, offsets, crcs = [], [], [], []
    names: dict[str, str] = {}  # old id: new id
    columns = [table.column(c).to_pylist() for c in ("key", "id", "ext", "offset", "size")]
    with open(base.with_suffix(".tar"), "rb") as file, naming(file.name):
        descriptor = file.fileno()
        for row, key, old, extension, offset, size in zip(rows.tolist(), *columns, strict=True):
            at, length = index[f"{key}.json"]
            new = source.renamed.get(key, old)
            described: bytes | tuple[int, int, int] = (descriptor, at, length)
            json_crc = old_crcs[row]
            if new != old:
                value = json.loads(os.pread(descriptor, length, at)) | {"id": new}
                text = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
                described, json_crc = text, crc32c(text)
            new_key = key if new == old else safe_key(new)
            members: Members = {extension: (descriptor, offset, size), "json": described}
            offsets.append(copier.add(new_key, members)[extension])
            keys.append(new_key)
            ids.append(new)
            crcs.append(json_crc)
            names[old] = new
    for name, values in (("key", keys), ("id", ids), ("offset", offsets)):
        place = SCHEMA.get_field_index(name)
        table = table.set_column(place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    packed = set(shard_table.column("id").to_pylist())
    rejects = [r for r in all_rejects if r["id"] in names or (piece.with_rejects and r["id"] not in packed)]
    return table, [r | {"id": names.get(r["id"], r["id"])} for r in rejects], crcs

"""Rebuild what stands beside the tars of a split (index, sample table, dataset.json) from the tars alone."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import ShardError
from shards.annotations import Caption, Item
from shards.digest import BYTES, ROWS, RULE_KEY
from shards.packing.finish import finish
from shards.packing.plan import input_digest
from shards.schema import FORMAT_VERSION, REJECTS
from shards.summary import checked
from shards.tar import read_index
from shards.tools.rebuild import Repaired, RepairedShard, ShardRepair, repair_shard
from shards.tools.tar_samples import pread
from shards.video.profiles import Profile


def repair(
    path: Path,
    *,
    name: str | None = None,
    split: str | None = None,
    everything: bool = False,
    truncate: bool = False,
    drop: bool = False,
    workers: int | None = None,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> list[Repaired]:
    """Rebuild the index and the table of every shard that lacks one or disagrees with its tar, then dataset.json.

    `everything` rebuilds the shards that look well too. A tar with a damaged end is cut after its last whole sample
    only if `truncate`; samples that do not decode, or whose bytes are not those of the old table's crc32c, are left out
    only if `drop`, which reads every shard for that. Either way the tar as it was stays beside it as NAME.tar.damaged.
    `name` and `split` are used where no dataset.json is left to tell them. Rejects are in no tar: they are taken from what
    is left of the tables and of rejects.jsonl.

    `on_shard(done, total)` is called with shards. Raises ShardError, before dataset.json is touched, if a shard cannot
    be repaired; shards repaired until then stay repaired.
    """
    names, old = _names(path)
    rejects = _rejects(path, names)
    jobs = [ShardRepair(path, shard, everything, truncate, drop) for shard in names]
    shards: list[RepairedShard] = []
    failures: list[str] = []
    on_shard(0, len(jobs))
    for done, one in enumerate(_each(jobs, rejects, workers or os.cpu_count() or 1), 1):
        if isinstance(one, ShardError):
            failures.append(str(one))
        else:
            shards.append(one)
        on_shard(done, len(jobs))
    if failures:
        more = f" ({len(failures) - 1} more shards cannot be repaired either)" if len(failures) > 1 else ""
        raise ShardError(failures[0] + more)
    profiles = [p for i, s in enumerate(shards) if (p := s.profile) and p not in [t.profile for t in shards[:i]]]
    if len(profiles) != 1:
        found = "; ".join(json.dumps(p) for p in profiles) or "none holds a video"
        raise ShardError(f"{path}: the shards must be of one profile to be a split ({found})")
    repaired = [shard.repaired for shard in shards]
    order = [f.name for f in fields(Profile)]  # in the tar's json the keys are sorted
    profile = dict(
        sorted(profiles[0].items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    )
    plan = old.get("plan") or _plan(path, name or old.get("name"), split or old.get("split"), profile, repaired)
    # of a split of an earlier version the digest stays what runs and caches know it by
    finish(path, plan, names, old.get("reconciliation"), old.get(RULE_KEY, BYTES if "digest" in old else ROWS))
    return repaired


def _each(
    jobs: list[ShardRepair], rejects: dict[str, list[dict]], workers: int
) -> Iterator[RepairedShard | ShardError]:
    if workers == 1 or len(jobs) == 1:
        yield from (repair_shard(job, rejects[job.name]) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(repair_shard, jobs, [rejects[job.name] for job in jobs])


def _names(path: Path) -> tuple[list[str], dict]:
    """Names of the shards, and what is left of dataset.json ({} if it is lost)."""
    if not path.is_dir():
        raise ShardError(f"there is no folder {path}")
    names = sorted(p.stem for p in path.glob("*.tar"))
    if not names:
        raise ShardError(f"{path} holds no tar, and a split is repaired from its tars")
    if (path / "packing.json").exists():
        raise ShardError(
            f"{path} has not been packed to its end. Run the packing command again: it goes on where it stopped. "
            "(To make a split of what is there, delete its packing.json and repair again.)"
        )
    old: dict = {}
    with suppress(OSError, ValueError, RecursionError):
        old = json.loads((path / "dataset.json").read_text())
    try:
        checked(old, path)
    except ShardError:
        entries = old.items() if isinstance(old, dict) else ()
        old = {k: v for k, v in entries if k in ("name", "split") and isinstance(v, str)}
    listed = [s["name"] for s in old["shards"]] if "shards" in old else [f"{i:06d}" for i in range(len(names))]
    if missing := sorted(set(listed) - set(names)):
        raise ShardError(
            f"{path / missing[0]}.tar is missing: nothing else holds its videos. Copy it again, or run the packing command "
            "again with the original videos; it packs what is missing."
        )
    if odd := sorted(set(names) - set(listed)):
        raise ShardError(f"{path / odd[0]}.tar is not a shard of this split: move it elsewhere")
    return listed, old


def _rejects(path: Path, names: list[str]) -> dict[str, list[dict]]:
    """The rejects of each shard: from its table, or the part of rejects.jsonl that no other table accounts for."""
    known: dict[str, list[dict]] = {}
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            known[name] = json.loads(pq.read_schema(path / f"{name}.parquet").metadata[REJECTS])
    left: list[dict] = []
    with suppress(OSError, ValueError, RecursionError):
        lines = [json.loads(line) for line in (path / "rejects.jsonl").read_text().split("\n") if line]
        left = [line for line in lines if isinstance(line, dict)]
    out: dict[str, list[dict]] = {}
    for place, name in enumerate(names):
        if name in known:
            out[name] = known[name]
            left = left[len(known[name]) :]
        else:  # all that stands before the rejects of the next known shard; of several in a row the first gets them
            following = next((known[n] for n in names[place + 1 :] if known.get(n)), [])
            at = next((i for i in range(len(left)) if left[i : i + len(following)] == following), len(left))
            out[name], left = left[: at if following else len(left)], left[at if following else len(left) :]
    return out


def _plan(path: Path, name: str | None, split: str | None, profile: dict, repaired: list[Repaired]) -> dict:
    """The plan as the packer wrote it, as far as the tars tell."""
    folder = path.resolve()
    rejects = (path / "rejects.jsonl").exists() and (path / "rejects.jsonl").stat().st_size
    items = None if rejects else _items(path, [r.shard for r in repaired])
    return {
        "format": FORMAT_VERSION,
        "name": name or folder.parent.name,
        "split": split or folder.name,
        "profile": profile,
        "input": _input(items),
        "shards": len(repaired),
        "shard_videos": max(r.videos for r in repaired),
    }


def _input(items: Iterator[Item] | None) -> str | None:
    """The digest of the packing's input, or None where the tars do not tell all of it."""
    try:
        return None if items is None else input_digest(items)
    except _Unknown:
        return None


class _Unknown(Exception):
    """Captions of a cut video were moved with it, and those outside the cut are gone; or the source's name is."""


def _items(path: Path, names: list[str]) -> Iterator[Item]:
    for name in names:
        with open(path / f"{name}.tar", "rb") as file:
            for sample, (offset, size) in read_index(path / f"{name}.idx").items():
                if sample.endswith(".json"):
                    described = json.loads(pread(file, offset, size))
                    if described["cut"]:
                        raise _Unknown
                    captions = tuple(Caption(**c) for c in described["captions"])
                    try:
                        file_name = Path(described["source"]["file"])
                    except (KeyError, TypeError) as error:
                        raise _Unknown from error
                    yield Item(described["id"], file_name, captions, described["meta"])

"""Packing: from a list of videos to committed shards, on all cores or many machines, resumable after a kill at any moment.

A shard is a fixed run of the input list, so what goes where does not depend on who packs it or on what was rejected.
Its parquet is put into place last; a shard with a parquet is never touched again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from shards import ShardError, scheduler, storage
from shards.datasets import Item
from shards.profiles import Profile
from shards.schema import FORMAT_VERSION, REJECTS
from shards.storage import Bucket, Folder
from shards.tar import DISK_FULL
from shards.worker import Job, Progress, frame_columns, write_table

__all__ = ["Progress", "finish", "finish_parts", "frame_columns", "input_digest", "missing", "pack", "write_table"]

_SUFFIXES = ("tar", "idx", "parquet")
_READERS = 8  # parquets read at once; an object store answers slowly, but many


def pack(
    items: list[Item],
    out: Path,
    *,
    dataset: str,
    split: str,
    profile: Profile,
    shard_videos: int | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    cluster: str | None = None,
    timeout: float = Job.timeout,
    retry_rejects: bool = False,
    reconciliation: dict | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict | None:
    """Pack `items` into `out` (a `Path` or `UPath`) and return the contents of its `dataset.json`.

    `part` (i, n) packs only shards i-1, i-1+n, i-1+2n, ...; while other parts lack shards, None is returned. `cluster`
    is the address of a Dask scheduler. `timeout` is seconds for a video, in proportion above 100 MB. `retry_rejects`
    packs shards again that hold rejected videos. `reconciliation` holds the counts of the annotations, which
    `dataset.json` keeps beside those of what was packed and rejected. `on_start(done, total)` says how many videos earlier runs have dealt
    with. Raises ShardError if `out` holds something else, if two items share a name, or if nothing could be packed.
    """
    if not items:
        raise ShardError("there is nothing to pack: the annotations name no video")
    _refuse_duplicates(items)
    shard_videos = shard_videos or min(256, max(16, -(-len(items) // 32)))
    count = -(-len(items) // shard_videos)
    plan = {
        "format": FORMAT_VERSION,
        "name": dataset,
        "split": split,
        "profile": profile.describe(),
        "input": input_digest(items),
        "shards": count,
        "shard_videos": shard_videos,
    }
    index, parts = part or (1, 1)
    tag = f"p{index}of{parts}-" if part else ""
    mine = range(index - 1, count, parts)
    target = storage.output(out)
    target.create()
    with target.locked(part):
        target.sweep(tag)
        there = target.listing()
        finished = _refuse_other(target, there, plan)
        packed = {shard["name"]: shard["bytes"] for shard in finished["shards"]} if finished else {}
        todo = [i for i in mine if not _is_committed(there, _name(i), packed.get(_name(i)))]
        if retry_rejects:
            todo = sorted({*todo, *_with_rejects(target, [i for i in mine if i not in set(todo)])})
        jobs = [
            Job(
                _name(i), tuple(items[i * shard_videos : (i + 1) * shard_videos]), out, profile, timeout, tag,
                {} if retry_rejects else _lost(target, there, _name(i)),
            )
            for i in todo
        ]  # fmt: skip
        total = sum(min(shard_videos, len(items) - i * shard_videos) for i in mine)
        on_start(total - sum(len(job.items) for job in jobs), total)
        if finished and not jobs:
            if "packing.json" in there:  # left by a kill between the last two steps
                target.delete("packing.json")
            return finished
        _prepare(target, there, plan | _optional(reconciliation), jobs)
        _run(jobs, cluster, workers, on_progress)
        target.sweep(tag)  # what was killed on the way
        return None if part and missing(out) else finish(out, plan, list(map(_name, range(count))), reconciliation)


def _run(jobs: list[Job], cluster: str | None, workers: int | None, on_progress: Callable[[Progress], None]) -> None:
    try:
        if jobs and cluster:
            scheduler.run_on_dask(jobs, cluster, on_progress)
        elif jobs:
            scheduler.run_locally(jobs, workers or os.cpu_count() or 1, on_progress)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ShardError(
            f"{jobs[0].out} or the folder of temporary files ({tempfile.gettempdir()}; TMPDIR chooses it) cannot be "
            f"written ({error.strerror}). What is committed stays: make room, and run the same command again to go on."
        ) from error


def missing(out: Path) -> list[str]:
    """Names of the shards that the packing in `out` still lacks. Raises ShardError if no packing was begun there."""
    target = storage.output(out)
    there = _existing(target)
    plan = _plan(target, there)
    return [_name(i) for i in range(plan["shards"]) if not _is_committed(there, _name(i), None)]


def finish_parts(out: Path) -> dict:
    """Write the `dataset.json` of a split whose shards are all committed, and return its contents.

    Raises ShardError if shards are missing, and says which.
    """
    target = storage.output(out)
    _existing(target)
    with target.locked(None):
        target.sweep("")
        plan = _plan(target, target.listing())
        if lacking := missing(out):
            raise ShardError(
                f"{out} is not complete: {len(lacking)} of {plan['shards']} shards are missing ({some(lacking)}). Run the "
                "packing command for the parts that hold them."
            )
        reconciliation = plan.pop("reconciliation", None)
        return finish(out, plan, list(map(_name, range(plan["shards"]))), reconciliation)


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _existing(target: Folder | Bucket) -> dict[str, int]:
    try:
        return target.listing()
    except FileNotFoundError as error:
        raise ShardError(f"there is no folder {target}") from error


def _plan(target: Folder | Bucket, there: dict[str, int]) -> dict:
    if "packing.json" in there:
        return json.loads(target.read("packing.json"))
    if "dataset.json" in there:
        record = json.loads(target.read("dataset.json"))
        return record["plan"] | _optional(record.get("reconciliation"))
    raise ShardError(f"{target} holds no packing.json: no packing was begun there")


def _optional(reconciliation: dict | None) -> dict:
    return {"reconciliation": reconciliation} if reconciliation else {}


def _name(shard: int) -> str:
    return f"{shard:06d}"


def _refuse_duplicates(items: list[Item]) -> None:
    if len({item.id for item in items}) == len(items):
        return
    seen: dict[str, Item] = {}
    for item in items:
        if item.id in seen:
            raise ShardError(
                f"two videos share the name {item.id!r}: {seen[item.id].path} and {item.path}. Names must differ; "
                "rename one."
            )
        seen[item.id] = item


def input_digest(items: Iterable[Item]) -> str:
    """What a packing is made from: names, captions and file names, in order."""
    digest = hashlib.sha256()
    for item in items:
        captions = [(c.text, c.start, c.end) for c in item.captions]
        cut = [item.start, item.end] if (item.start, item.end) != (None, None) else []
        digest.update(json.dumps([item.id, item.path.name, captions, item.meta, *cut], sort_keys=True).encode())
    return digest.hexdigest()


def _refuse_other(target: Folder | Bucket, there: dict[str, int], plan: dict) -> dict | None:
    """Raises ShardError if it holds something else than `plan`. Returns its `dataset.json`, if it has been finished."""
    for name in ("dataset.json", "packing.json"):
        if name in there:
            try:
                record = json.loads(target.read(name))
            except ValueError as error:
                raise ShardError(
                    f"{target}/{name} is not JSON ({error}). Choose another --out, or delete {target}."
                ) from error
            known = record.get("plan", {}) if name == "dataset.json" else record
            differing = sorted(k for k in plan if known.get(k) != plan[k])
            if differing:
                details = "; ".join(f"{k}: {known.get(k)} there, {plan[k]} asked for" for k in differing)
                raise ShardError(
                    f"{target} holds a different packing ({details}). Choose another --out, or delete it first."
                )
            return record if name == "dataset.json" else None
    foreign = sorted(name for name in there if name.endswith((".tar", ".parquet")))
    if foreign:
        raise ShardError(f"{target} already holds {foreign[0]} and no record of how it was made. Choose another --out.")
    return None


def _is_committed(there: dict[str, int], name: str, size: int | None) -> bool:
    """Whether a shard's files are all there, and its tar has `size` bytes where that is known."""
    return all(f"{name}.{suffix}" in there for suffix in _SUFFIXES) and size in (None, there[f"{name}.tar"])


def _with_rejects(target: Folder | Bucket, shards: list[int]) -> list[int]:
    """Those of the committed shards that list rejected videos."""

    def has_rejects(shard: int) -> bool:
        with target.open(f"{_name(shard)}.parquet") as file:
            return any("caption" not in r for r in json.loads(pq.read_schema(file).metadata[REJECTS]))

    with ThreadPoolExecutor(_READERS) as pool:
        return [i for i, found in zip(shards, pool.map(has_rejects, shards), strict=True) if found]


def _lost(target: Folder | Bucket, there: dict[str, int], name: str) -> dict[int, str]:
    """What an earlier run found to hang or to kill in a shard that it did not commit."""
    file = scheduler.lost_name(name)
    return {int(i): reason for i, reason in json.loads(target.read(file)).items()} if file in there else {}


def _prepare(target: Folder | Bucket, there: dict[str, int], plan: dict, jobs: list[Job]) -> None:
    """Say what is being packed, and take back what says that these shards are packed."""
    if "packing.json" not in there:
        storage.write(target, "packing.json", json.dumps(plan, indent=2) + "\n")
    stale = [f"{job.name}.parquet" for job in jobs]
    stale += [scheduler.lost_name(job.name) for job in jobs if not job.lost] + ["dataset.json"]
    for name in stale:
        if name in there:
            target.delete(name)


def finish(out: Path, plan: dict, names: list[str], reconciliation: dict | None = None) -> dict:
    """Write rejects.jsonl and dataset.json from the committed shards `names`; returns what dataset.json says."""
    target = storage.output(out)
    sizes, shards, rejects = target.listing(), [], []
    digest = hashlib.sha256(json.dumps(plan["profile"], sort_keys=True).encode())
    with ThreadPoolExecutor(_READERS) as pool:
        batches = (names[i : i + 64] for i in range(0, len(names), 64))  # or all tables would be held at once
        tables = (table for batch in batches for table in pool.map(lambda name: _read(target, name), batch))
        for name, table in zip(names, tables, strict=True):
            rejects += json.loads(table.schema.metadata[REJECTS])
            rows = table.to_pylist()
            for row in rows:
                digest.update(json.dumps([row["key"], row["crc32c"], row["captions"]], sort_keys=True).encode())
            captions = sum(len(row["captions"]) for row in rows)
            shards.append({"name": name, "videos": len(rows), "captions": captions, "bytes": sizes[f"{name}.tar"]})
    lines = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rejects)
    storage.write(target, "rejects.jsonl", lines.encode(errors="backslashreplace"))  # names need not be Unicode
    rejected_captions = sum("caption" in r for r in rejects)
    summary = {
        "format": FORMAT_VERSION,
        "name": plan["name"],
        "split": plan["split"],
        "profile": plan["profile"],
        "videos": sum(s["videos"] for s in shards),
        "captions": sum(s["captions"] for s in shards),
        "rejected_videos": len(rejects) - rejected_captions,
        "rejected_captions": rejected_captions,
        "digest": digest.hexdigest(),
        "shards": shards,
        "plan": plan,
    }
    if reconciliation:
        packed = {what: summary[what] for what in ("videos", "captions")}
        lost = {what: reconciliation["annotations"][what] - n for what, n in packed.items()}
        rejected = {what: max(0, n - reconciliation["missing"][what]) for what, n in lost.items()}
        summary["reconciliation"] = reconciliation | {"packed": packed, "rejected": rejected}
    if not summary["videos"]:
        first = next(r for r in rejects if "caption" not in r)
        raise ShardError(
            f"not one of the videos could be packed; {target}/rejects.jsonl says why for each. First: {first['id']}: "
            f"{first['reason']}. When that is mended, run the command again with --retry-rejects."
        )
    storage.write(target, "dataset.json", json.dumps(summary, indent=2) + "\n")
    for name in ["packing.json", *map(scheduler.lost_name, names)]:
        if name in sizes:
            target.delete(name)
    return summary


def _read(target: Folder | Bucket, name: str):
    with target.open(f"{name}.parquet") as file:
        return pq.read_table(file, columns=["key", "crc32c", "captions", "size"])

"""Packing: from a list of videos to committed shards, on all cores or many machines, resumable after a kill at any moment.

A shard is a fixed run of the input list, so what goes where does not depend on who packs it or on what was rejected.
Its parquet is put into place last; a shard with a parquet is never touched again, unless an update replaces it whole.
"""

import errno
import hashlib
import io
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, memory, storage
from shards.annotations import Item, refuse_duplicates
from shards.packing import scheduler
from shards.packing import update as updating
from shards.packing.update import SUFFIXES
from shards.packing.worker import Job, Progress, folders_of, frame_columns, write_table
from shards.schema import CAPTION_COUNTS, FORMAT_VERSION, REJECTS, SCHEMA
from shards.storage import Bucket, Folder
from shards.summary import checked, wrong_plan
from shards.tar import DISK_FULL
from shards.video.profiles import Profile

__all__ = ["Progress", "finish", "finish_parts", "frame_columns", "input_digest", "missing", "pack", "write_table"]

_MAKE_ROOM = "What is committed stays: make room, and run the same command again to go on."
_GO_ON = "What is committed stays: when that is mended, run the same command again to go on."
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
    update: bool = False,
    reconciliation: dict | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict | None:
    """Pack `items` into `out` (a `Path` or `UPath`) and return the contents of its `dataset.json`.

    `part` (i, n) packs only shards i-1, i-1+n, i-1+2n, ...; while other parts lack shards, None is returned. `cluster`
    is the address of a Dask scheduler. `timeout` is seconds for a video, in proportion above 100 MB. `retry_rejects`
    packs shards again that hold rejected videos. `update` makes a split that was packed from another list of videos the
    one that `items` give, and decodes only what is new; its shards keep their number of videos unless `shard_videos` is
    given. `reconciliation` holds the counts of the annotations, which `dataset.json` keeps beside those of what was
    packed and rejected. `on_start(done, total)` says how many videos earlier runs have dealt with.

    Raises ShardError if `out` holds something else, if two items share a name, or if nothing could be packed.
    """
    if not items:
        raise ShardError("there is nothing to pack: the annotations name no video")
    refuse_duplicates(items)
    if update:
        _refuse_update(out, part)
    index, parts = part or (1, 1)
    tag = f"p{index}of{parts}-" if part else ""
    target = storage.output(out)
    with _explained(target):
        target.create()
    with _explained(target), target.locked(part):
        _end_update(target, part)
        target.sweep(tag)
        there = target.listing()
        known, finished = _recorded(target, there)
        if update and known is not None:
            shard_videos = shard_videos or known.get("shard_videos")
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
        runs = [tuple(items[i * shard_videos : (i + 1) * shard_videos]) for i in range(count)]
        run = partial(_run, cluster=cluster, workers=workers, on_progress=on_progress)
        bring_up_to_date = partial(_update, target, plan, runs, Job("", (), out, profile, timeout), run, reconciliation)
        if update and known is not None and (finished or known != plan):
            return bring_up_to_date(on_start, known, finished)
        if known is not None:
            _refuse_other(target, there, known, finished, plan, items)
        mine = range(index - 1, count, parts)
        packed = {shard["name"]: shard["bytes"] for shard in finished["shards"]} if finished else {}
        todo = [i for i in mine if not _is_committed(there, _name(i), packed.get(_name(i)))]
        if retry_rejects:
            todo = sorted({*todo, *_with_rejects(target, [i for i in mine if i not in set(todo)])})
        jobs = [
            Job(_name(i), runs[i], out, profile, timeout, tag, {} if retry_rejects else _lost(target, there, _name(i)))
            for i in todo
        ]
        total = sum(len(runs[i]) for i in mine)
        on_start(total - sum(len(job.items) for job in jobs), total)
        if finished and not jobs:
            if "packing.json" in there:  # left by a kill between the last two steps
                target.delete("packing.json")
            return finished
        _prepare(target, there, plan | _optional(reconciliation), jobs)
        run(jobs)
        target.sweep(tag)  # what was killed on the way
        if part and missing(out):
            return None
        info = finish(out, plan, list(map(_name, range(count))), reconciliation)
        if update and known is not None:  # sources may have changed since the shards were packed that were there
            return bring_up_to_date(lambda done, total: None, plan, info, {job.name for job in jobs})
        return info


def _update(
    target: Folder,
    plan: dict,
    runs: list[tuple[Item, ...]],
    template: Job,
    run: Callable[[list[Job]], None],
    reconciliation: dict | None,
    on_start: Callable[[int, int], None],
    known: dict,
    finished: dict | None,
    fresh: Iterable[str] = (),
) -> dict:
    """Make the split what `plan` says, its shards holding `runs`. Rejects of the shards `fresh` are not tried again."""
    _refuse_other_set(target, known, plan)
    listing, sizes = target.listing(), {s["name"]: s["bytes"] for s in finished["shards"]} if finished else {}
    names = list(sizes) if finished else list(map(_name, range(known["shards"])))
    old = updating.survey(target.path, [n for n in names if _is_committed(listing, n, sizes.get(n))])
    if damaged := [name for name in sizes if name not in old and f"{name}.tar" in listing]:
        raise ShardError(
            f"--update: shard {damaged[0]} of {target} is damaged. Mend it (python -m c4c.shard repair {shlex.quote(str(target))}), or delete "
            f"{target}/{damaged[0]}.tar to pack its videos again; then run the update again."
        )
    samples = {id: sample for shard in old.values() for id, sample in shard.samples.items()}
    if samples and samples.keys().isdisjoint(item.id for items in runs for item in items):
        raise ShardError(
            f"--update: not one of the {len(samples)} videos in {target} is asked for (it holds {next(iter(samples))!r}, ..., "
            f"asked for are {runs[0][0].id!r}, ...). Choose another --out."
        )
    staging = Folder(target.path / updating.STAGING)
    staging.create()
    staging.sweep("")
    made = staging.listing()
    if "packing.json" in made and json.loads(staging.read("packing.json")) != plan:
        for file in (file for file in made if file.endswith(".lost.json")):  # it speaks of another list
            staging.delete(file)
    staged = updating.survey(staging.path, [_name(i) for i in range(len(runs)) if _is_committed(made, _name(i), None)])

    def look(i: int) -> tuple[str, dict[int, str]]:
        how, reasons = updating.state(runs[i], old.get(_name(i)), _name(i) not in fresh)
        if how == "changed" and updating.state(runs[i], staged.get(_name(i)), retry=False)[0] == "same":
            return "staged", {}
        return how, reasons

    with ThreadPoolExecutor(_READERS) as pool:
        states = list(pool.map(look, range(len(runs))))
    jobs: list[Job] = []
    for i, (how, reasons) in enumerate(states):
        if how != "staged":
            for file in (f"{_name(i)}.{suffix}" for suffix in reversed(SUFFIXES)):
                if file in made:
                    staging.delete(file)
        if how in ("table", "changed"):
            jobs.append(_update_job(template, _name(i), runs[i], target, staging, samples, reasons, how == "table"))
    moved = [_name(i) for i, (how, _) in enumerate(states) if how != "same"]
    surplus = [name for name in names if name not in {_name(i) for i in range(len(runs))}]
    total = sum(map(len, runs))
    on_start(total - sum(len(job.items) for job in jobs), total)
    if not moved and not surplus and finished and _says_so(finished, plan, reconciliation):
        updating.clear(target)
        return finished
    storage.write(staging, "packing.json", json.dumps(plan) + "\n")
    run(jobs)
    staging.sweep("")
    _refuse_emptied(target, staging, moved, [old[_name(i)] for i, (how, _) in enumerate(states) if how == "same"])
    updating.write_journal(target, plan, reconciliation, moved, surplus)
    return _end_update(target)


def _update_job(
    template: Job, name: str, items: tuple[Item, ...], target: Folder, staging: Folder,
    samples: dict[str, updating.Sample], reasons: dict[int, str], table_only: bool,
) -> Job:  # fmt: skip
    before = ((number, samples.get(item.id)) for number, item in enumerate(items))
    stored = {n: sample.place for n, sample in before if sample and updating.is_of(sample, items[n])}
    lost = reasons if table_only else _lost(staging, staging.listing(), name)
    return replace(
        template, name=name, items=items, out=staging.path, lost=lost, stored=stored, source=target.path,
        table_only=table_only,
    )  # fmt: skip


def _end_update(target: Folder | Bucket, part: tuple[int, int] | None = None) -> dict | None:
    """Put the shards of an update into place, if all of them are made; returns what dataset.json then says."""
    if not isinstance(target, Folder) or updating.JOURNAL not in target.listing():
        return None
    if part:
        raise ShardError(
            f"an update of {target} was stopped at its last step. Run the command once without --part to end it."
        )
    journal = updating.move(target)
    plan = journal["plan"]
    info = finish(target.path, plan, list(map(_name, range(plan["shards"]))), journal["reconciliation"])
    updating.clear(target)
    return info


def _says_so(finished: dict, plan: dict, reconciliation: dict | None) -> bool:
    """Whether dataset.json already says what it is to say."""
    counts = finished.get("reconciliation") or {}
    asked = {what: n for what, n in (reconciliation or {}).items() if what != "missing"}
    same = all(counts.get(what) == n for what, n in asked.items()) and bool(counts) == bool(asked)
    return same and finished["plan"] == plan and finished["format"] == FORMAT_VERSION


def _refuse_update(out: Path, part: tuple[int, int] | None) -> None:
    if part:
        raise ShardError("--update and --part exclude each other: an update is made by one command")
    if storage.is_remote(out):
        raise ShardError(f"--update needs a folder: {out} cannot be changed in place. Pack into another --out.")


def _refuse_other_set(target: Folder, known: dict, plan: dict) -> None:
    """Raises ShardError if an update would have to replace everything."""
    if differing := updating.name_differences(known, plan):
        raise ShardError(f"--update: {target} holds another data set ({'; '.join(differing)}). Choose another --out.")
    if differing := updating.profile_differences(known.get("profile", {}), plan["profile"]):
        raise ShardError(
            f"--update keeps the profile: {'; '.join(differing)}, so every video in {target} would be transcoded again. "
            "Choose another --out, or the options that it was packed with."
        )


def _refuse_emptied(target: Folder, staging: Folder, moved: list[str], same: list[updating.Shard]) -> None:
    """Raises ShardError if not one video would be left."""
    if any(shard.samples for shard in same):
        return
    schemas = []
    for name in moved:
        if pq.read_metadata(staging.path / f"{name}.parquet").num_rows:
            return
        schemas.append(pq.read_schema(staging.path / f"{name}.parquet"))
    rejects = [r for schema in schemas for r in json.loads(schema.metadata[REJECTS])]
    first = next((r for r in rejects if "caption" not in r), {"id": "?", "reason": "?"})
    updating.clear(target)
    raise ShardError(
        f"--update: not one of the videos can be packed (first: {first['id']}: {first['reason']}). {target} stays as it was."
    )


def _run(jobs: list[Job], *, cluster: str | None, workers: int | None, on_progress: Callable[[Progress], None]) -> None:
    if not jobs:
        return
    _note_sources(jobs)
    try:
        if cluster:
            scheduler.run_on_dask(jobs, cluster, on_progress)
        else:
            scheduler.run_locally(jobs, workers or os.cpu_count() or 1, on_progress)
    except OSError as error:
        if error.errno not in DISK_FULL or error.filename:
            raise
        raise ShardError(
            f"{jobs[0].out} or the folder of temporary files ({tempfile.gettempdir()}; TMPDIR chooses it) cannot be "
            f"written ({error.strerror}). {_MAKE_ROOM}"
        ) from error


@contextmanager
def _explained(target: Folder | Bucket) -> Iterator[None]:
    """Errors of the disk in words: which file, and how it goes on."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno == errno.EPIPE:
            raise
        way = _MAKE_ROOM if error.errno in DISK_FULL else _GO_ON
        raise ShardError(f"{error.filename or target} cannot be written or read ({error.strerror}). {way}") from error


def _note_sources(jobs: list[Job]) -> None:
    """Tell the jobs which of their files are there now, so that those are missed that are not when their turn comes."""
    found = folders_of([item for job in jobs for item in job.items])
    first = 0
    for i, job in enumerate(jobs):
        there = {n: found[first + n] for n in range(len(job.items)) if first + n in found and n not in job.lost}
        jobs[i] = replace(job, folders=there)
        first += len(job.items)


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
    with _explained(target), target.locked(None):
        _end_update(target)
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
        plan = _record(target, "packing.json")
    elif "dataset.json" in there:
        record = _record(target, "dataset.json")
        plan = record.get("plan", {}) | _optional(record.get("reconciliation"))
    else:
        raise ShardError(f"{target} holds no packing.json: no packing was begun there")
    if not isinstance(plan, dict) or "shards" not in plan:
        raise ShardError(f"{target} was made of other splits, or its plan is damaged: there is nothing to finish")
    return plan


def _optional(reconciliation: dict | None) -> dict:
    return {"reconciliation": reconciliation} if reconciliation else {}


def _name(shard: int) -> str:
    return f"{shard:06d}"


def input_digest(items: Iterable[Item]) -> str:
    """What a packing is made from: names, captions and file names, in order."""
    digest = hashlib.sha256()
    for item in items:
        captions = [(c.text, c.start, c.end) for c in item.captions]
        cut = [item.start, item.end] if (item.start, item.end) != (None, None) else []
        digest.update(json.dumps([item.id, item.path.name, captions, item.meta, *cut], sort_keys=True).encode())
    return digest.hexdigest()


def _record(target: Folder | Bucket, name: str) -> dict:
    """dataset.json or packing.json. Raises ShardError if it is damaged."""
    try:
        record = json.loads(target.read(name))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{target}/{name} is not JSON ({error}). Choose another --out, or delete {target}.") from error
    if name == "dataset.json":
        checked(record, target)
        plan = record.get("plan", {})
    else:
        plan = record
    if plan and (wrong := wrong_plan(plan)):
        raise ShardError(f"{target}/{name} is damaged: {wrong}. Choose another --out, or delete {target}.")
    return record


def _recorded(target: Folder | Bucket, there: dict[str, int]) -> tuple[dict | None, dict | None]:
    """The plan of what is packed in `target`, None if nothing is, and its `dataset.json`, if it has been finished."""
    for name in ("dataset.json", "packing.json"):
        if name in there:
            record = _record(target, name)
            if name == "dataset.json":
                return record.get("plan", {}), record
            return {k: v for k, v in record.items() if k != "reconciliation"}, None
    foreign = sorted(name for name in there if name.endswith((".tar", ".parquet")))
    if foreign:
        raise ShardError(f"{target} already holds {foreign[0]} and no record of how it was made. Choose another --out.")
    return None, None


def _refuse_other(
    target: Folder | Bucket,
    there: dict[str, int],
    known: dict,
    finished: dict | None,
    plan: dict,
    items: list[Item],
) -> None:
    """Raises ShardError if what is packed in `target`, by the plan `known`, is something else than `plan`, and says what
    differs."""
    if all(known.get(what) == value for what, value in plan.items()):
        return
    other = updating.name_differences(known, plan)
    other += updating.profile_differences(known.get("profile", {}), plan["profile"])
    if other:
        raise ShardError(f"{target} holds a different packing: {'; '.join(other)}. Choose another --out.")
    update = "Run the same command with --update to bring it up to date, or choose another --out."
    if known.get("input", 0) is None:
        raise ShardError(
            f"{target} holds a different packing (input: None there, since a repair had to leave videos out). {update}"
        )
    names = [s["name"] for s in finished["shards"]] if finished else list(map(_name, range(known.get("shards", 0))))
    names = [name for name in names if _is_committed(there, name, None)]
    if known.get("input") != plan["input"]:
        complete = len(names) == (len(finished["shards"]) if finished else known.get("shards"))
        other += updating.list_differences(updating.listed(target, names), items, complete)
    elif known.get("shard_videos") != plan["shard_videos"]:
        other.append(f"shard_videos is {known.get('shard_videos')} there, {plan['shard_videos']} asked for")
    elif known.get("format") != plan["format"]:
        other.append(f"its format is {known.get('format')}, this version writes {plan['format']}")
    raise ShardError(f"{target} holds a different packing: {'; '.join(other)}. {update}")


def _is_committed(there: dict[str, int], name: str, size: int | None) -> bool:
    """Whether a shard's files are all there, and its tar has `size` bytes where that is known."""
    return all(f"{name}.{suffix}" in there for suffix in SUFFIXES) and size in (None, there[f"{name}.tar"])


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


@dataclass(frozen=True)
class Summary:
    """What the tables of a split say, all in all: part of dataset.json, the text of rejects.jsonl and its entries, and
    the captions of each video."""

    info: dict
    rejects_text: bytes
    rejects: list[dict]
    counts: list[int]

    def caption_counts(self) -> bytes:
        """captions.npy"""
        with io.BytesIO() as file:
            np.save(file, np.array(self.counts, np.min_scalar_type(max(self.counts, default=0))))
            return file.getvalue()


def summarise(out: Path, profile: dict, names: list[str]) -> Summary:
    """Read it from the committed shards `names`."""
    target = storage.output(out)
    sizes, shards, rejects, counts, current = target.listing(), [], [], [], True
    digest = hashlib.sha256(json.dumps(profile, sort_keys=True).encode())
    with ThreadPoolExecutor(_READERS if memory.limit() is None else 1) as pool:
        batches = (names[i : i + 64] for i in range(0, len(names), 64))  # or all tables would be held at once
        tables = (table for batch in batches for table in pool.map(lambda name: _read(target, name), batch))
        for name, (table, of_this_format, crc) in zip(names, tables, strict=True):
            rejects += json.loads(table.schema.metadata[REJECTS])
            current &= of_this_format
            rows = table.to_pylist()
            for row in rows:
                digest.update(json.dumps([row["key"], row["crc32c"], row["captions"]], sort_keys=True).encode())
            said = [len(row["captions"]) for row in rows]
            counts += said
            shards.append(
                {
                    "name": name, "videos": len(rows), "captions": sum(said), "bytes": sizes[f"{name}.tar"],
                    "table_crc32c": crc,
                }
            )  # fmt: skip
    lines = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rejects)
    rejected_captions = sum("caption" in r for r in rejects)
    info = {
        "format": FORMAT_VERSION if current else 1,
        "videos": sum(s["videos"] for s in shards),
        "captions": sum(s["captions"] for s in shards),
        "rejected_videos": len(rejects) - rejected_captions,
        "rejected_captions": rejected_captions,
        "digest": digest.hexdigest(),
        "shards": shards,
    }
    return Summary(info, lines.encode(errors="backslashreplace"), rejects, counts)  # names need not be Unicode


def finish(out: Path, plan: dict, names: list[str], reconciliation: dict | None = None) -> dict:
    """Write rejects.jsonl and dataset.json from the committed shards `names`; returns what dataset.json says."""
    target = storage.output(out)
    found = summarise(out, plan["profile"], names)
    storage.write(target, "rejects.jsonl", found.rejects_text)
    named = {what: plan[what] for what in ("name", "split", "profile")}
    summary = {"format": found.info["format"]} | named | found.info | {"plan": plan}
    if reconciliation:
        packed = {what: summary[what] for what in ("videos", "captions")}
        summary["reconciliation"] = _reconciled(reconciliation, packed, found.rejects, plan)
    if not summary["videos"]:
        first = next(r for r in found.rejects if "caption" not in r)
        raise ShardError(
            f"not one of the videos could be packed; {target}/rejects.jsonl says why for each. First: {first['id']}: "
            f"{first['reason']}. When that is mended, run the command again with --retry-rejects."
        )
    storage.write(target, CAPTION_COUNTS, found.caption_counts())
    storage.write(target, "dataset.json", json.dumps(summary, indent=2) + "\n")
    there = target.listing()
    for name in ["packing.json", *map(scheduler.lost_name, names)]:
        if name in there:
            target.delete(name)
    return summary


def _reconciled(counts: dict, packed: dict[str, int], rejects: list[dict], plan: dict) -> dict:
    """The counts of the annotations with those of what became of them, each counted where it is recorded.

    Raises ShardError if they do not add up. Where rejects of an older version, or a repair, do not tell, "rejected"
    stays None.
    """
    videos = [r for r in rejects if "caption" not in r]
    if plan.get("input") is None or not all("captions" in r for r in videos):
        return counts | {"packed": packed, "rejected": {"videos": None, "captions": None}}
    gone = [r for r in videos if r.get("missing")]
    bad = [r for r in videos if not r.get("missing")]
    ids = {r["id"] for r in videos}  # a rejected video's captions have been counted with it
    single = sum("caption" in r and r["id"] not in ids for r in rejects)
    missing = {"videos": len(gone), "captions": sum(r["captions"] for r in gone)}
    rejected = {"videos": len(bad), "captions": sum(r["captions"] for r in bad) + single}
    for what, n in counts["annotations"].items():
        if n != packed[what] + rejected[what] + missing[what]:
            raise ShardError(
                f"the annotations hold {n} {what}, but {packed[what]} packed, {rejected[what]} rejected and {missing[what]} "
                f"missing are {packed[what] + rejected[what] + missing[what]}"
            )
    return counts | {"missing": missing, "packed": packed, "rejected": rejected}


def _read(target: Folder | Bucket, name: str) -> tuple[pa.Table, bool, int]:
    """What `summarise` needs of a shard's table, whether all of its rows were packed by this format, and the file's crc32c."""
    data = target.read(f"{name}.parquet")
    with pq.ParquetFile(io.BytesIO(data)) as file:
        read = partial(file.read, use_threads=memory.limit() is None)
        table = read(["key", "crc32c", "captions", "size"])
        known = set(SCHEMA.names) <= set(file.schema_arrow.names)
        return table, known and read(["mirrored"]).column("mirrored").null_count == 0, crc32c(data)

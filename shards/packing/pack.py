"""Packing: from a list of videos to committed shards, on all cores or many machines, resumable after a kill at any moment.

A shard is a fixed run of the input list, so what goes where does not depend on who packs it or on what was rejected.
Its parquet is put into place last; a shard with a parquet is never touched again, unless an update replaces it as a whole.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from shards import ShardError, first_few, storage
from shards.annotations import Item, refuse_duplicates
from shards.packing import scheduler
from shards.packing.differences import refuse_other
from shards.packing.finish import finish
from shards.packing.plan import (
    READERS,
    Packing,
    input_digest,
    is_committed,
    read_plan,
    read_plan_and_summary,
    shard_name,
)
from shards.packing.sources import folders_of
from shards.packing.update import bring_up_to_date, end_update, refuse_update
from shards.packing.worker import Job, Progress
from shards.schema import FORMAT_VERSION, REJECTS
from shards.storage import Bucket, Folder
from shards.tar import DISK_FULL
from shards.video.profiles import Profile

_MAKE_ROOM = "Committed shards are kept: make room, and run the same command again to go on."
_GO_ON = "Committed shards are kept: when that is fixed, run the same command again to go on."


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
        refuse_update(out, part)
    target = storage.output(out)
    with _explained(target):
        target.create()
    with _explained(target), target.locked(part):
        end_update(target, part)
        template = Job("", (), out, profile, timeout, f"p{part[0]}of{part[1]}-" if part else "")
        target.sweep(template.tag)
        listing = target.listing()  # once: another part may end meanwhile
        known, finished = read_plan_and_summary(target, listing)
        if update and known is not None:
            shard_videos = shard_videos or known.get("shard_videos")
        run = partial(_run, cluster=cluster, workers=workers, on_progress=on_progress)
        plan = _plan(items, dataset, split, profile, shard_videos or min(256, max(16, -(-len(items) // 32))))
        packing = Packing(target, plan, _shards(items, plan), reconciliation, template, run)
        if not update or known is None:
            return _pack(packing, listing, part, known, finished, retry_rejects, on_start)
        return _update(packing, listing, known, finished, retry_rejects, on_start)


def _plan(items: list[Item], dataset: str, split: str, profile: Profile, shard_videos: int) -> dict:
    return {
        "format": FORMAT_VERSION,
        "name": dataset,
        "split": split,
        "profile": profile.describe(),
        "input": input_digest(items),
        "shards": -(-len(items) // shard_videos),
        "shard_videos": shard_videos,
    }


def _shards(items: list[Item], plan: dict) -> list[tuple[Item, ...]]:
    size = plan["shard_videos"]
    return [tuple(items[i * size : (i + 1) * size]) for i in range(plan["shards"])]


def _pack(
    packing: Packing,
    listing: dict[str, int],
    part: tuple[int, int] | None,
    known: dict | None,
    finished: dict | None,
    retry_rejects: bool,
    on_start: Callable[[int, int], None],
) -> dict | None:
    """Pack what is missing of the split, or of a part of it. `known` and `finished`: what `read_plan_and_summary` made
    of `listing`."""
    target, shards, names = packing.target, packing.shards, packing.names
    if known is not None:
        refuse_other(target, listing, known, finished, packing.plan, [item for shard in shards for item in shard])
    index, parts = part or (1, 1)
    in_part = range(index - 1, len(shards), parts)
    jobs = _jobs(packing, listing, finished, in_part, retry_rejects)
    total = sum(len(shards[i]) for i in in_part)
    on_start(total - sum(len(job.items) for job in jobs), total)
    if finished and not jobs:
        if "packing.json" in listing:  # left by a kill between the last two steps
            target.delete("packing.json")
        return finished
    _prepare(packing, listing, jobs)
    packing.run(jobs)
    target.sweep(packing.template.tag)  # what was killed on the way
    if part and missing(packing.template.out):
        return None
    return finish(packing.template.out, packing.plan, names, packing.reconciliation)


def _update(
    packing: Packing,
    listing: dict[str, int],
    known: dict,
    finished: dict | None,
    retry_rejects: bool,
    on_start: Callable[[int, int], None],
) -> dict | None:
    """Bring up to date what is packed by the plan `known`."""
    if finished or known != packing.plan:
        return bring_up_to_date(packing, known, finished, on_start)
    packed: set[str] = set()  # by this run

    def run(jobs: list[Job]) -> None:
        packed.update(job.name for job in jobs)
        packing.run(jobs)

    info = _pack(replace(packing, run=run), listing, None, known, None, retry_rejects, on_start)
    # sources may have changed since earlier runs packed their shards
    return bring_up_to_date(packing, packing.plan, info, lambda done, total: None, packed)


def _jobs(
    packing: Packing, listing: dict[str, int], finished: dict | None, in_part: range, retry_rejects: bool
) -> list[Job]:
    """Jobs for those of the shards `in_part` that are not packed, or hold rejected videos that are to be tried again."""
    target, names = packing.target, packing.names
    sizes = {shard["name"]: shard["bytes"] for shard in finished["shards"]} if finished else {}
    todo = [i for i in in_part if not is_committed(listing, names[i], sizes.get(names[i]))]
    if retry_rejects:
        todo = sorted({*todo, *_with_rejects(target, [i for i in in_part if i not in set(todo)])})
    verdicts = {i: {} if retry_rejects else scheduler.read_lost(target, listing, names[i]) for i in todo}
    return [replace(packing.template, name=names[i], items=packing.shards[i], lost=verdicts[i]) for i in todo]


def _with_rejects(target: Folder | Bucket, shards: list[int]) -> list[int]:
    """Those of the committed shards that list rejected videos."""

    def has_rejects(shard: int) -> bool:
        with target.open(f"{shard_name(shard)}.parquet") as file:
            return any("caption" not in r for r in json.loads(pq.read_schema(file).metadata[REJECTS]))

    with ThreadPoolExecutor(READERS) as pool:
        return [i for i, rejects in zip(shards, pool.map(has_rejects, shards), strict=True) if rejects]


def _prepare(packing: Packing, listing: dict[str, int], jobs: list[Job]) -> None:
    """Record what is being packed, and take back what says that these shards are packed."""
    if "packing.json" not in listing:
        storage.write(packing.target, "packing.json", json.dumps(packing.record, indent=2) + "\n")
    stale = [f"{job.name}.parquet" for job in jobs]
    stale += [scheduler.lost_name(job.name) for job in jobs if not job.lost] + ["dataset.json"]
    for name in stale:
        if name in listing:
            packing.target.delete(name)


def _run(jobs: list[Job], *, cluster: str | None, workers: int | None, on_progress: Callable[[Progress], None]) -> None:
    if not jobs:
        return
    jobs = _with_folders(jobs)
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


def _with_folders(jobs: list[Job]) -> list[Job]:
    """The jobs, which now know the files that exist, so that a file that vanishes later is not taken for a missing one."""
    folders = folders_of([item for job in jobs for item in job.items])
    first, out = 0, []
    for job in jobs:
        present = {n: folders[first + n] for n in range(len(job.items)) if first + n in folders and n not in job.lost}
        out.append(replace(job, folders=present))
        first += len(job.items)
    return out


@contextmanager
def _explained(target: Folder | Bucket) -> Iterator[None]:
    """Errors of the disk in words: which file, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno == errno.EPIPE:
            raise
        way = _MAKE_ROOM if error.errno in DISK_FULL else _GO_ON
        raise ShardError(f"{error.filename or target} cannot be written or read ({error.strerror}). {way}") from error


def missing(out: Path) -> list[str]:
    """Names of the shards that the packing in `out` still lacks. Raises ShardError if no packing was begun there."""
    target = storage.output(out)
    listing = _existing(target)
    plan = read_plan(target, listing)
    return [name for name in map(shard_name, range(plan["shards"])) if not is_committed(listing, name, None)]


def finish_parts(out: Path) -> dict:
    """Write the `dataset.json` of a split whose shards are all committed, and return its contents.

    Raises ShardError if shards are missing, and says which.
    """
    target = storage.output(out)
    _existing(target)
    with _explained(target), target.locked(None):
        end_update(target)
        target.sweep("")
        plan = read_plan(target, target.listing())
        if lacking := missing(out):
            raise ShardError(
                f"{out} is not complete: {len(lacking)} of {plan['shards']} shards are missing ({first_few(lacking, 5)}). Run the "
                "packing command for the parts that hold them."
            )
        reconciliation = plan.pop("reconciliation", None)
        return finish(out, plan, list(map(shard_name, range(plan["shards"]))), reconciliation)


def _existing(target: Folder | Bucket) -> dict[str, int]:
    try:
        return target.listing()
    except FileNotFoundError as error:
        raise ShardError(f"there is no folder {target}") from error

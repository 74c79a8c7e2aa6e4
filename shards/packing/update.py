"""Bringing a packed split up to date with a list of videos that has changed.

The shards are laid out as a new packing would do it. Those whose content stays are left alone. The others are written into
a folder inside the split, from stored samples where there are any, while the split stays as it is. Once all of them exist
a journal records it, and they are moved into place; whoever runs next after a kill goes on with that.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, first_few, storage
from shards.packing import scheduler
from shards.packing.committed import CommittedShard, StoredSample, is_of, state, survey
from shards.packing.differences import name_differences, profile_differences
from shards.packing.finish import finish
from shards.packing.plan import READERS, Packing, is_committed, shard_name, with_counts
from shards.packing.worker import Job
from shards.schema import REJECTS, SUFFIXES
from shards.storage import Bucket, Folder
from shards.tar import commit

STAGING = ".update"  # the folder inside a split in which its new shards are made
JOURNAL = "update.json"  # beside dataset.json: all of them are made, and are being moved into place


def refuse_update(out: Path, part: tuple[int, int] | None) -> None:
    """Raises ShardError where no update is possible."""
    if part:
        raise ShardError("--update and --part exclude each other: an update is made by one command")
    if storage.is_remote(out):
        raise ShardError(f"--update needs a folder: {out} cannot be changed in place. Pack into another --out.")


def bring_up_to_date(
    packing: Packing,
    known: dict,
    finished: dict | None,
    on_start: Callable[[int, int], None],
    fresh: Iterable[str] = (),
) -> dict | None:
    """Make a split that was packed by the plan `known` the one that `packing` asks for; returns what dataset.json then says.

    `finished` is its dataset.json, if it has been finished. Rejected videos of the shards `fresh` are not tried again.
    """
    target, plan = packing.target, packing.plan
    assert isinstance(target, Folder), "refuse_update allows no other"
    _refuse_other_set(target, known, plan)
    names, old = _committed(target, known, finished)
    samples = {id: sample for shard in old.values() for id, sample in shard.samples.items()}
    if samples and samples.keys().isdisjoint(item.id for items in packing.shards for item in items):
        raise ShardError(
            f"--update: not one of the {len(samples)} videos in {target} is asked for (it holds {first_few(map(repr, samples), 1)}; "
            f"asked for: {first_few((repr(item.id) for items in packing.shards for item in items), 1)}). Choose another --out."
        )
    staging = _staging(target, plan)
    states = _states(packing, old, staging, fresh)
    jobs = _jobs(packing, staging, states, samples)
    changed = [name for name, (how, _) in states.items() if how != "same"]
    surplus = [name for name in names if name not in states]
    total = sum(map(len, packing.shards))
    on_start(total - sum(len(job.items) for job in jobs), total)
    if not changed and not surplus and finished and _is_recorded(finished, packing):
        _clear(target)
        return finished
    storage.write(staging, "packing.json", json.dumps(plan) + "\n")
    packing.run(jobs)
    staging.sweep("")
    _refuse_emptied(target, staging, changed, [old[name] for name, (how, _) in states.items() if how == "same"])
    _write_journal(target, packing, changed, surplus)
    return end_update(target)


def end_update(target: Folder | Bucket, part: tuple[int, int] | None = None) -> dict | None:
    """Put the shards of an update into place, if all of them are made; returns what dataset.json then says."""
    if not isinstance(target, Folder) or JOURNAL not in target.listing():
        return None
    if part:
        raise ShardError(
            f"an update of {target} was stopped at its last step. Run the command once without --part to end it."
        )
    journal = _move(target)
    plan = journal["plan"]
    info = finish(target.path, plan, list(map(shard_name, range(plan["shards"]))), journal["reconciliation"])
    _clear(target)
    return info


def _committed(target: Folder, known: dict, finished: dict | None) -> tuple[list[str], dict[str, CommittedShard]]:
    """Names of the split's shards, and those of them that can be read. Raises ShardError if one is damaged."""
    listing, sizes = target.listing(), {s["name"]: s["bytes"] for s in finished["shards"]} if finished else {}
    names = list(sizes) if finished else list(map(shard_name, range(known["shards"])))
    shards = survey(target.path, [name for name in names if is_committed(listing, name, sizes.get(name))])
    if damaged := [name for name in sizes if name not in shards and f"{name}.tar" in listing]:
        raise ShardError(
            f"--update: shard {damaged[0]} of {target} is damaged. Repair it (python -m c4c.shard repair {shlex.quote(str(target))}), or delete "
            f"{target}/{damaged[0]}.tar to pack its videos again; then run the update again."
        )
    return names, shards


def _staging(target: Folder, plan: dict) -> Folder:
    """The folder for new shards, without what an update to another list of videos recorded there."""
    staging = Folder(target.path / STAGING)
    staging.create()
    staging.sweep("")
    listing = staging.listing()
    if "packing.json" in listing and json.loads(staging.read("packing.json")) != plan:
        for file in (file for file in listing if file.endswith(".lost.json")):
            staging.delete(file)
    return staging


def _states(
    packing: Packing, old: dict[str, CommittedShard], staging: Folder, fresh: Iterable[str]
) -> dict[str, tuple[str, dict[int, str]]]:
    """For each shard what is to be done with it, and why videos are rejected: see `state`; "staged" is made already."""
    listing, fresh = staging.listing(), set(fresh)
    staged = survey(staging.path, [name for name in packing.names if is_committed(listing, name, None)])

    def look(name: str, items: tuple) -> tuple[str, dict[int, str]]:
        how, reasons = state(items, old.get(name), name not in fresh)
        if how == "changed" and state(items, staged.get(name), retry=False)[0] == "same":
            return "staged", {}
        return how, reasons

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(packing.names, pool.map(look, packing.names, packing.shards), strict=True))


def _jobs(
    packing: Packing,
    staging: Folder,
    states: dict[str, tuple[str, dict[int, str]]],
    samples: dict[str, StoredSample],
) -> list[Job]:
    """Jobs that write the new shards and tables into `staging`; what is there of them and is of no use is deleted."""
    listing, jobs = staging.listing(), []
    for (name, (how, reasons)), items in zip(states.items(), packing.shards, strict=True):
        if how != "staged":
            for file in (f"{name}.{suffix}" for suffix in reversed(SUFFIXES)):
                if file in listing:
                    staging.delete(file)
        if how in ("table", "changed"):
            before = ((number, samples.get(item.id)) for number, item in enumerate(items))
            stored = {n: sample.place for n, sample in before if sample and is_of(sample, items[n])}
            lost = reasons if how == "table" else scheduler.read_lost(staging, listing, name)
            job = replace(
                packing.template, name=name, items=items, out=staging.path, lost=lost, stored=stored,
                source=packing.target.path, table_only=how == "table",
            )  # fmt: skip
            jobs.append(job)
    return jobs


def _is_recorded(finished: dict, packing: Packing) -> bool:
    """Whether dataset.json already says what it is to say."""
    counts = finished.get("reconciliation") or {}
    asked = {what: n for what, n in (packing.reconciliation or {}).items() if what != "missing"}
    same = all(counts.get(what) == n for what, n in asked.items()) and bool(counts) == bool(asked)
    return same and finished["plan"] == packing.plan


def _refuse_other_set(target: Folder, known: dict, plan: dict) -> None:
    """Raises ShardError if an update would have to replace everything."""
    if differing := name_differences(known, plan):
        raise ShardError(f"--update: {target} holds another data set ({'; '.join(differing)}). Choose another --out.")
    if differing := profile_differences(known.get("profile", {}), plan["profile"]):
        raise ShardError(
            f"--update keeps the profile: {'; '.join(differing)}, so every video in {target} would be transcoded again. "
            "Choose another --out, or the options that it was packed with."
        )


def _refuse_emptied(target: Folder, staging: Folder, changed: list[str], same: list[CommittedShard]) -> None:
    """Raises ShardError if not one video would be left."""
    if any(shard.samples for shard in same):
        return
    schemas = []
    for name in changed:
        if pq.read_metadata(staging.path / f"{name}.parquet").num_rows:
            return
        schemas.append(pq.read_schema(staging.path / f"{name}.parquet"))
    rejects = [r for schema in schemas for r in json.loads(schema.metadata[REJECTS])]
    first = next((r for r in rejects if "caption" not in r), {"id": "?", "reason": "?"})
    _clear(target)
    raise ShardError(
        f"--update: not one of the videos can be packed (first: {first['id']}: {first['reason']}). {target} stays as it was."
    )


# ---- putting the new shards into place ----


def _write_journal(target: Folder, packing: Packing, changed: Iterable[str], surplus: Iterable[str]) -> None:
    """Record that all new shards are made, which ones go (`surplus`), and what the split is then to say of itself."""
    staging = target.path / STAGING
    tables = {name: crc32c((staging / f"{name}.parquet").read_bytes()) for name in changed}
    counts = packing.reconciliation
    journal = {"plan": packing.plan, "reconciliation": counts, "tables": tables, "surplus": list(surplus)}
    storage.write(target, JOURNAL, json.dumps(journal) + "\n")


def _move(target: Folder) -> dict:
    """Move all new shards into place, or those that are left to be moved; returns the journal. Until `dataset.json` is
    written again the split counts as incomplete."""
    journal = json.loads(target.read(JOURNAL))
    packing = with_counts(journal["plan"], journal["reconciliation"])
    storage.write(target, "packing.json", json.dumps(packing) + "\n")
    target.delete("dataset.json")
    staging = target.path / STAGING
    for name, crc in journal["tables"].items():
        table = target.path / f"{name}.parquet"
        if not (staging / table.name).exists() and not (table.exists() and crc32c(table.read_bytes()) == crc):
            raise ShardError(
                f"{target}: an update was stopped while it moved its shards into place, and {staging / table.name} is gone. "
                f"Delete {target} and pack it again."
            )
        for path in (staging / f"{name}.{suffix}" for suffix in SUFFIXES):
            if path.exists():
                commit(path, target.path / path.name)
    for name in journal["surplus"]:
        for file in (*(f"{name}.{suffix}" for suffix in reversed(SUFFIXES)), scheduler.lost_name(name)):
            target.delete(file)
    return journal


def _clear(target: Folder) -> None:
    """Remove what an update leaves. The journal goes last."""
    shutil.rmtree(target.path / STAGING, ignore_errors=True)
    target.delete(JOURNAL)

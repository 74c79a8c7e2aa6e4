"""The plan of a packing: which videos go into which shard, as packing.json and then dataset.json record it."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shards import ShardError
from shards.annotations import Item
from shards.packing.worker import Job
from shards.schema import SUFFIXES
from shards.storage import Bucket, Folder
from shards.summary import checked, wrong_plan

READERS = 8  # parquets read at once; an object store answers slowly, but many


@dataclass(frozen=True)
class Packing:
    """A packing as it is asked for: its plan, the items of each shard, the counts of the annotations, and how shards are packed.

    `template` is what all jobs have in common; `run` packs the shards of a list of jobs.
    """

    target: Folder | Bucket
    plan: dict
    shards: list[tuple[Item, ...]]
    reconciliation: dict | None
    template: Job
    run: Callable[[list[Job]], None]

    @property
    def names(self) -> list[str]:
        """Names of the shards."""
        return list(map(shard_name, range(len(self.shards))))

    @property
    def record(self) -> dict:
        """What packing.json says."""
        return with_counts(self.plan, self.reconciliation)


def shard_name(shard: int) -> str:
    """The name of a shard's files, without suffix."""
    return f"{shard:06d}"


def input_digest(items: Iterable[Item]) -> str:
    """What a packing is made from: ids, file names, captions, meta and cuts, in order."""
    digest = hashlib.sha256()
    for item in items:
        captions = [(c.text, c.start, c.end) for c in item.captions]
        cut = [item.start, item.end] if (item.start, item.end) != (None, None) else []
        digest.update(json.dumps([item.id, item.path.name, captions, item.meta, *cut], sort_keys=True).encode())
    return digest.hexdigest()


def is_committed(listing: dict[str, int], name: str, size: int | None) -> bool:
    """Whether a shard's files are all there, and its tar has `size` bytes where that is known."""
    return all(f"{name}.{suffix}" in listing for suffix in SUFFIXES) and size in (None, listing[f"{name}.tar"])


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


def read_plan_and_summary(target: Folder | Bucket, listing: dict[str, int]) -> tuple[dict | None, dict | None]:
    """The plan of what is packed in `target`, None if nothing is, and its `dataset.json`, if it has been finished."""
    for name in ("dataset.json", "packing.json"):
        if name in listing:
            record = _record(target, name)
            if name == "dataset.json":
                return record.get("plan", {}), record
            return {k: v for k, v in record.items() if k != "reconciliation"}, None
    foreign = sorted(name for name in listing if name.endswith((".tar", ".parquet")))
    if foreign:
        raise ShardError(f"{target} already holds {foreign[0]} and no record of how it was made. Choose another --out.")
    return None, None


def read_plan(target: Folder | Bucket, listing: dict[str, int]) -> dict:
    """The plan of the packing in `target`, with the counts of its annotations. Raises ShardError if there is none."""
    if "packing.json" in listing:
        try:
            plan = _record(target, "packing.json")
        except FileNotFoundError:  # another part has finished the split since it was listed
            return read_plan(target, {"dataset.json": 0})
    elif "dataset.json" in listing:
        record = _record(target, "dataset.json")
        plan = with_counts(record.get("plan", {}), record.get("reconciliation"))
    else:
        raise ShardError(f"{target} holds no packing.json: no packing was begun there")
    if not isinstance(plan, dict) or "shards" not in plan:
        raise ShardError(f"{target} was made of other splits, or its plan is damaged: there is nothing to finish")
    return plan


def with_counts(plan: dict, reconciliation: dict | None) -> dict:
    """The plan, and the counts of the annotations if there are any: what packing.json holds."""
    return plan | ({"reconciliation": reconciliation} if reconciliation else {})

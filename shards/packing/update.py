"""Bringing a packed split up to date with a list of videos that has changed, and saying how the two differ.

The shards are laid out as a new packing would do it. Those whose content stays are left alone. The others are written into
a folder inside the split, from stored samples where there are any, while the split stays as it is. Once all of them are
there a journal says so, and they are moved into place; whoever comes next after a kill goes on with that.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, VideoError, storage
from shards.annotations import Caption, Item
from shards.packing import scheduler
from shards.packing.worker import ABSENT, MISSING, in_clip, rejection, screened, source_size
from shards.schema import REJECTS, SCHEMA
from shards.storage import Bucket, Folder
from shards.tar import commit, read_index
from shards.tarcopy import Place

STAGING = ".update"  # the folder inside a split in which its new shards are made
JOURNAL = "update.json"  # beside dataset.json: all of them are made, and are being moved into place

SUFFIXES = ("tar", "idx", "parquet")  # of a shard's files, in the order in which they are put into place
_READERS = 8


# ---- what is stored ----


@dataclass(frozen=True, slots=True)
class Sample:
    """What a stored sample's JSON says: its source's name and size (None: not recorded), its cut, its duration, and a digest of its
    captions and meta."""

    place: Place
    file: str
    bytes: int | None
    cut: tuple | None
    duration: float
    said: bytes


@dataclass(frozen=True)
class Shard:
    """A committed shard: its samples by id, in order, its rejects, and whether its table has all columns of today."""

    samples: dict[str, Sample]
    rejects: list[dict]
    current: bool


def survey(folder: Path, names: Iterable[str]) -> dict[str, Shard]:
    """The committed shards `names` that can be read. Of each sample only the JSON is read."""
    names = list(names)
    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(names, pool.map(lambda name: _shard(folder, name), names), strict=True)
        return {name: shard for name, shard in found if shard}


def _shard(folder: Path, name: str) -> Shard | None:
    base = folder / name
    try:
        with pq.ParquetFile(base.with_suffix(".parquet")) as file:
            columns = file.read(["key", "id"]).to_pydict()
            schema = file.schema_arrow
        index, samples = read_index(base.with_suffix(".idx")), {}
        with open(base.with_suffix(".tar"), "rb") as file:
            for row, (key, id) in enumerate(zip(columns["key"], columns["id"], strict=True)):
                offset, size = index[f"{key}.json"]
                samples[id] = _sample(Place(name, row), json.loads(os.pread(file.fileno(), size, offset)))
        return Shard(samples, json.loads(schema.metadata[REJECTS]), set(SCHEMA.names) <= set(schema.names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return None


def _sample(place: Place, described: dict) -> Sample:
    source, cut = described["source"], described.get("cut")
    said = _digest(described["captions"], described.get("meta", {}))
    return Sample(place, source["file"], source.get("bytes"), cut and tuple(cut), described["duration"], said)


def _digest(captions: list[dict], meta: dict) -> bytes:
    meta = json.loads(json.dumps(meta, sort_keys=True))
    return hashlib.blake2b(json.dumps([captions, meta], sort_keys=True).encode(), digest_size=16).digest()


def is_of(sample: Sample, item: Item) -> bool:
    """Whether the sample was made of the item's file and cut. Where the file is gone its name decides, with or without
    an extension; where it is on a server, or its size was not recorded, its name alone."""
    cut = None if (item.start, item.end) == (None, None) else (item.start, item.end)
    if sample.cut != cut:
        return False
    size = source_size(item.path)
    if size == ABSENT:
        return sample.file == item.path.name or Path(sample.file).stem in (item.path.name, item.path.stem)
    return sample.file == item.path.name and (None in (size, sample.bytes) or size == sample.bytes)


def state(items: Sequence[Item], shard: Shard | None, retry: bool) -> tuple[str, dict[int, str]]:
    """What is to be done with a shard that is to hold `items`: nothing ("same"), its table has to be written again
    ("table"), or all of it ("changed"); and, unless that, why which of the items are rejected.

    With `retry` rejected videos are tried again, which makes a shard "changed", unless they are known to be rejected again
    without reading them; without, only those are whose file was missing and now is not.
    """
    if shard is None:
        return "changed", {}
    known = {r["id"]: r for r in shard.rejects if "caption" not in r}
    ids, rejects, reasons = [], [], {}
    for number, item in enumerate(items):
        sample, before = shard.samples.get(item.id), known.get(item.id)
        try:
            captions = screened(item, rejects)
            if sample:
                said = _digest([asdict(in_clip(c, item, sample.duration)) for c in captions], item.meta)
                if said != sample.said or not is_of(sample, item):
                    return "changed", {}
                ids.append(item.id)
            elif source_size(item.path) == ABSENT:
                raise VideoError(MISSING)
            elif not retry and before and before["path"] == str(item.path) and not before.get("missing"):
                raise VideoError(before["reason"])
            else:
                return "changed", {}
        except VideoError as error:
            reasons[number] = str(error)
            rejects.append(rejection(item, reasons[number]))
    if ids != list(shard.samples):
        return "changed", {}
    return "same" if shard.current and shard.rejects == rejects else "table", reasons


# ---- putting the new shards into place ----


def write_journal(
    target: Folder, plan: dict, reconciliation: dict | None, shards: Iterable[str], surplus: Iterable[str]
) -> None:
    """Say that all new `shards` are made, which ones go (`surplus`), and what the split is then to say of itself."""
    made = target.path / STAGING
    tables = {name: crc32c((made / f"{name}.parquet").read_bytes()) for name in shards}
    journal = {"plan": plan, "reconciliation": reconciliation, "tables": tables, "surplus": list(surplus)}
    storage.write(target, JOURNAL, json.dumps(journal) + "\n")


def move(target: Folder) -> dict:
    """Move all new shards into place, or those that are left to be moved; returns the journal. Until `dataset.json` is
    written again the split passes for incomplete."""
    journal = json.loads(target.read(JOURNAL))
    plan, counts = journal["plan"], journal["reconciliation"]
    storage.write(target, "packing.json", json.dumps(plan | ({"reconciliation": counts} if counts else {})) + "\n")
    target.delete("dataset.json")
    made = target.path / STAGING
    for name, crc in journal["tables"].items():
        table = target.path / f"{name}.parquet"
        if not (made / table.name).exists() and not (table.exists() and crc32c(table.read_bytes()) == crc):
            raise ShardError(
                f"{target}: an update was stopped while it moved its shards into place, and {made / table.name} is gone. "
                f"Delete {target} and pack it again."
            )
        for file in (made / f"{name}.{suffix}" for suffix in SUFFIXES):
            if file.exists():
                commit(file, target.path / file.name)
    for name in journal["surplus"]:
        for file in (*(f"{name}.{suffix}" for suffix in reversed(SUFFIXES)), scheduler.lost_name(name)):
            target.delete(file)
    return journal


def clear(target: Folder) -> None:
    """Remove what an update leaves. The journal goes last."""
    shutil.rmtree(target.path / STAGING, ignore_errors=True)
    target.delete(JOURNAL)


# ---- how a packing differs from what is asked for ----


@dataclass(frozen=True)
class Listed:
    """What the committed shards `names` of a packing were made from: ids in order, the captions and the duration of those packed."""

    ids: list[str]
    captions: dict[str, tuple[list[dict], float]]


def listed(target: Folder | Bucket, names: Sequence[str]) -> Listed:
    """Read it from the tables. Raises ShardError if one cannot be read."""

    def read(name: str) -> tuple[dict, list[dict]]:
        with target.open(f"{name}.parquet") as file:
            table = pq.read_table(file, columns=["id", "captions", "duration"])
        return table.to_pydict(), json.loads(table.schema.metadata[REJECTS])

    ids, captions = [], {}
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for columns, rejects in pool.map(read, names):
                ids += [*columns["id"], *(r["id"] for r in rejects if "caption" not in r)]
                said = zip(columns["captions"], columns["duration"], strict=True)
                captions |= dict(zip(columns["id"], said, strict=True))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ShardError(
                f"{target} holds a different packing, and a table that cannot be read ({error})"
            ) from error
    return Listed(ids, captions)


def profile_differences(there: dict, asked: dict) -> list[str]:
    """What differs between two profiles, as `Profile.describe` gives them."""
    if there.get("name") != asked["name"]:
        return [f"the profile is {there.get('name')} there, {asked['name']} asked for"]
    names = [name for name in {**asked, **there} if there.get(name) != asked.get(name)]
    return [f"{name} is {there.get(name)} there, {asked.get(name)} asked for" for name in names]


def name_differences(there: dict, asked: dict) -> list[str]:
    """What differs between the names of the data set and of the split in two plans."""
    names = {"name": "the data set", "split": "the split"}
    return [
        f"{what} is {there.get(k)} there, {asked[k]} asked for" for k, what in names.items() if there.get(k) != asked[k]
    ]


def list_differences(found: Listed, items: Sequence[Item], complete: bool) -> list[str]:
    """What differs between the list that a packing was made from, or the committed part of it, and `items`."""
    asked, there = {item.id: item for item in items}, set(found.ids)
    removed = [id for id in found.ids if id not in asked]
    added = [id for id in asked if id not in there] if complete else []
    changed = [id for id, said in found.captions.items() if id in asked and _differ(asked[id], *said)]
    parts = []
    if removed or added:
        counts = [examples(removed, "removed")] * bool(removed) + [examples(added, "added")] * bool(added)
        made = f"it was made from {len(found.ids)}" if complete else f"of it {len(found.ids)} are packed"
        parts.append(f"{videos(len(asked))} asked for, {made} ({'; '.join(counts)})")
    if changed:
        shown = ", ".join(map(repr, changed[:3])) + (", ..." if len(changed) > 3 else "")
        parts.append(f"the captions of {len(changed)} video{'s' * (len(changed) > 1)} differ ({shown})")
    if parts:
        return parts
    if not complete:
        return ["the list of videos is another one, but not in what is packed so far"]
    kept, now = set(found.captions), [item.id for item in items if item.id in found.captions]
    if now != [id for id in found.ids if id in kept]:
        return ["the order of the videos differs"]
    return ["videos and captions are the same; names of files, cuts, meta or rejected videos' captions differ"]


def _differ(item: Item, captions: list[dict], duration: float) -> bool:
    try:
        kept: list[Caption] = screened(item, [])
    except VideoError:
        kept = []
    return [asdict(in_clip(c, item, duration)) for c in kept] != captions


def videos(n: int) -> str:
    return f"{n} video{' is' if n == 1 else 's are'}"


def examples(ids: list[str], what: str) -> str:
    """`2 added: 'a', 'b'`"""
    return f"{len(ids)} {what}: " + ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")

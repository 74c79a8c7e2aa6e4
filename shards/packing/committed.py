"""What the committed shards of a split hold, and whether that is still what a list of videos asks for."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import VideoError
from shards.annotations import Item
from shards.packing.plan import READERS
from shards.packing.rows import in_clip, rejection, screened
from shards.packing.sources import ABSENT, source_size
from shards.schema import REJECTS
from shards.storage import MISSING
from shards.tar import read_index
from shards.tarcopy import Place


@dataclass(frozen=True, slots=True)
class StoredSample:
    """What a stored sample's JSON says: name and size in bytes of its source, its cut and duration in seconds,
    and a digest of its captions and meta."""

    place: Place
    file: str
    size: int
    cut: tuple | None
    duration: float
    digest: bytes


@dataclass(frozen=True)
class CommittedShard:
    """A committed shard: its samples by id, in order, and its rejects."""

    samples: dict[str, StoredSample]
    rejects: list[dict]


def survey(folder: Path, names: Iterable[str]) -> dict[str, CommittedShard]:
    """The committed shards `names` that can be read. Of each sample only the JSON is read."""
    names = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        shards = zip(names, pool.map(lambda name: _shard(folder, name), names), strict=True)
        return {name: shard for name, shard in shards if shard}


def _shard(folder: Path, name: str) -> CommittedShard | None:
    base = folder / name
    try:
        with pq.ParquetFile(base.with_suffix(".parquet")) as file:
            columns = file.read(["key", "id"], use_threads=False).to_pydict()
            schema = file.schema_arrow
        index, samples = read_index(base.with_suffix(".idx")), {}
        with open(base.with_suffix(".tar"), "rb") as file:
            for row, (key, id) in enumerate(zip(columns["key"], columns["id"], strict=True)):
                offset, size = index[f"{key}.json"]
                samples[id] = _sample(Place(name, row), json.loads(os.pread(file.fileno(), size, offset)))
        return CommittedShard(samples, json.loads(schema.metadata[REJECTS]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return None


def _sample(place: Place, described: dict) -> StoredSample:
    source, cut = described["source"], described["cut"]
    digest = _digest(described["captions"], described["meta"])
    return StoredSample(place, source["file"], source["bytes"], cut and tuple(cut), described["duration"], digest)


def _digest(captions: list[dict], meta: dict) -> bytes:
    meta = json.loads(json.dumps(meta, sort_keys=True))
    return hashlib.blake2b(json.dumps([captions, meta], sort_keys=True).encode(), digest_size=16).digest()


def is_of(sample: StoredSample, item: Item) -> bool:
    """Whether the sample was made of the item's file and cut. Where the file is gone its name decides, with or without
    an extension; where it is on a server, its name alone."""
    cut = None if (item.start, item.end) == (None, None) else (item.start, item.end)
    if sample.cut != cut:
        return False
    size = source_size(item.path)
    if size == ABSENT:
        return sample.file == item.path.name or Path(sample.file).stem in (item.path.name, item.path.stem)
    return sample.file == item.path.name and size in (None, sample.size)


def state(items: Sequence[Item], shard: CommittedShard | None, retry: bool) -> tuple[str, dict[int, str]]:
    """What is to be done with a shard that is to hold `items`: nothing ("same"), its table has to be written again
    ("table"), or all of it ("changed"); and, unless that, why which of the items are rejected.

    With `retry` rejected videos are tried again, which makes a shard "changed", unless they are known to be rejected again
    without reading them; without, only those are whose file was missing and now is not.
    """
    if shard is None:
        return "changed", {}
    known = {r["id"]: r for r in shard.rejects if "caption" not in r}
    ids: list[str] = []
    rejects: list[dict] = []
    reasons: dict[int, str] = {}
    for number, item in enumerate(items):
        sample, before = shard.samples.get(item.id), known.get(item.id)
        try:
            captions = screened(item, rejects)
            if sample:
                digest = _digest([asdict(in_clip(c, item, sample.duration)) for c in captions], item.meta)
                if digest != sample.digest or not is_of(sample, item):
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
    return "same" if shard.rejects == rejects else "table", reasons

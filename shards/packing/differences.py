"""How a packing differs from what is asked for, in words."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from shards import ShardError, VideoError, first_few
from shards.annotations import Caption, Item
from shards.packing.plan import READERS, is_committed, shard_name
from shards.packing.rows import in_clip, screened
from shards.schema import REJECTS
from shards.storage import Bucket, Folder
from shards.video.geometry import stored_geometry


def refuse_other(
    target: Folder | Bucket,
    listing: dict[str, int],
    known: dict,
    finished: dict | None,
    plan: dict,
    items: list[Item],
) -> None:
    """Raises ShardError if what is packed in `target`, by the plan `known`, is something else than `plan`, and says what
    differs."""
    if all(known.get(what) == value for what, value in plan.items()):
        return
    other = name_differences(known, plan)
    other += profile_differences(known.get("profile", {}), plan["profile"])
    if other:
        raise ShardError(f"{target} holds a different packing: {'; '.join(other)}. Choose another --out.")
    update = "Run the same command with --update to bring it up to date, or choose another --out."
    if known.get("input", 0) is None:
        raise ShardError(
            f"{target} holds a different packing (input: None there, since a repair had to leave videos out). {update}"
        )
    names = (
        [s["name"] for s in finished["shards"]] if finished else list(map(shard_name, range(known.get("shards", 0))))
    )
    names = [name for name in names if is_committed(listing, name, None)]
    if known.get("input") != plan["input"]:
        complete = len(names) == (len(finished["shards"]) if finished else known.get("shards"))
        other += list_differences(listed(target, names), items, complete)
    elif known.get("shard_videos") != plan["shard_videos"]:
        other.append(f"shard_videos is {known.get('shard_videos')} there, {plan['shard_videos']} asked for")
    elif known.get("format") != plan["format"]:
        other.append(f"its format is {known.get('format')}, this version writes {plan['format']}")
    raise ShardError(f"{target} holds a different packing: {'; '.join(other)}. {update}")


@dataclass(frozen=True)
class Listed:
    """What the committed shards of a packing were made from: ids in order, the captions and the duration of those packed."""

    ids: list[str]
    captions: dict[str, tuple[list[dict], float]]


def listed(target: Folder | Bucket, names: Sequence[str]) -> Listed:
    """Read it from the tables of the shards `names`. Raises ShardError if one cannot be read."""

    def read(name: str) -> tuple[dict, list[dict]]:
        with target.open(f"{name}.parquet") as file:
            table = pq.read_table(file, columns=["id", "captions", "duration"], use_threads=False, pre_buffer=False)
        return table.to_pydict(), json.loads(table.schema.metadata[REJECTS])

    ids: list[str] = []
    captions: dict[str, tuple[list[dict], float]] = {}
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for columns, rejects in pool.map(read, names):
                ids += [*columns["id"], *(r["id"] for r in rejects if "caption" not in r)]
                known = zip(columns["captions"], columns["duration"], strict=True)
                captions |= dict(zip(columns["id"], known, strict=True))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ShardError(
                f"{target} holds a different packing, and a table that cannot be read ({error})"
            ) from error
    return Listed(ids, captions)


def profile_differences(packed: dict, asked: dict) -> list[str]:
    """What differs between two profiles, as `Profile.describe` gives them."""
    if packed.get("name") != asked["name"]:
        return [f"the profile is {packed.get('name')} there, {asked['name']} asked for"]
    names = [name for name in {**asked, **packed} if packed.get(name) != asked.get(name)]
    before, now = stored_geometry(packed), stored_geometry(asked)
    found = []
    if before and now and before.mode != now.mode:
        found = [f"pictures are packed with {before.option} there, {now.option} asked for"]
        names = [name for name in names if name not in (before.key, now.key)]
    return found + [f"{name} is {packed.get(name)} there, {asked.get(name)} asked for" for name in names]


def name_differences(packed: dict, asked: dict) -> list[str]:
    """What differs between the names of the data set and of the split in two plans."""
    names = {"name": "the data set", "split": "the split"}
    return [
        f"{what} is {packed.get(k)} there, {asked[k]} asked for"
        for k, what in names.items()
        if packed.get(k) != asked[k]
    ]


def list_differences(packed: Listed, items: Sequence[Item], complete: bool) -> list[str]:
    """What differs between the list that a packing was made from, or the committed part of it, and `items`."""
    asked, known = {item.id: item for item in items}, set(packed.ids)
    removed = [id for id in packed.ids if id not in asked]
    added = [id for id in asked if id not in known] if complete else []
    changed = [id for id, before in packed.captions.items() if id in asked and _differ(asked[id], *before)]
    parts = []
    if removed or added:
        counts = [_examples(removed, "removed")] * bool(removed) + [_examples(added, "added")] * bool(added)
        made = f"it was made from {len(packed.ids)}" if complete else f"of it {len(packed.ids)} are packed"
        parts.append(f"{_are(len(asked))} asked for, {made} ({'; '.join(counts)})")
    if changed:
        parts.append(
            f"the captions of {len(changed)} video{'s' * (len(changed) > 1)} differ ({first_few(map(repr, changed))})"
        )
    if parts:
        return parts
    if not complete:
        return ["the list of videos is another one, but not in what is packed so far"]
    kept, now = set(packed.captions), [item.id for item in items if item.id in packed.captions]
    if now != [id for id in packed.ids if id in kept]:
        return ["the order of the videos differs"]
    return ["videos and captions are the same; names of files, cuts, meta or rejected videos' captions differ"]


def _differ(item: Item, captions: list[dict], duration: float) -> bool:
    try:
        kept: list[Caption] = screened(item, [])
    except VideoError:
        kept = []
    return [asdict(in_clip(c, item, duration)) for c in kept] != captions


def _are(n: int) -> str:
    return f"{n} video{' is' if n == 1 else 's are'}"


def _examples(ids: list[str], what: str) -> str:
    """`2 added: 'a', 'b'`"""
    return f"{len(ids)} {what}: {first_few(map(repr, ids))}"

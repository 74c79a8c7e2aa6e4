"""ActivityNet Captions: train.json or val_1.json with train_ids.json or val_ids.json; train on it with data.paragraph.

The files are those of the ActivityNet Captions release and of the official CLIP4Clip repository. A video's sentences
stay single, in their order and with their times; `data.paragraph` joins them as the papers do. Videos may be called
with or without the `v_` that the annotations put before a YouTube id.
"""

from argparse import ArgumentParser, Namespace

from shards import ShardError
from shards.annotations import Caption, Counts, Item, Reading, add_annotations, conclude, unique, unknown
from shards.annotations.text import expect, published, read_json, seconds

PUBLISHED = {
    "train.ids": Counts(videos=10_009),
    "val.ids": Counts(videos=4917),
    "train.json": Counts(videos=10_009),
    "val.1.json": Counts(videos=4917),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    add_annotations(parser, "train.json or val_1.json", "train_ids.json or val_ids.json (all of the annotations)")


def read(args: Namespace) -> Reading:
    """Videos in the order of the list, or of the annotations."""
    data = expect(read_json(args.annotations), dict, args.annotations, "an object of videos")
    ids, warnings = list(data), list[str]()
    known: dict[str, str] = {}
    for id in data:
        if known.setdefault(_bare(id), id) != id:
            raise ShardError(f"{args.annotations}: {known[_bare(id)]!r} and {id!r} are one video. Join the two")
    if args.split:
        named = expect(read_json(args.split), list, args.split, "a list of video ids")
        ids, warnings = unique((known.get(_bare(str(id)), str(id)) for id in named), args.split.name)
        warnings += unknown(ids, data, args.split, args.annotations)
    items = []
    for id in ids:
        captions, meta = _captions(data[id], f"{args.annotations}: {id}") if id in data else ((), {})
        items.append(Item(id, args.videos.find(id, _bare(id), f"v_{_bare(id)}"), captions, meta))
    return conclude(items, args.videos, published(PUBLISHED, args.split or args.annotations), warnings)


def _bare(id: str) -> str:
    """The YouTube id, of 11 characters, which may itself begin with `v_`."""
    return id[2:] if id.startswith("v_") and len(id) != 11 else id


def _captions(entry: dict, where: str) -> tuple[tuple[Caption, ...], dict]:
    try:
        pairs = list(zip(entry["sentences"], entry["timestamps"], strict=True))
        captions = tuple(
            Caption(" ".join(text.split()), seconds(start, where), seconds(end, where)) for text, (start, end) in pairs
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{where}: needs as many timestamps [start, end] as sentences ({error})") from error
    return captions, {k: v for k, v in entry.items() if k not in ("sentences", "timestamps")}

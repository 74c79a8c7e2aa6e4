"""Your own folder of videos: captions in a csv or jsonl, or in a .txt or .json beside each video.

csv: header `video,caption`, one row a caption; optional columns `start` and `end`, the caption's seconds in the video.
jsonl: an object a line, `{"video": "a.mp4", "captions": ["one", {"text": "two", "start": 0, "end": 1.5}], "meta": {}}`;
`caption` may stand for a single one, and `"cut": [2.5, 8], "id": "a_1"` packs those seconds of the file under that name.
Beside a.mp4: `a.txt`, one caption a line, or `a.json`, an object as in a jsonl or just its captions.
"""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from shards import ShardError
from shards.datasets import Caption, Item, Reading, conclude
from shards.datasets.annotations import expect, read_csv, read_json, read_lines, seconds
from shards.datasets.files import EXTENSIONS, Files

BESIDE = (".txt", ".json")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--captions", type=Path,
        help="csv with the header video,caption, or jsonl; one row a caption (a .txt or .json beside each video)",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the data set (the output folder's name)")


def read(args: Namespace) -> Reading:
    """Items in the order in which the captions first name them, or in that of their paths."""
    files = args.videos
    if args.captions is None:
        ids = _ids(list(files))
        return conclude([_beside(files, path, ids[path]) for path in files], files)
    if args.captions.suffix.lower() in (".jsonl", ".ndjson"):
        entries = _jsonl(args.captions)
    else:
        entries = _csv(args.captions)
    ids = _ids([name for name, _ in entries])
    items, unclear = [], []
    for (name, id), (captions, meta, cut) in entries.items():
        path = files.find(name, anywhere=False)
        if id is None and name in files.absent and (alike := files.unclear(name)):
            unclear.append(f"{name!r} may be {' or '.join(alike)}: write its extension")
        items.append(Item(id or ids[name], path, tuple(captions), meta, *cut))
    return conclude(items, files, warnings=unclear)


# what is known of one video, or of one cut of it: its captions, meta, and start and end of the cut
_Entry = tuple[list[Caption], dict, tuple[float | None, float | None]]
_Name = tuple[str, str | None]  # the file's, and the item's own, where it has one


def _csv(path: Path) -> dict[_Name, _Entry]:
    entries: dict[_Name, _Entry] = {}
    for row in read_csv(path, ("video", "caption")):
        where = f"{path}, line {row['line']}"
        name = _name(row["video"], where)
        times = [seconds(row.get(column), f"{where}: {column}") for column in ("start", "end")]
        captions, _, _ = entries.setdefault((name, None), ([], {}, (None, None)))
        captions.append(Caption(row["caption"].strip(), *times))
    return entries


def _jsonl(path: Path) -> dict[_Name, _Entry]:
    entries: dict[_Name, _Entry] = {}
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number} with text"
        try:
            data = expect(json.loads(line), dict, where, "an object")
        except json.JSONDecodeError as error:
            raise ShardError(f"{where} is not JSON ({error})") from error
        name = _name(data.get("video"), where)
        id = data.get("id")
        captions, meta, cut = _entry(data, where)
        there = entries.setdefault((name, None if id is None else str(id)), ([], {}, cut))
        if there[2] != cut:
            raise ShardError(f'{where}: another cut of {name!r} needs another name: give each its "id"')
        there[0].extend(captions)
        there[1].update(meta)
    return entries


def _beside(files: Files, path: str, id: str) -> Item:
    """The item of the video at `path` and of the captions beside it; without captions, if there are none."""
    captions: list[Caption] = []
    meta: dict = {}
    cut = (None, None)
    if text := files.beside(path, ".txt"):
        captions += (Caption(line) for line in read_lines(text))
    if told := files.beside(path, ".json"):
        data = read_json(told)
        more, meta, cut = _entry(data if isinstance(data, dict) else {"captions": data}, str(told))
        captions += more
    return Item(id, files.at(path), tuple(captions), meta, *cut)


def _entry(data: dict, where: str) -> _Entry:
    said = data.get("captions", data.get("caption", []))
    said = said if isinstance(said, list) else [said]
    cut = expect(data.get("cut") or [None, None], list, f"{where}: cut", "[start, end] in seconds")
    if len(cut) != 2:
        raise ShardError(f"{where}: cut must be [start, end] in seconds, not {cut}")
    start, end = (seconds(value, f"{where}: cut") for value in cut)
    if start is not None and end is not None and not start < end:
        raise ShardError(f"{where}: cut ends at {end} s, not after its start at {start} s")
    times = {name: data.get(name) for name in ("start", "end")}
    captions = [_caption(one if isinstance(one, dict) else {"text": one, **times}, where) for one in said]
    return captions, expect(data.get("meta", {}), dict, f"{where}: meta", "an object"), (start, end)


def _caption(data: dict, where: str) -> Caption:
    text = expect(data.get("text"), str, f"{where}: caption", "text")
    return Caption(text.strip(), *(seconds(data.get(name), f"{where}: {name}") for name in ("start", "end")))


def _name(value: Any, where: str) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if not name or "\0" in name:
        raise ShardError(f"{where}: the video is not named")
    return name


def _ids(names: list[str]) -> dict[str, str]:
    """A video is called by its name without the extension, unless two videos differ in nothing else."""
    count = Counter(_short(name) for name in set(names))
    return {name: _short(name) if count[_short(name)] == 1 else name for name in names}


def _short(name: str) -> str:
    return str(Path(name).with_suffix("")) if Path(name).suffix.lower() in EXTENSIONS else name

"""Your own folder of videos: captions in a csv or jsonl, or in a .txt or .json beside each video.

csv: header `video,caption`, one row a caption; optional columns `start` and `end`, the caption's seconds in the video.
Semicolons or tabs may separate as well. A text that holds the separator or a line end stands in double quotes.
jsonl: an object a line, `{"video": "a.mp4", "captions": ["one", {"text": "two", "start": 0, "end": 1.5}], "meta": {}}`;
`caption` may stand for a single one, and `"cut": [2.5, 8], "id": "a_1"` packs those seconds of the file under that name.
Beside a.mp4: `a.txt`, one caption a line, or `a.json`, an object as in a jsonl or just its captions.

Rows are joined by the file that they name, however they write it: `a`, `a.mp4` and `./a.mp4` are one video.
"""

from __future__ import annotations

import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from shards import ShardError, count
from shards.annotations import Caption, Item, Reading, conclude, examples
from shards.annotations.files import EXTENSIONS, Files
from shards.annotations.text import (
    DiskError,
    expect,
    numbered_lines,
    parse_json,
    read_csv,
    read_json,
    read_lines,
    seconds,
)

BESIDE = (".txt", ".json")
_CAPTIONS = ("caption", "captions")
_KEYS = (*_CAPTIONS, "video", "id", "cut", "meta", "start", "end")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this kind of data set."""
    parser.add_argument(
        "--captions", type=Path,
        help="csv with the header video,caption, or jsonl; one row a caption (a .txt or .json beside each video)",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the data set (the output folder's name)")


def read(args: Namespace) -> Reading:
    """Items in the order in which the captions first name them, or in that of their paths."""
    files, notes = args.videos, _Notes()
    if args.captions is None:
        previews = files.previews()
        paths = [path for path in files if path not in previews] if previews else list(files)
        ids = _ids(paths)
        items = [_beside(files, path, ids[path], notes) for path in paths]
        if items and not any(item.captions or item.problem for item in items):
            raise ShardError(
                f"not one of {count(len(items), 'video')} under {files.root} has a caption beside it: name a csv or jsonl with "
                f"--captions, or put captions beside the videos, such as {os.path.splitext(paths[0])[0]}.txt"
            )
        skipped = [f"{examples(previews, 'file')} beside a video of the same name not packed"] if previews else []
        return conclude(items, files, warnings=[*skipped, *files.passed_over(), *notes.texts("the .json files")])
    table = _CaptionTable(files)
    if args.captions.suffix.lower() in (".jsonl", ".ndjson"):
        _jsonl(args.captions, table, notes)
    else:
        _csv(args.captions, files, table, notes)
    unclear = {
        f"{entry.name!r} may be {' or '.join(alike)}: write its extension": None
        for entry in table.entries.values()
        if files.lacks(entry.name) and (alike := files.unclear(entry.name))
    }
    unasked = files.unasked()
    left = [f"{examples(unasked, 'video file')} not packed: not in {args.captions.name}"] if unasked else []
    return conclude(table.items(), files, warnings=[*unclear, *notes.texts(args.captions.name), *left])


@dataclass
class _Notes:
    """What stands in captions and is not used, by name."""

    unused: dict[str, None] = field(default_factory=dict)  # keys or columns
    overwritten: dict[str, None] = field(default_factory=dict)  # videos
    long: list[str] = field(default_factory=list)  # rows

    def texts(self, where: str) -> list[str]:
        notes = []
        if self.unused:
            notes.append(f"{examples(list(self.unused), 'name')} in {where} not used")
        if self.overwritten:
            notes.append(
                f"{examples(list(self.overwritten), 'video')} with several values of one meta key: the last is kept"
            )
        if self.long:
            notes.append(
                f"{examples(self.long, 'caption')} in {where} of several lines that look like rows: is a quote not closed?"
            )
        return notes


@dataclass
class _Captioned:
    """What is known of one video, or of one cut of it. `name` is how the captions first write its file's name."""

    name: str
    path: Path
    id: str | None
    cut: tuple[float | None, float | None]
    where: str
    captions: list[Caption] = field(default_factory=list)
    meta: dict = field(default_factory=dict)


class _CaptionTable:
    """The entries by file and id, in the order in which the captions first name them."""

    def __init__(self, files: Files):
        self.entries: dict[tuple[Path, str | None], _Captioned] = {}
        self._files = files
        self._found: dict[str, tuple[str, Path]] = {}  # by the name as it is written: rows repeat it
        self._ids: dict[str, _Captioned] = {}

    def entry(self, written: str, where: str, id: str | None = None, cut: tuple = (None, None)) -> _Captioned:
        """The entry of the file that goes by the name `written`; it is made if there is none."""
        if written not in self._found:
            try:
                name = self._files.name(written)
                self._found[written] = name, self._files.find(written, anywhere=False)
            except ShardError as error:
                raise ShardError(f"{where}: {error}") from error
        name, path = self._found[written]
        entry = self.entries.setdefault((path, id), _Captioned(name, path, id, cut, where))
        if entry.cut != cut and id is None:
            raise ShardError(f'{where}: another cut of {written!r} needs another name: give each its "id"')
        if entry.cut != cut:
            raise ShardError(
                f"{where}: the id {id!r} is already that of another cut of {written!r} ({entry.where}). Give each its own"
            )
        if id is not None and self._ids.setdefault(id, entry) is not entry:
            other = self._ids[id]
            raise ShardError(
                f"{where}: the id {id!r} is already that of {other.name!r} ({other.where}). Give it another"
            )
        return entry

    def items(self) -> list[Item]:
        ids = _ids([entry.name for entry in self.entries.values() if entry.id is None], self._ids)
        return [
            Item(ids[e.name] if e.id is None else e.id, e.path, tuple(e.captions), e.meta, *e.cut)
            for e in self.entries.values()
        ]


def _csv(path: Path, files: Files, table: _CaptionTable, notes: _Notes) -> None:
    known = {"video", "caption", "start", "end", "line", ""}
    for row in read_csv(path, ("video", "caption"), files.holds):
        where = f"{path}, line {row['line']}"
        times = [seconds(row.get(column), f"{where}: {column}") for column in ("start", "end")]
        entry = table.entry(_name(row["video"], where), where)
        entry.captions.append(Caption(row["caption"].strip(), *times))
        if re.search(r"[\r\n]\S+[,;\t]", entry.captions[-1].text):
            notes.long.append(f"line {row['line']}")
        if row.keys() - known:
            notes.unused |= dict.fromkeys(name for name in row if name not in known)


def _jsonl(path: Path, table: _CaptionTable, notes: _Notes) -> None:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            data = expect(parse_json(line), dict, where, "an object")
        except ShardError:
            raise
        except ValueError as error:
            raise ShardError(f"{where} is not JSON ({error})") from error
        name = _name(data.get("video"), where)
        id = data.get("id")
        if id is not None and not isinstance(id, str | int):
            raise ShardError(f"{where}: id must be a text, not {json.dumps(id)[:60]}")
        captions, meta, cut = _entry(data, where, notes)
        entry = table.entry(name, where, None if id in (None, "") else str(id), cut)
        entry.captions.extend(captions)
        if any(key in entry.meta and entry.meta[key] != value for key, value in meta.items()):
            notes.overwritten[entry.name] = None
        entry.meta.update(meta)


def _beside(files: Files, path: str, id: str, notes: _Notes) -> Item:
    """The item of the video at `path` and of the captions beside it; without captions, if there are none. What is wrong
    in them is the item's problem, not that of the others."""
    captions: list[Caption] = []
    meta: dict = {}
    cut: tuple[float | None, float | None] = (None, None)
    problem = ""
    try:
        for text in files.beside(path, ".txt"):
            captions += (Caption(line) for line in read_lines(text))
        for file in files.beside(path, ".json"):
            data = read_json(file)
            data = data if isinstance(data, dict) else {"captions": data}
            more, meta, cut = _entry(data, str(file), notes, ("video", "id"))
            captions += more
    except DiskError:
        raise
    except ShardError as error:
        problem = str(error)
    return Item(id, files.at(path), tuple(captions), meta, *cut, problem)


def _entry(
    data: dict, where: str, notes: _Notes, unused: Iterable[str] = ()
) -> tuple[list[Caption], dict, tuple[float | None, float | None]]:
    """Captions, meta, and start and end of the cut. Keys that are `unused` here, or unknown, are noted."""
    times = {name: data.get(name) for name in ("start", "end")}
    captions = []
    for key, value in data.items():
        if key in _CAPTIONS:
            for one in value if isinstance(value, list) else [value]:
                captions.append(_caption({**times, **one} if isinstance(one, dict) else {"text": one, **times}, where))
                if isinstance(one, dict):
                    notes.unused |= dict.fromkeys(key for key in one if key not in ("text", "start", "end"))
        elif key in unused or key not in _KEYS:
            _refuse_typo(key, where)
            notes.unused[key] = None
    cut = expect(data.get("cut") or [None, None], list, f"{where}: cut", "[start, end] in seconds")
    if len(cut) != 2:
        raise ShardError(f"{where}: cut must be [start, end] in seconds, not {cut}")
    start, end = (seconds(value, f"{where}: cut") for value in cut)
    if start is not None and end is not None and not start < end:
        raise ShardError(f"{where}: cut ends at {end} s, not after its start at {start} s")
    return captions, expect(data.get("meta", {}), dict, f"{where}: meta", "an object"), (start, end)


def _refuse_typo(key: str, where: str) -> None:
    """Raises ShardError if the key is almost that of captions, or a known one but for its letters' size."""
    plain = key.strip().lower()
    for known in _KEYS:
        close = known in _CAPTIONS and SequenceMatcher(None, plain, known).ratio() > 0.85
        if key != known and (plain == known or close):
            raise ShardError(f"{where}: unknown key {key!r}. Did you mean {known!r}?")


def _caption(data: dict, where: str) -> Caption:
    text = expect(data.get("text"), str, f"{where}: caption", "text")
    return Caption(text.strip(), *(seconds(data.get(name), f"{where}: {name}") for name in ("start", "end")))


def _name(value: Any, where: str) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if not name or "\0" in name:
        raise ShardError(f"{where}: the video is not named")
    return name


def _ids(names: list[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """{name: id}. A video is called by its name without the extension, unless another video is called so too; then both
    keep the extension. `taken` are ids that are given already."""
    ids = {name: _short(name) for name in names}
    while twice := {id for id, n in Counter([*ids.values(), *taken]).items() if n > 1}:
        clash = [name for name, id in ids.items() if id in twice and id != name]
        if not clash:
            break  # one that is given is another's whole name: left to `conclude`
        ids |= {name: name for name in clash}
    return ids


def _short(name: str) -> str:
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name

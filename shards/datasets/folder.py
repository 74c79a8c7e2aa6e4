"""Any folder of videos with a csv of captions: header `video,caption`, one row a caption."""

import csv
import math
import os
from collections import Counter
from pathlib import Path

from shards import ShardError
from shards.datasets import Caption, Item

EXTENSIONS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp"}


def read(videos: Path, captions: Path) -> list[Item]:
    """Items in the order in which the csv first names them. A video that is named but not there is still an item:
    packing lists it among the rejects. Optional columns `start` and `end` are seconds.

    Raises ShardError if a file or a column is missing, or a row cannot be what was meant.
    """
    if not videos.is_dir():
        raise ShardError(f"--videos {videos}: there is no such folder")
    if not captions.is_file():
        raise ShardError(f"--captions {captions}: there is no such file")
    try:
        rows = _rows(captions)
    except UnicodeDecodeError as error:
        raise ShardError(f"{captions} is not in UTF-8 ({error}): save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ShardError(f"{captions} is not a csv ({error})") from error
    ids = _ids(list(rows))
    return [Item(ids[name], _find(videos, name), tuple(spoken)) for name, spoken in rows.items()]


def _rows(captions: Path) -> dict[str, list[Caption]]:
    rows: dict[str, list[Caption]] = {}
    with open(captions, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        absent = {"video", "caption"} - set(reader.fieldnames or ())
        if absent:
            raise ShardError(
                f"{captions}: no column {' and '.join(sorted(absent))} in its header {reader.fieldnames}. "
                "The first line must be: video,caption"
            )
        for row in reader:
            where = f"{captions}, line {reader.line_num}"
            if None in row:  # or the caption would be cut at its first comma
                raise ShardError(f"{where}: more cells than the header has. Put a caption with commas in double quotes")
            name = (row["video"] or "").strip()
            if not name or "\0" in name:
                raise ShardError(f"{where}: the video is not named")
            times = [_seconds(row.get(column), f"{where}: {column}") for column in ("start", "end")]
            rows.setdefault(name, []).append(Caption((row["caption"] or "").strip(), *times))
    return rows


def _ids(names: list[str]) -> dict[str, str]:
    """A video is called by its name without the extension, unless two videos differ in nothing else."""
    short = {
        name: str(Path(name).with_suffix("")) if Path(name).suffix.lower() in EXTENSIONS else name for name in names
    }
    count = Counter(short.values())
    return {name: short[name] if count[short[name]] == 1 else name for name in names}


def _seconds(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ShardError(f"{where} is {text!r}, not a number of seconds")
    return seconds


def _find(folder: Path, name: str) -> Path:
    """The file called `name`, with its extension left out or not. Names that lead out of the folder are refused."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"the video name {name!r} leads out of {folder}")
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        stems = [p for p in path.parent.glob(f"{_escape(path.name)}.*") if p.suffix != ".json"]
        if len(stems) == 1:
            return stems[0]
    return path


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

"""Any folder of videos with a csv of captions: header `video,caption`, one row a caption."""

import csv
from collections import Counter
from pathlib import Path

from shards import ShardError
from shards.datasets import Caption, Item

EXTENSIONS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp"}


def read(videos: Path, captions: Path) -> list[Item]:
    """Items in the order in which the csv first names them. A video that is named but not there is still an item:
    packing lists it among the rejects. Optional columns `start` and `end` are seconds.

    Raises ShardError if a file or a column is missing, or a time is no number.
    """
    if not videos.is_dir():
        raise ShardError(f"--videos {videos}: there is no such folder")
    if not captions.is_file():
        raise ShardError(f"--captions {captions}: there is no such file")
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
            if not (row["video"] or "").strip():
                raise ShardError(f"{where}: the video is not named")
            times = [_seconds(row.get(name), f"{where}: {name}") for name in ("start", "end")]
            rows.setdefault(row["video"].strip(), []).append(Caption((row["caption"] or "").strip(), *times))
    ids = _ids(list(rows))
    return [Item(ids[name], _find(videos, name), tuple(spoken)) for name, spoken in rows.items()]


def _ids(names: list[str]) -> dict[str, str]:
    """A video is called by its name without the extension, unless two videos differ in nothing else."""
    short = {name: str(Path(name).with_suffix("")) if Path(name).suffix.lower() in EXTENSIONS else name for name in names}
    count = Counter(short.values())
    return {name: short[name] if count[short[name]] == 1 else name for name in names}


def _seconds(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ShardError(f"{where} is {text!r}, not a number of seconds") from error


def _find(folder: Path, name: str) -> Path:
    """The file called `name`, with its extension left out or not. Names that lead out of the folder are refused."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"the video name {name!r} leads out of {folder}")
    if not path.exists():
        stems = [p for p in path.parent.glob(f"{_escape(path.name)}.*") if p.suffix != ".json"]
        if len(stems) == 1:
            return stems[0]
    return path


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

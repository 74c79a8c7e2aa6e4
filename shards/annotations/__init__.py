"""Readers: each turns the annotation files of one data set into a `Reading`.

A reader is a module here with two functions; to add a data set, add such a file:

    add_arguments(parser)        its options, for `python -m c4c.shard NAME`; the first line of its docstring is the help
    read(args) -> Reading        `args` holds its options, and `args.videos`: the `Files` under --videos

It raises ShardError for annotations that cannot be what the user meant. A video without a file, or without a caption,
still becomes an item, so that packing lists it among the rejects. So does a video whose captions are in a file of its own
that cannot be read: the item's `problem` says why.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING

from shards import ShardError, count, first_few

if TYPE_CHECKING:
    from shards.annotations.files import Files


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence about a video; `start` and `end` are seconds into the file where the source gives them."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One video to pack: its name in the data set, its file (a `Path`, or a `UPath` for s3://, https:// and the like),
    its captions, anything else worth keeping, and the seconds [start, end) of the file to pack, if not all of it. Times of
    captions always count from the file's beginning, also when the item is cut; the packer shifts them. An item with a
    `problem` is rejected for that reason."""

    id: str
    path: Path
    captions: tuple[Caption, ...]
    meta: dict = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Counts:
    """Numbers of videos and captions, in a split as it was published or in the given annotations; None if not known."""

    videos: int | None = None
    captions: int | None = None


@dataclass(frozen=True)
class Reading:
    """What a reader found: the items in the annotations' order, the number of video files under --videos, how many items
    have no file there, the published counts if the split is a known one, and warnings for the user."""

    items: list[Item]
    files: int
    missing: Counts
    published: Counts
    warnings: tuple[str, ...] = ()

    def reconciliation(self) -> dict:
        """The counts as JSON, for `dataset.json`; packing adds what was packed and rejected."""
        return {
            "published": asdict(self.published),
            "annotations": asdict(_count(self.items)),
            "files": self.files,
            "missing": asdict(self.missing),
            "warnings": list(self.warnings),
        }


def conclude(items: list[Item], files: Files, published: Counts | None = None, warnings: Iterable[str] = ()) -> Reading:
    """The reading of these items, with the warnings that any data set may need: counts that differ from the published ones,
    videos without captions, one file under two names. An item with a problem does not count as missing. Raises ShardError
    if two items have one id, if not one item has a file, or if every item has a problem."""
    refuse_duplicates(items)
    absent = {files.root / name for name in files.absent}
    missing = _count([item for item in items if item.path in absent and not item.problem]) if absent else Counts(0, 0)
    lacking = missing.videos or 0
    if items and lacking == len(items):
        raise ShardError(
            f"not one of {count(len(items), 'video')} is among the {count(len(files), 'video file')} under {files.root}: is --videos right? "
            f"Not found, for example: {sorted(files.absent)[0]!r}. {' '.join(files.warnings())}".strip()
        )
    problems = [item.problem for item in items if item.problem]
    if problems and lacking + len(problems) == len(items):
        raise ShardError(f"no video has captions that can be read. First: {problems[0]}")
    notes = [*warnings, *files.warnings()]
    if bare := [item.id for item in items if not item.captions and not item.problem]:
        notes.append(f"{examples(bare, 'video')} without a caption in the annotations")
    if same := _same_file(items, absent):
        notes.append(f"{examples(same, 'video')} with the file of an earlier video: it is packed more than once")
    published = published or Counts()
    for what, given in asdict(_count(items)).items():
        known = getattr(published, what)
        if known not in (None, given):
            notes.append(f"{known} {what} are published for this split, the given annotations hold {given}")
    return Reading(items, len(files), missing, published, tuple(notes))


def refuse_duplicates(items: list[Item]) -> None:
    """Raises ShardError if two items have the same id."""
    if len({item.id for item in items}) == len(items):
        return
    seen: dict[str, Item] = {}
    for item in items:
        if item.id in seen:
            raise ShardError(
                f"two videos share the name {item.id!r}: {seen[item.id].path} and {item.path}. Names must differ; "
                "rename one."
            )
        seen[item.id] = item


def _same_file(items: list[Item], absent: set[Path]) -> list[str]:
    """The ids of items that are the same seconds of the same file as an item before them."""
    seen, same = set(), []
    for item in items:
        file = hash((item.path, item.start, item.end))  # a number takes less memory than the three
        if file in seen and item.path not in absent:
            same.append(item.id)
        seen.add(file)
    return same


def _count(items: list[Item]) -> Counts:
    return Counts(len(items), sum(len(item.captions) for item in items))


def examples(names: list[str], what: str) -> str:
    """`3 videos (a, b, …)`"""
    return f"{count(len(names), what)} ({first_few(map(repr, names), 2)})"


def unique(names: Iterable[str], where: str) -> tuple[list[str], list[str]]:
    """The names of a list, each once, and a note if some are in it more than once."""
    times = Counter(names)
    twice = [name for name, n in times.items() if n > 1]
    return list(times), [f"{examples(twice, 'video')} listed more than once in {where}: packed once"] if twice else []


def unknown(ids: Iterable[str], known: Container[str], listing: Path, annotations: Path) -> list[str]:
    """A note if videos of the file `listing` are not in the annotations."""
    absent = [id for id in ids if id not in known]
    return [f"{examples(absent, 'video')} of {listing.name} not in {annotations.name}"] if absent else []


def add_annotations(parser: ArgumentParser, help: str, split: str = "") -> None:
    """Add --annotations, which has to be given, and --split if there are words for it."""
    parser.add_argument("--annotations", type=Path, required=True, help=help)
    if split:
        parser.add_argument("--split", type=Path, help=split)


def readers() -> dict[str, ModuleType]:
    """{name: module} of every reader in this folder, in alphabetical order."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "add_arguments")}

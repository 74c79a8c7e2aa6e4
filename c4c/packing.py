"""What `python -m c4c.shard` says around a packing: where it may not write, and what came of it."""

from collections.abc import Iterable
from pathlib import Path

from rich.table import Column, Table

from c4c.files import require_folder
from c4c.shard_tools import console, plain
from pipelines.config import DataConfig
from pipelines.lengths import TOKENIZER, Lengths
from shards import ShardError
from shards.annotations import Item
from shards.storage import is_remote
from shards.tools.info import left_out

_RECORDS = ("dataset.json", "packing.json")


def refuse_place(out: Path, videos: str) -> Iterable[str]:
    """What to know of packing the files under `videos` into `out`. Raises ShardError where it would hide other splits, or
    lay shards among the videos."""
    if is_remote(out):
        return
    target, source = out.resolve(), None if "://" in videos else Path(videos).resolve()
    if any((target / name).exists() for name in _RECORDS):  # it was begun
        return
    require_folder(f"--out {out}", out)
    if source and (source == target or target in source.parents):
        where = "is the folder of the videos" if source == target else f"holds the videos ({videos})"
        raise ShardError(f"--out {out} {where}: name another, such as {_beside(out)}")
    inside = sorted({path.parent.name for name in _RECORDS for path in target.glob(f"*/{name}")})
    if inside:
        raise ShardError(
            f"--out {out} holds {'splits' if len(inside) > 1 else 'a split'} ({', '.join(inside[:3])}), and a split of its "
            f"own there would hide {'them' if len(inside) > 1 else 'it'}: name a folder for it, such as {out}/NAME"
        )
    if source and source in target.parents:
        yield f"--out {out} is inside the folder of the videos, {videos}"
    for parent in target.parents:
        if any((parent / name).exists() for name in _RECORDS):
            yield f"--out {out} is inside the split {parent}"


def _beside(out: Path) -> Path:
    return out.resolve().with_name(f"{out.resolve().name}_packed")


def closing(info: dict, out: Path, items: list[Item], reconciled: bool) -> None:
    """What was left out, the table of counts, and how many captions training would cut."""
    if (lost := left_out(info)) != "nothing":
        console.print(f"[yellow]{lost}:[/] see {plain(out / 'rejects.jsonl')}", highlight=False, soft_wrap=True)
    if reconciled and "reconciliation" in info:
        _reconcile(info["reconciliation"])
    found = Lengths(DataConfig.max_words)
    for item in items:
        found.add(caption.text for caption in item.captions)
    if found.cut:
        console.print(
            f"[yellow]note[/] {found.cut} of {found.captions} captions in the annotations {'is' if found.cut == 1 else 'are'} longer than {found.limit} tokens "
            f"({TOKENIZER}, start and end included; the longest has {found.longest}): training cuts them unless data.max_words "
            "is higher",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _reconcile(counts: dict) -> None:
    """What was published, what was given, and what became of it."""
    columns = ("published", "annotations", "missing", "rejected", "packed")
    table = Table(
        "", *(Column(name, justify="right") for name in columns), title=f"{counts['files']} video files found"
    )
    for what in ("videos", "captions"):
        cells = (counts[name][what] for name in columns)
        table.add_row(what, *("" if cell is None else str(cell) for cell in cells))
    console.print(table)
    for what, known in counts["published"].items():
        if known not in (None, counts["packed"][what]):
            console.print(f"[yellow]note[/] {known} {what} are published, {counts['packed'][what]} were packed")

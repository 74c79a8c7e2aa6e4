"""What `python -m c4c.shard` prints around a packing: where it may not write, how far it is, and what came of it."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.table import Column, Table

from c4c import shard_console
from c4c.files import require_folder
from c4c.retrieval.search.query import other_scripts
from c4c.shard_console import bar, say
from pipelines.lengths import TOKENIZER, USUAL, Lengths
from shards import ShardError, count, first_few
from shards.annotations import Item
from shards.packing.worker import Progress
from shards.storage import is_remote
from shards.tools.info import left_out

_LINES_SHOWN = 5  # rejects and notes on the screen; a list with missing files may have thousands
_RECORDS = ("dataset.json", "packing.json")


def refuse_place(out: Path, videos: str) -> Iterable[str]:
    """Notes about packing the files under `videos` into `out`. Raises ShardError where that would hide other splits, or
    put shards among the videos."""
    if is_remote(out):
        return
    target, source = out.resolve(), None if "://" in videos else Path(videos).resolve()
    if any((target / name).exists() for name in _RECORDS):  # it was begun
        return
    require_folder(f"--out {out}", out)
    if source and (source == target or target in source.parents):
        where = "is the folder of the videos" if source == target else f"holds the videos ({videos})"
        raise ShardError(f"--out {out} {where}: choose another, such as {_beside(out)}")
    inside = sorted({path.parent.name for name in _RECORDS for path in target.glob(f"*/{name}")})
    if inside:
        raise ShardError(
            f"--out {out} holds {'splits' if len(inside) > 1 else 'a split'} ({', '.join(inside[:3])}), and a split of its "
            f"own there would hide {'them' if len(inside) > 1 else 'it'}: choose a folder for it, such as {out}/NAME"
        )
    if source and source in target.parents:
        yield f"--out {out} is inside the folder of the videos, {videos}"
    for parent in target.parents:
        if any((parent / name).exists() for name in _RECORDS):
            yield f"--out {out} is inside the split {parent}"


def _beside(out: Path) -> Path:
    return out.resolve().with_name(f"{out.resolve().name}_packed")


class PackingScreen:
    """A progress bar of `total` videos, with the first rejects and notes above it. Use it as a context manager."""

    def __init__(self, name: str, total: int):
        self._progress = bar()
        self._task = self._progress.add_task(name, total=total, note="")
        self._began, self._done, self._read, self._rejects, self._notes = time.monotonic(), 0, 0, 0, 0
        self._odd_times: dict[str, int] = {"captions": 0, "videos": 0, "cuts": 0}
        self.resumed = 0  # videos that earlier runs have dealt with
        self.stored = 0  # videos that were copied from existing shards

    def __enter__(self) -> "PackingScreen":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def start(self, done: int, total: int) -> None:
        """The packing begins; earlier runs have dealt with `done` videos."""
        self.resumed = done
        self._progress.reset(self._task, completed=done, total=total)  # or what was done before would flatter the ETA

    def advance(self, event: Progress) -> None:
        """A video is done."""
        self._done += 1
        self._read += event.bytes
        self.stored += event.stored
        if event.rejected:
            self._rejects += 1
            if self._rejects <= _LINES_SHOWN:
                say(event.rejected, "missing" if event.missing else "rejected")
        self._odd_times["captions"] += event.odd_times
        self._odd_times["videos"] += event.odd_times > 0
        self._odd_times["cuts"] += event.cut_short
        if event.note:
            self._notes += 1
            if self._notes <= _LINES_SHOWN:
                say(event.note, "note")
        seconds = max(1e-9, time.monotonic() - self._began)
        speed = f"{_rate(self._done / seconds)} videos/s {_rate(self._read / 1e6 / seconds)} MB/s"
        self._progress.update(self._task, advance=1, note=f"{speed} {count(self._rejects, 'reject')}")

    def summarise(self, listing: Path | None) -> None:
        """Print what was too much to show one by one; `listing`: the file with all rejects, if it is written."""
        if self._rejects > _LINES_SHOWN:
            say(f"{self._rejects - _LINES_SHOWN} more" + (f": see {listing}" if listing else ""), "and")
        if self._notes:
            say(
                f"{count(self._notes, 'video')} of variable frame rate: frames are sampled by time, not by counting frames as "
                "the official code does (data.sampling=uniform_by_frame counts)",
                "note",
            )
        if odd := self._odd_times["captions"]:
            say(
                f"{count(odd, 'caption')} of {count(self._odd_times['videos'], 'video')} "
                f"{'has' if odd == 1 else 'have'} times outside their video, or end before they start: are the times in "
                "seconds? They are packed as they are",
                "note",
            )
        if cuts := self._odd_times["cuts"]:
            say(f"{count(cuts, 'cut')} packed shorter than asked for, as the file ends before", "note")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def closing(info: dict, out: Path, items: list[Item], reconciled: bool) -> None:
    """What was left out, the table of counts, and how many captions training would cut."""
    if (lost := left_out(info)) != "nothing":
        say(f"see {out / 'rejects.jsonl'}", f"{lost}:")
    if reconciled and "reconciliation" in info:
        _reconcile(info["reconciliation"])
    lengths, repeated, scripts, foreign = Lengths(USUAL), 0, Counter[str](), 0
    for item in items:
        texts = [caption.text for caption in item.captions]
        lengths.add(texts)
        repeated += len(texts) - len(set(texts))
        for found in (other_scripts(text) for text in texts if not text.isascii()):
            scripts.update(found)
            foreign += bool(found)
    if lengths.cut:
        say(
            f"{lengths.cut} of {lengths.captions} captions in the annotations {'is' if lengths.cut == 1 else 'are'} longer than "
            f"{lengths.limit} tokens ({TOKENIZER}, start and end included; the longest has {lengths.longest}): they are "
            f"cut with data.max_words={lengths.limit}, and by backbones that take no more",
            "note",
        )
    if repeated:
        say(f"{count(repeated, 'caption')} repeated word for word in one video (data.drop_duplicate_captions)", "note")
    if foreign:
        say(
            f"{count(foreign, 'caption')} in {first_few([name for name, _ in scripts.most_common()])} letters, on which CLIP's text "
            "tower was not trained: train a multilingual backbone on them",
            "note",
        )


def _reconcile(counts: dict) -> None:
    """What was published, what was given, and what became of it."""
    columns = ("published", "annotations", "missing", "rejected", "packed")
    table = Table(
        "", *(Column(name, justify="right") for name in columns), title=f"{counts['files']} video files found"
    )
    for what in ("videos", "captions"):
        cells = (counts[name][what] for name in columns)
        table.add_row(what, *("" if cell is None else str(cell) for cell in cells))
    shard_console.console.print(table)
    for what, known in counts["published"].items():
        if known not in (None, counts["packed"][what]):
            say(f"{known} {what} are published, {counts['packed'][what]} were packed", "note")

"""What a person sees of an indexing: a bar on a terminal, a line every few seconds elsewhere, and what came of it."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from c4c.retrieval.index.build import IndexCounts
from c4c.retrieval.search.show import plain
from c4c.training.screen import span
from shards import count

_LINE_EVERY_S = 5.0
_NAMED = 20  # of unreadable and vanished videos each; --json has all


class IndexReport:
    """How far an indexing is. Does nothing where `on` is false. of: words on which share this is, of several ranks."""

    def __init__(self, on: bool, total: int, of: str = ""):
        self._console = Console(stderr=True, soft_wrap=True, quiet=not on)
        self._total, self._of = total, of
        self._live = on and sys.stderr.isatty()
        self._bars = Progress(
            TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[after]}"),
            console=self._console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._bars.add_task("", total=total, after="")
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> "IndexReport":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def tell(self, counts: IndexCounts) -> None:
        """A video more is through."""
        now = time.monotonic()
        seconds, hours = max(now - self._began, 1e-9), counts.video_s / 3600
        eta = seconds / max(1, counts.done) * (self._total - counts.done)
        pace = f"{counts.segments} segments, {hours:.2f} h of video, {counts.video_s / seconds:.1f} s of video/s, ETA {span(eta)}"
        self._bars.update(self._task, completed=counts.done, after=pace)
        if not self._live and now - self._last_line > _LINE_EVERY_S:
            self._last_line = now
            bad = f", {len(counts.failures)} unreadable" if counts.failures else ""
            self.say(f"{counts.done} of {self._total} videos{self._of}{bad}, {pace}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False)


def summary(result: dict) -> list[str]:
    """The lines that tell of a finished indexing."""
    hours, seconds = result["hours"], result["seconds"]
    lines = [
        f"{result['index']}: {count(result['index_videos'], 'video')}, {count(result['index_segments'], 'segment')}",
        f"indexed     {count(result['videos'], 'video')} ({hours:.2f} h) in {span(seconds)}, {result['unchanged']} unchanged",
        f"runtime     {result['runtime']} on {result['device']}",
    ]
    if (loss := result["agreement"]) is not None:
        lines.append(f"            {100 * loss:.1f} % of each frame's nearest 10 are those by torch in fp32")
    lines += _named("unreadable", [f"{row['path']}: {row['reason']}" for row in result["unreadable"]])
    verb = "removed" if result["pruned"] else "not there any more; --prune removes them from the index"
    lines += _named("vanished", result["vanished"], verb)
    return lines


def _named(what: str, rows: Sequence[str], more: str = "") -> list[str]:
    if not rows:
        return []
    left = [f"    … and {len(rows) - _NAMED} more; --json FILE lists all"] if len(rows) > _NAMED else []
    head = f"{what:11} {count(len(rows), 'video')}" + (f", {more}" if more else "")
    return [head, *(f"    {plain(row)}" for row in rows[:_NAMED]), *left]

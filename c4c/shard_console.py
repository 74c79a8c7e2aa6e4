"""What the commands of `python -m c4c.shard` print on the screen: lines, tables and progress bars, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from shards import count

console = Console(stderr=True)


def plain(text: object) -> str:
    """`text` for rich, its brackets no markup."""
    return str(text).replace("[", r"\[")


def say(text: str, kind: str = "", colour: str = "yellow") -> None:
    """Print a line; `kind` (note, error, ...) stands before it in colour."""
    start = f"[{colour}]{kind}[/] " if kind else ""
    console.print(start + plain(text), highlight=False, soft_wrap=True)


def size(info: dict) -> str:
    """Videos and captions of a split, as `dataset.json` has them."""
    return f"{count(info['videos'], 'video')}, {count(info['captions'], 'caption')}"


def bar() -> Progress:
    """A progress bar that fits in a line of 80 columns; the bar takes what the words leave."""
    name = Column(max_width=16, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=name), BarColumn(None, table_column=Column(ratio=1, max_width=40)),
        MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TextColumn("ETA"), TimeRemainingColumn(compact=True),
        console=console, expand=True,
    )  # fmt: skip


@contextmanager
def task(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with bar() as progress:
        yield partial(show, progress, progress.add_task(plain(name), total=None, note=unit))


def show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    """Set how much of a task is done."""
    progress.update(task, completed=done, total=total)

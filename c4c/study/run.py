"""Running a study: what is missing, in an order in which a cell's source comes first; and what is said of it meanwhile."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from c4c.files import read_json_object
from c4c.study import processes
from c4c.study.attempts import last_error
from c4c.study.cells import Cell, cells_of, in_order
from c4c.study.config import Study
from c4c.study.executors import Executor, Handle, RunningElsewhere
from c4c.study.jobs import LOG, StopRequest, is_running, note_failure
from c4c.study.lock import FolderLock
from c4c.study.outcomes import measured
from c4c.study.words import sentence
from c4c.training.run_folder import scores
from shards import count

_WRITE_S = 20.0  # between two rewritings of the outputs, at least
_POLL_S = 0.1
_NAMED = 8  # of many folders


@dataclass
class _AtWork:
    handle: Handle
    began: float


@dataclass
class StudyProgress:
    """What became of the cells that were asked for. failed: why, by the cell's name. damaged: of cells that are done, why their result
    cannot be read. unwritten: why the outputs could not be written, '' if they were."""

    done: int = 0
    total: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unwritten: str = ""

    def __str__(self) -> str:
        more = [f"{len(self.failed)} failed"] if self.failed else []
        more += [f"{len(self.blocked)} not run because of that"] if self.blocked else []
        more += [f"{len(self.damaged)} with a damaged result"] if self.damaged else []
        return f"{self.done} of {count(self.total, 'cell')} done{''.join(f', {text}' for text in more)}"


def run(
    study: Study, executor: Executor, say: Callable[[str], None], *, only: Sequence[str] = (), stop: StopRequest | None = None,
    write: Callable[[Study], None] | None = None,
) -> StudyProgress:  # fmt: skip
    """Run the cells that have no result, of all tables or of those named `only`, and write the outputs. A cell that fails stops no
    other one. Raises ValueError if another study is at work in its folder, and OSError.

    stop: set by a signal: cells are stopped where the executor can, and no more are started.
    """
    lock = lock_of(study)
    try:
        for folder in processes.end(inside=(study.out / "cells").resolve()):
            say(f"stopped {folder.name}, which was still running after the study was killed; it will be continued")
        return _Run(study, executor, say, only, stop or StopRequest(), write or write_outputs).run()
    finally:
        lock.release()


def lock_of(study: Study) -> FolderLock:
    """The study's folder, made and taken. Raises ValueError if another process has it, and OSError."""
    try:
        (study.out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {sentence(error)}") from error
    lock = FolderLock(study.out / ".study.lock")
    if not lock.take():
        raise ValueError(
            f"{study.out} is in use: {lock.holder()} is running a study in it. Wait until it ends, stop it, or choose another --out"
        )
    return lock


def write_outputs(study: Study) -> None:
    """Write study.html, study.csv and study.md from what the cells hold now. Raises OSError."""
    from c4c.study.collect import collect
    from c4c.study.page import write_page
    from c4c.study.tables import write_csv, write_markdown

    result = collect(study)
    write_csv(study.out / "study.csv", result)
    write_markdown(study.out / "study.md", result)
    write_page(study.out / "study.html", result)


def chosen(study: Study, only: Sequence[str]) -> tuple[list[Cell], dict[str, list[str]]]:
    """The cells of all tables, or of some, in order; and by a cell's name, the rows that show it, as `table: row`."""
    cells = cells_of(study)
    own = {key: cell for key, cell in cells.items() if not only or key[0] in only}
    rows: dict[str, list[str]] = {}
    for (table, row, _), cell in own.items():
        shown = rows.setdefault(cell.name, [])
        if f"{table}: {row}" not in shown:
            shown.append(f"{table}: {row}")
    return in_order(own), rows


def not_asked_for(study: Study) -> list[str]:
    """Names of the folders of cells that the study does not ask for any more."""
    known = {cell.name for cell in in_order(cells_of(study))}
    folder = study.out / "cells"
    return (
        sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in known)
        if folder.is_dir()
        else []
    )


def r1_of(cell: Cell) -> float | None:
    """Text-to-video R@1 of a cell that is done, per cent; None if it cannot be read."""
    try:
        if cell.recipe.kind == "train":
            found = scores(cell.folder)
            return found[max(found)]
        return float(read_json_object(cell.folder / "eval.json")["t2v"]["R1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage_of(cell: Cell) -> str:
    """Why the result of a cell that is done cannot be read; '' if it can, or the cell is not done."""
    if not cell.is_done():
        return ""
    try:
        measured(cell.folder, cell.recipe.kind == "train")
    except (OSError, ValueError) as error:
        return sentence(error)
    return ""


class _Run:
    """One start of a study."""

    def __init__(
        self, study: Study, executor: Executor, say: Callable[[str], None], only: Sequence[str], stop: StopRequest,
        write: Callable[[Study], None],
    ):  # fmt: skip
        self._study, self._executor, self._say, self._stop, self._write = study, executor, say, stop, write
        self._cells, self._rows = chosen(study, only)
        cells = self._cells
        self._waiting = [cell for cell in cells if not cell.is_done()]
        self._at_work: dict[Cell, _AtWork] = {}
        self._progress = StudyProgress(len(cells) - len(self._waiting), len(cells))
        self._seconds: dict[str, list[float]] = {"train": [], "evaluate": []}  # of the cells that ended
        self._writer = ThreadPoolExecutor(1, "c4c-outputs")  # beside the cells: with many it takes seconds
        self._writing: Future | None = None
        self._written = float("-inf")
        self._stopping: tuple = ()

    def run(self) -> StudyProgress:
        if self._waiting:
            self._say(f"{self._progress}, {len(self._waiting)} to run")
        if left := not_asked_for(self._study):
            names = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
            self._say(f"left as they are, since the study does not ask for them: {names}")
        try:
            while self._waiting or self._at_work:
                if self._stop.by and self._stopped():
                    break
                self._start()
                if self._collect():
                    self._write_at_times()
                else:
                    time.sleep(_POLL_S)
        finally:
            self._writer.submit(self._write_now).result()
            self._writer.shutdown()
        self._progress.damaged = {cell.name: reason for cell in self._cells if (reason := damage_of(cell))}
        return self._progress

    def _stopped(self) -> bool:
        """Pass a stop on; whether nothing is left to wait for."""
        if (now := (self._stop.by, self._stop.at_once)) != self._stopping:
            self._stopping = now
            self._executor.stop(self._stop)
            if self._at_work:
                what = "being killed" if self._stop.at_once else "being stopped; a second signal kills them at once"
                if not self._executor.stops:
                    what = "left running; the same command waits for them again"
                self._say(f"{count(len(self._at_work), 'cell')} at work: {what}")
        own = [one for one in self._at_work.values() if not isinstance(one.handle, RunningElsewhere)]
        return not self._executor.stops or not own

    def _start(self) -> None:
        """Start what can be started, in order."""
        for cell in list(self._waiting) if not self._stop.by else ():
            needs = cell.needs
            if needs and needs.name in (*self._progress.failed, *self._progress.blocked):
                self._waiting.remove(cell)
                self._progress.blocked[cell.name] = needs.name
                self._say(f"not run: {self._named(cell)} needs {needs.name}, which failed")
            elif self._executor.places and len(self._at_work) >= self._executor.places:
                return
            elif needs is None or needs.is_done():
                self._waiting.remove(cell)
                self._at_work[cell] = _AtWork(self._handle(cell), time.monotonic())

    def _handle(self, cell: Cell) -> Handle:
        # a cluster's job, of an earlier start; what a killed process of this machine left running is ended by the new job
        if is_running(cell.folder) and not processes.runner_is_gone(cell.folder):
            self._say(f"waiting for {self._named(cell)}, which is running already")
            return RunningElsewhere(cell.job)
        self._say(f"{'continuing' if (cell.folder / LOG).exists() else 'starting'} {self._named(cell)}")
        try:
            return self._executor.submit(cell.job)
        except (OSError, ValueError) as error:
            return _NotStarted(error)

    def _collect(self) -> bool:
        """Take note of the cells that ended; whether there were any."""
        ended = [cell for cell, one in self._at_work.items() if one.handle.done()]
        for cell in ended:
            one = self._at_work.pop(cell)
            error = self._error(cell, one.handle)
            seconds = time.monotonic() - one.began
            if error is None:
                self._progress.done += 1
                self._seconds[cell.recipe.kind].append(seconds)
                r1 = r1_of(cell)
                score = f"t2v R@1 {r1:.1f}, " if r1 is not None else ""
                self._say(f"done {self._named(cell)}: {score}{_duration(seconds)}; {self._left()}")
            elif self._stop.by:
                self._say(f"stopped {self._named(cell)}")
            elif isinstance(one.handle, RunningElsewhere):
                self._waiting.insert(0, cell)  # it ended without a result, for whatever reason: now it is this study's
            else:
                self._progress.failed[cell.name] = error
                self._say(f"failed {self._named(cell)}: {error}; {self._left()}")
        return bool(ended)

    def _error(self, cell: Cell, handle: Handle) -> str | None:
        """Why a cell that has ended has no result; None if it has."""
        try:
            code = handle.result()
        except (OSError, ValueError) as error:
            return sentence(error)
        with suppress(OSError):
            os.listdir(cell.folder)  # a network file system looks again then
        if cell.is_done():
            return None
        if code == 0 and (problem := cell.problem()) and not self._stop.by:
            note_failure(cell.folder, problem)
            return problem
        try:
            said = last_error(cell.folder, code)
        except OSError as error:
            said = f"its log cannot be read: {sentence(error)}"
        return said if code else f"it was stopped before its end ({said})"

    def _named(self, cell: Cell) -> str:
        rows = self._rows.get(cell.name, [])
        shown = f" ({rows[0]}{f' and {len(rows) - 1} more' if len(rows) > 1 else ''})" if rows else ""
        return f"{cell.name}{shown}"

    def _left(self) -> str:
        """How far the study is, and how long the rest takes if cells take as long as those of their kind that ended."""
        left = [cell.recipe.kind for cell in (*self._waiting, *self._at_work)]
        done = f"{self._progress.done}/{self._progress.total} done"
        known = {kind: sum(s) / len(s) for kind, s in self._seconds.items() if s}
        if not left or not known:
            return done
        usual = sum(known.values()) / len(known)
        at_once = max(1, min(len(left), self._executor.places or len(self._at_work)))
        seconds = sum(known.get(kind, usual) for kind in left) / at_once
        return f"{done}, {len(left)} left, about {_duration(seconds)}"

    def _write_at_times(self) -> None:
        if (self._writing is None or self._writing.done()) and time.monotonic() - self._written >= _WRITE_S:
            self._writing = self._writer.submit(self._write_now)

    def _write_now(self) -> None:
        self._progress.unwritten = ""
        try:
            self._write(self._study)
        except (OSError, ValueError) as error:  # a full disk, say: cells are worth more
            self._progress.unwritten = sentence(error)
            self._say(f"warning: the outputs could not be written: {sentence(error)}")
        self._written = time.monotonic()


class _NotStarted:
    """A cell that the executor did not take, as a `Handle`."""

    def __init__(self, error: Exception):
        self._error = error

    def done(self) -> bool:
        return True

    def result(self) -> int:
        raise OSError(sentence(self._error)) from self._error


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"

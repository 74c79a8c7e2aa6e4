"""`python -m c4c.study --cfg study_demo.yaml`: run the trainings and evaluations of a study, and write its tables and its page.

Started again, it runs what is missing: what failed, too.
"""

import argparse
import difflib
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from c4c.errors import Stopped, exit_code
from c4c.launched import let_threads_sleep, seen_enough
from c4c.option_checks import require_not_empty

if TYPE_CHECKING:
    from c4c.study.config import Study
    from c4c.study.jobs import StopRequest
    from c4c.study.run import StudyProgress


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    return exit_code(lambda: command(_parser().parse_intermixed_args()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c4c.study", description="Run a study: a grid of trainings over seeds, as a yaml file lists them, and write "
        "its results as a page, a CSV file and a Markdown table.", allow_abbrev=False,
        epilog="Stopped or killed at any moment, the same command goes on. Exit codes: 0: all cells that were asked for are done; 1: a mistake, "
        "or a cell failed; 130 or 143: stopped. docs/study.md explains the file.",
    )  # fmt: skip
    add = parser.add_argument
    add("--cfg", required=True, help="the study: a yaml file, or the name of one in launch/cfg")
    add("--on", default="local", metavar="WHERE", help="local (default), slurm, or dask:ADDRESS of a scheduler")
    add("--jobs", type=int, metavar="N", help="cells at once (default: the file's; on a cluster: no limit)")
    add("--seeds", nargs="+", action="extend", metavar="SEED", help="instead of the file's")
    add("--only", nargs="+", action="extend", metavar="TABLE", help="run the cells of these tables only")
    add("--out", metavar="DIR", help="instead of the file's")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--plan", action="store_true", help="print the cells and their commands, and run nothing")
    instead("--page", action="store_true", help="write the outputs, of all tables, from what is there, and run nothing")
    add("overrides", nargs="*", metavar="key=value", help="settings of all trainings and evaluations")
    return parser


def command(args: argparse.Namespace) -> int:
    """Run, plan or show a study. Mistakes are found first. Raises ValueError and OSError."""
    from c4c.files import require_folder
    from c4c.study.config import require_splits
    from c4c.study.entries import MOST
    from c4c.study.executors import executor_of
    from c4c.study.jobs import StopRequest, require_launcher
    from c4c.study.reading import read_study
    from c4c.study.run import run, write_outputs

    if args.jobs is not None and not 1 <= args.jobs <= MOST:
        raise ValueError(f"--jobs {args.jobs}: must be from 1 to {MOST}")
    require_not_empty((name, getattr(args, name)) for name in ("cfg", "out", "on"))
    only, seeds, words = _taken(args)
    study = read_study(Path(args.cfg), words, Path(args.out) if args.out else None, seeds, args.jobs or 0)
    _require_tables(study, only)
    require_folder(f"out: {study.out}", study.out)
    if args.page:
        if only:
            print("note: --only chooses what runs; the page shows all tables", file=sys.stderr)
        study.out.mkdir(parents=True, exist_ok=True)
        write_outputs(study)
        print(study.out / "study.html")
        return 0
    make = executor_of(args.on, study, args.jobs or 0)
    try:
        require_splits(study, only)
        require_launcher(study.launcher, study.gpus_per_cell)
    except ValueError as error:
        if not args.plan:
            raise
        print(f"note: {error}", file=sys.stderr)
    if args.plan:
        _print_plan(study, only)
        return 0
    say, executor, stop = _console(), make(), StopRequest()
    _heed_signals(stop)
    try:
        progress = run(study, executor, say, only=only, stop=stop)
    except BaseException:
        stop.by = stop.by or signal.SIGTERM
        executor.stop(stop)
        raise
    finally:
        executor.close()
    return _closing(study, progress, stop, say)


def _taken(args: argparse.Namespace) -> tuple[list[str], list[int], list[str]]:
    """Tables, seeds and key=value words: an option that takes several words takes settings behind them, too. Raises ValueError."""
    words = list(args.overrides)
    own: dict[str, list[str]] = {}
    for option, given in (("--only", args.only), ("--seeds", args.seeds)):
        own[option] = [word for word in given or () if "=" not in word]
        words += [word for word in given or () if "=" in word]
        if given and not own[option]:
            raise ValueError(
                f"{option} {given[0]}: it names none: put settings before {option}, or behind what it names"
            )
    if wrong := [seed for seed in own["--seeds"] if not (seed.isascii() and seed.isdecimal())]:
        raise ValueError(f"--seeds {wrong[0]}: seeds are whole numbers, at least 0")
    return own["--only"], [int(seed) for seed in own["--seeds"]], words


def _require_tables(study: "Study", only: list[str]) -> None:
    names = [table.name for table in study.tables]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the study has {', '.join(names)}"
            raise ValueError(f"--only {name}: no table has this name: {hint}")


def _print_plan(study: "Study", only: list[str]) -> None:
    from c4c.study.jobs import is_running
    from c4c.study.run import chosen, not_asked_for
    from shards import count

    cells, rows = chosen(study, only)
    done = {cell.name for cell in cells if cell.is_done()}
    shared = sum(len(shown) > 1 for shown in rows.values())
    with seen_enough():
        print(f"{count(len(cells), 'cell')}, {len(done)} done, {shared} in several rows; {study.out}")
        for cell in cells:
            problem = cell.problem()
            state = "done" if cell.name in done else "running" if is_running(cell.folder) else "to run"
            print(f"\n{cell.name}: {'not usable: ' + problem if problem else state}")
            print(f"    {'; '.join(rows.get(cell.name, [])) or 'what others start from'}")
            for command in cell.commands:
                print(f"    {shlex.join(command)}")
        for name in not_asked_for(study):
            print(f"\n{name}: not asked for any more")


def _console() -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    return lambda text: console.print(text, highlight=False, markup=False)


def _heed_signals(stop: "StopRequest") -> None:
    """The first signal asks cells to save and stop, a second one ends them at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def note(number: int, _frame: object) -> None:
        stop.at_once = stop.by is not None
        stop.by = stop.by or signal.Signals(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, note)


def _closing(study: "Study", progress: "StudyProgress", stop: "StopRequest", say: Callable[[str], None]) -> int:
    """The last lines; the exit code. Raises Stopped."""
    for name, error in progress.failed.items():
        say(f"failed: {name}: {error}")
    if stop.by is not None and progress.done < progress.total:
        again = shlex.join(["python", "-m", "c4c.study", *sys.argv[1:]])
        raise Stopped(stop.by, f": {progress}. The same command goes on\n    {again}")
    for name, error in progress.damaged.items():
        say(
            f"damaged: {name}: {error}. Put the file back; or delete {study.out / 'cells' / name}, and the same command runs it again"
        )
    say(f"{progress}: {progress.unwritten or study.out / 'study.html'}")
    return 1 if progress.failed or progress.damaged or progress.unwritten else 0


if __name__ == "__main__":
    sys.exit(main())

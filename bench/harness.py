"""What the benchmarks share: options, taking turns, clocks, the machine and versions, tables and JSON.

A benchmark measures the project that PYTHONPATH names, else the one that it is part of: so one script compares two commits.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"

# ---- options ----


def parser(doc: str, name: str | None, *, repeats: int = 0, parts: Sequence[str] = (), only: bool = False):
    """An ArgumentParser with `--json`, by default the result that is kept as `name`, and what else is asked for.

    repeats: the default of `--repeats`. parts: what `--only` chooses from; only: it takes pieces of names instead.
    """
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = RESULTS / f"{name}.json" if name else None
    out.add_argument("--json", type=Path, default=default, help=f"write the results here (default: {_said(default)})")
    if repeats:
        out.add_argument("--repeats", type=int, default=repeats, help="rounds (default: %(default)s)")
    if parts:
        out.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts))
    elif only:
        out.add_argument(
            "--only",
            nargs="+",
            default=[],
            metavar="PART",
            help="rows whose names hold one of these; they do not replace the kept result of all",
        )
    return out


def _said(path: Path | None) -> str:
    return "nowhere" if path is None else str(path.relative_to(ROOT))


def result_path(path: Path, name: str, only: Sequence[str]) -> Path | None:
    """Where a result goes: nowhere if `--only` chose some rows and `path` is RESULTS / `name`, the kept result of all."""
    return None if only and path.resolve() == (RESULTS / name).resolve() else path


def is_chosen(only: Sequence[str], name: str) -> bool:
    """Whether `--only`'s pieces of names choose a row; none choose all."""
    return not only or any(part in name for part in only)


# ---- measuring ----


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int = 1) -> dict[str, list]:
    """{name: what it returned in each round}. Each way has its turn in each round, so that what else the machine does in the
    meantime falls on all alike."""
    found: dict[str, list] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


class Stopwatch:
    """Seconds on the clock and of processor time since it was made. children: also of processes that have ended."""

    def __init__(self, children: bool = False):
        self._children = children
        self._clock, self._cpu = time.perf_counter(), self._used()

    def _used(self) -> float:
        return sum(os.times()[:4]) if self._children else time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._clock, self._used() - self._cpu


def environment(**more: str) -> dict[str, str]:
    """For a process that imports this project, or the one that PYTHONPATH names; torch's threads wait as in launch/train.py."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": path} | more


def answer(script: str, *words: object) -> Any:
    """The JSON in the last line that a script prints, in a process of its own."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return json.loads(done.stdout.splitlines()[-1])


# ---- telling ----


def machine() -> dict:
    """Cores, processor and load now."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpus": os.cpu_count(), "cpu": name, "load": os.getloadavg()[0]}


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and of these packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def save(path: Path | None, report: dict | list) -> None:
    """Write a report as JSON, all of it or nothing; None: nowhere."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(path)


def show(
    heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, width: int | None = None
) -> None:
    """Print a table, no narrower than `width` where the output is no terminal."""
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)


def number(value: float | None, form: str = ".1f", unit: float = 1) -> str:
    """A cell of a table; "-" for what was not measured."""
    return "-" if value is None else format(value if unit == 1 else value / unit, form)

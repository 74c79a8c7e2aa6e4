"""What attempts.jsonl and study.log say about the times a cell was tried: how long, how they ended, and why."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.quarantine import json_lines

_MOST_LOG = 1 << 18  # bytes of the end of study.log that are searched for an error
_ERROR_LENGTH = 600


def attempts_of(folder: Path) -> list[dict]:
    """Attempts in the order they began; `ended` and `code` are None of one that was killed, or goes on. Raises OSError.

    attempts.jsonl has a line when an attempt begins and one when it ends; of two lines with the same beginning the later counts.
    """
    rows = {
        (began, str(row.get("host"))): row
        for row in json_lines(folder / "attempts.jsonl")
        if (began := _time(row.get("began"))) is not None
    }
    return [{**rows[key], "began": key[0], "ended": _time(rows[key].get("ended"))} for key in sorted(rows)]


def _time(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def seconds_of(folder: Path, attempts: list[dict], result: str = "") -> float | None:
    """Wall time of all attempts; None where there was none. Of one that was killed: until the last sign of it, which is the newest
    time of a file of the folder, or of a line of a log, before the next attempt began. result: the file that a cell that is done
    ends with; what was written later, an index say, is no sign."""
    if not attempts:
        return None
    signs = sorted(_signs(folder)) if any(one["ended"] is None for one in attempts) else []
    total = 0.0
    for this, following in zip(attempts, [*attempts[1:], None], strict=True):
        until = this["ended"]
        if until is None:
            end = following["began"] if following else _changed(folder / result) if result else math.inf
            until = max((sign for sign in signs if this["began"] <= sign <= end), default=this["began"])
        total += max(0.0, until - this["began"])
    return total


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


def _signs(folder: Path) -> Iterator[float]:
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(inner, name)).st_mtime
            except OSError:  # a checkpoint that is deleted at this moment
                continue
    for name in ("metrics.jsonl", "eval.jsonl"):
        yield from (at for row in json_lines(folder / name) if (at := _time(row.get("time_unix_s"))) is not None)


def last_code(attempts: list[dict]) -> int | None:
    """The exit code of the last attempt; None if it has not ended, or there was none."""
    code = attempts[-1].get("code") if attempts else None
    return code if isinstance(code, int) else None


def last_error(folder: Path, code: int) -> str:
    """The last `error: …` line of the last command in study.log, without that word; else its last line, else the exit code. (A line
    `$ COMMAND` stands before what a command says.) Raises OSError."""
    path = folder / "study.log"
    lines: list[str] = []
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_LOG))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    commands = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[commands[-1] + 1 :] if commands else lines
    errors = [line for line in lines if line.startswith("error:") or line.startswith("error on rank ")]
    said = errors[-1].removeprefix("error:").strip() if errors else (lines[-1] if lines else "")
    said = "".join(c if c.isprintable() else " " for c in said)
    if not said:
        return f"it ended with exit code {code} and said nothing"
    return said if len(said) <= _ERROR_LENGTH else f"{said[:_ERROR_LENGTH]}…"

"""What the readers share: annotation files read whole, with errors that say where and what to do."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shards import ShardError
from shards.datasets import Caption, Counts


def read_json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error})") from error


def read_lines(path: Path) -> list[str]:
    """The lines that hold something, without the spaces around them."""
    return [line.strip() for line in _text(path).split("\n") if line.strip()]


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a csv with a header that has at least these columns; a cell that is not there reads as empty.

    A row at a time. Every row holds its line number under "line". Raises ShardError for a row with more cells than the
    header: its text was meant to be in quotes.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            absent = set(columns) - set(reader.fieldnames or ())
            if absent:
                raise ShardError(
                    f"{path}: no column {' and '.join(sorted(absent))} in its header {reader.fieldnames}. "
                    f"The first line must be: {','.join(columns)}"
                )
            for row in reader:
                if None in row:  # or the text would be cut at its first comma
                    raise ShardError(
                        f"{path}, line {reader.line_num}: more cells than the header has. "
                        "Put a text with commas in double quotes"
                    )
                yield row | {"line": str(reader.line_num)}
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"{path} is not in UTF-8 ({error}): save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ShardError(f"{path} is not a csv ({error})") from error


def seconds(value: object, where: str) -> float | None:
    """`value`, text or number, as seconds; None for nothing. Raises ShardError for all that is no finite number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if type(value) is float and math.isfinite(value):  # nearly all, where there are millions
        return value
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ShardError(f"{where} is {value!r}, not a number of seconds")
    return number


def sentences(texts: object, where: str) -> tuple[Caption, ...]:
    """Captions without times from a list of strings, or from one."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ShardError(f"{where}: the captions must be a list of strings, not {str(texts)[:60]!r}")
    return tuple(Caption(" ".join(text.split())) for text in texts)


def expect(value: Any, kind: type, where: object, what: str) -> Any:
    """`value`, if it is a `kind`. Raises ShardError that says `what` should have been `where`."""
    if not isinstance(value, kind):
        raise ShardError(f"{where}: expected {what}, found {type(value).__name__} {str(value)[:60]!r}")
    return value


def published(table: dict[str, Counts], path: Path | None) -> Counts | None:
    """The entry of the first name that is part of the file's; case does not matter, nor whether `_` or `.` divides."""
    plain = path.name.lower().replace("_", ".").replace("-", ".") if path else ""
    return next((counts for part, counts in table.items() if part in plain), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"{path} is not in UTF-8 ({error})") from error

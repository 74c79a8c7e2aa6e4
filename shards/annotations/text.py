"""What the readers share: annotation files read whole, with errors that say where and what to do."""

import codecs
import csv
import errno
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shards import ShardError
from shards.annotations import Caption, Counts
from shards.annotations.files import EXTENSIONS


class DiskError(ShardError):
    """A disk, a server or the machine failed: no file is to blame, and another try may succeed."""


_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LONGEST = 1 << 24  # characters in a cell: a quote that is never closed must not take all memory


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ShardError if it is not one, or holds an object with a key twice."""
    text = _text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error})") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for an object that has a key twice: one of them would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"one object holds the key {twice!r} twice: join the two")
    return data


def read_lines(path: Path) -> list[str]:
    """The lines that hold something, without the spaces around them."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path, indent: str | None = None) -> list[tuple[int, str]]:
    """(number, line) of the lines that hold something, without the spaces around them; the first line is number 1.
    `indent`: of spaces at a line's beginning only these are taken off (None: all)."""
    lines = enumerate(re.split("\r\n|\r|\n", _text(path)), 1)
    return [(number, line.rstrip().lstrip(indent)) for number, line in lines if line.strip()]


def read_csv(
    path: Path, columns: Sequence[str], is_name: Callable[[str], bool] = lambda text: False
) -> Iterator[dict[str, str]]:
    """The rows of a csv with a header that has at least these columns, of which the first names the video.

    The header decides whether commas, semicolons or tabs separate; small and capital letters are the same in it. Other
    columns go by their names in small letters, and may lack at the end of a row. Every row holds the number of its first
    line under "line". A cell in quotes may hold separators, line ends and quotes (written twice); elsewhere a quote is
    text like any other. Rows in which nothing stands are skipped. Reads a row at a time.

    Raises ShardError where text would be lost or end up in another row: for a row with more cells than the header, or
    without one of `columns`; for text after a closing quote; and for a quote that is not closed, even where a later
    row's quote ends it: the cell then holds a line that begins with the name of a video. `is_name` knows these.
    """
    at = 0
    try:
        csv.field_size_limit(_LONGEST)
        with open(path, newline="", encoding=_encoding(path)) as file:
            lines = _without_nul(file, path)
            at, separator, header = _header(path, lines, columns)
            first, needed = header.index(columns[0]), 1 + max(header.index(name) for name in columns)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            offset, at = at, at + 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    _check_row(cells, needed, header, separator, f"{path}, line {at}")
                    if offset + reader.line_num > at:
                        _check_lines(cells, first, separator, is_name, f"{path}, line {at}")
                    yield dict(zip_longest(header, cells, fillvalue="")) | {"line": str(at)}
                at = offset + reader.line_num + 1
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_unicode(path, error, "CSV UTF-8") from error
    except csv.Error as error:
        raise ShardError(f"{path}, line {at}: {_quote_error(error, reader.line_num + offset - at + 1)}") from error


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise _nul(path, number)
        yield line


def _header(path: Path, lines: Iterator[str], columns: Sequence[str]) -> tuple[int, str, list[str]]:
    """The header's line number, the separator, and the names of the columns: as in `columns`, or in small letters."""
    number, line = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (1, ""))
    known = {name.lower(): name for name in columns}
    for separator in _SEPARATORS:
        try:
            cells = next(csv.reader([line], delimiter=separator, strict=True), [])
        except csv.Error:
            continue
        header = [known.get(cell.strip().lower(), cell.strip().lower()) for cell in cells]
        if set(columns) <= set(header):
            twice = [name for name, count in Counter(header).items() if name and count > 1]
            if twice:
                raise ShardError(f"{path}, line {number}: two columns are called {twice[0]!r}. Give each its own name")
            return number, separator, header
    cells = [cell.strip() for cell in line.split(",")] if line.strip() else []
    absent = sorted(name for name in columns if name.lower() not in {cell.lower() for cell in cells})
    raise ShardError(
        f"{path}: no column {' and '.join(absent or columns)} in its header {cells}. "
        f"The first line must be: {','.join(columns)} (or with {' or '.join(list(_SEPARATORS.values())[1:])} between)"
    )


def _check_row(cells: list[str], needed: int, header: list[str], separator: str, where: str) -> None:
    if len(cells) > len(header):  # or the text would be cut at its first separator
        raise ShardError(
            f"{where}: more cells than the header has. Put a text with {_SEPARATORS[separator]} in double quotes"
        )
    if any(cell.strip() for name, cell in zip(header, cells, strict=False) if not name):
        raise ShardError(
            f"{where}: text in a column without a name. Put a text with {_SEPARATORS[separator]} in double quotes"
        )
    if len(cells) < needed:
        raise ShardError(
            f"{where}: no cell for {' and '.join(repr(name) for name in header[len(cells) : needed])}. "
            "Add it, or put a text that goes on after a line end in double quotes"
        )


def _check_lines(cells: list[str], first: int, separator: str, is_name: Callable[[str], bool], where: str) -> None:
    """Raises ShardError if a cell of several lines holds a row that begins with the name of another video."""
    own = _shape(cells[first])
    for column, cell in enumerate(cells):
        for nth, line in enumerate(re.split("\r\n|\r|\n", cell)):
            place = first if nth else first - column  # in a row's first line, the cells before stand before it
            parts = line.split(separator)
            if place < (0 if nth else 1) or len(parts) <= max(place, 1):
                continue
            name = parts[place].strip().strip('"')
            if os.path.splitext(name)[1].lower() in EXTENSIONS or (own and _shape(name) == own) or is_name(name):
                raise ShardError(
                    f"{where}: its quoted text runs on over the row of {name!r}. Close the quote, or leave it out. If all "
                    "of it is one text, write a jsonl"
                )


def _shape(name: str) -> str:
    """The name with every number as 0; nothing for a name without numbers."""
    shape = re.sub("[0-9]+", "0", name.strip())
    return shape if "0" in shape else ""


def _quote_error(error: csv.Error, lines: int) -> str:
    """What is wrong in a row that has been read so far over so many lines."""
    if "expected after" in str(error):
        place = "here" if lines < 2 else f"{lines - 1} lines below"
        return (
            f"a cell begins with a quote, and after the quote that closes it ({place}) there is more text. Write quotes "
            'inside quotes twice (""), or leave out those around the text'
        )
    if "end of data" in str(error):
        return "a quote is opened here and never closed. Close it, or leave it out"
    if "field limit" in str(error):
        return f"a cell of more than {_LONGEST} characters. Is a quote opened here that is never closed?"
    return f"not csv ({error})"


def seconds(value: object, where: str) -> float | None:
    """`value`, text or number, as seconds; None for nothing. Raises ShardError for all that is no finite number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if type(value) is float and math.isfinite(value):  # nearly all, where there are millions
        return value
    try:
        # Python would read 1_30, which may be a minute and a half, as 130, and true as 1
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)  # type: ignore[arg-type]
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


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        return encoding_of(file.read(4))


def encoding_of(start: bytes) -> str:
    """UTF-8, or what a mark in the first four bytes of a file says: UTF-16 is what Windows calls Unicode."""
    return next((encoding for mark, encoding in _ENCODINGS.items() if start.startswith(mark)), "utf-8")


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode(_encoding(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_unicode(path, error, "UTF-8") from error
    if "\0" in text:
        raise _nul(path, 1 + len(re.findall("\r\n|\r|\n", text[: text.index("\0")])))
    return text


def unreadable(path: Path, error: OSError) -> ShardError:
    """The error to raise, a DiskError where it says nothing of the file itself."""
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: there is no such file")
    of_the_file = (
        isinstance(error, (IsADirectoryError, NotADirectoryError, PermissionError)) or error.errno == errno.ELOOP
    )
    kind, hint = (ShardError, ": name a file of text") if of_the_file else (DiskError, "")
    return kind(f"{path} cannot be read ({error.strerror}){hint}")


def _nul(path: Path, line: int) -> ShardError:
    return ShardError(
        f"{path}, line {line}: it holds a NUL character, so it is not plain text. If it is UTF-16, save the file as UTF-8"
    )


def _not_unicode(path: Path, error: UnicodeDecodeError, form: str) -> ShardError:
    """The error with the line of the first byte that is not in the encoding. The file is read once more."""
    encoding = _encoding(path)
    with open(path, newline="", encoding=encoding, errors="surrogateescape" if "8" in encoding else "replace") as file:
        wrong = (n for n, line in enumerate(file, 1) if re.search("[\udc80-\udcff\ufffd]", line))
        line = next(wrong, 1)
    name = encoding.removesuffix("-sig").upper()
    return ShardError(f"{path}, line {line}: the text is not in {name} ({error.reason}). Save the file as {form}")

"""Which segments a search looks at, as a condition of the index's SQL. Imports nothing heavy."""

import math
import re
from dataclasses import dataclass

_WILD = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"([^\w/ ])")  # what a regular expression might take for something else


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search looks at, and how.

    path: a glob over names of videos (see `of_path`); min_duration, max_duration: of videos, seconds, both included. per_video: the best
    segment of each video alone; otherwise several of a video, none of which overlaps a better one. exact: look at every vector; otherwise
    by the index's ANN, where it has one. candidates: how many segments a head that compares frames scores. Raises ValueError.
    """

    path: str | None = None
    min_duration: float | None = None
    max_duration: float | None = None
    per_video: bool = True
    exact: bool = True
    candidates: int = 200

    def __post_init__(self):
        for name in ("min_duration", "max_duration"):
            value = getattr(self, name)
            if value is not None and (math.isnan(value) or value < 0):
                raise ValueError(f"{name}={value}: must be a number of seconds, 0 or more")
        if None not in (self.min_duration, self.max_duration) and self.min_duration > self.max_duration:  # type: ignore[operator]
            raise ValueError(f"no video lasts at least {self.min_duration:g} and at most {self.max_duration:g} seconds")
        if self.path == "":
            raise ValueError("the path to filter by is empty: leave it out, or write a glob such as 'cooking/*'")
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates}: must be at least 1")

    def where(self) -> list[str]:
        """Conditions that all have to hold."""
        conditions = [] if self.path is None else [of_path(self.path)]
        if self.min_duration is not None:  # a number of numpy's names its type, and SQL knows no infinity
            conditions.append(
                f"duration >= {float(self.min_duration)!r}" if math.isfinite(self.min_duration) else "false"
            )
        if self.max_duration is not None and math.isfinite(self.max_duration):
            conditions.append(f"duration <= {float(self.max_duration)!r}")
        return conditions


def sql_text(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def of_path(glob: str) -> str:
    """The condition that a video's name matches a glob: * stands for any characters, also /, ? for one, [a-f] and [!a-f] for one of
    some. A name without any of them means that video, or all of that folder."""
    if not _WILD.search(glob):
        folder = glob.rstrip("/")
        return f"(video = {sql_text(glob)} OR starts_with(video, {sql_text(folder + '/')}))"
    return f"regexp_like(video, {sql_text(as_regex(glob))})"


def as_regex(glob: str) -> str:
    """The regular expression, in Rust's dialect, that matches what a glob does, and nothing more."""
    out, i = [], 0
    while i < len(glob):
        char = glob[i]
        i += 1
        if char == "*":
            out.append(".*")
        elif char == "?":
            out.append(".")
        elif char == "[" and (end := _end_of_set(glob, i)):
            out.append(_set(glob[i:end]))
            i = end + 1
        else:
            out.append(_literal(char))
    return f"(?s)^{''.join(out)}$"


def _end_of_set(glob: str, start: int) -> int:
    """Where the ] of a set stands whose [ is before `start`; 0 if there is none. A ] that comes first is one of the set."""
    first = start + (glob[start : start + 1] == "!")
    end = glob.find("]", first + 1)
    return max(end, 0)


def _set(inside: str) -> str:
    negated = inside.startswith("!")
    chars = inside[negated:]
    parts, i = [], 0
    while i < len(chars):
        if chars[i + 1 : i + 2] == "-" and i + 2 < len(chars):
            low, high = chars[i], chars[i + 2]
            if low <= high:  # a range the wrong way round holds nothing
                parts.append(f"{_literal(low)}-{_literal(high)}")
            i += 3
        else:
            parts.append(_literal(chars[i]))
            i += 1
    if not parts:
        return "." if negated else r"[^\s\S]"
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _literal(char: str) -> str:
    """A character that stands for itself. Rust refuses a backslash before what is not special, so others are written by number."""
    return _SPECIAL.sub(lambda found: f"\\x{{{ord(found[1]):x}}}", char)

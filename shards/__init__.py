"""Data at rest: WebDataset tar shards with a sample table that answers every question a loader has about a video.

Nothing in this room knows torch or DALI.
"""

from collections.abc import Iterable
from itertools import islice


def count(n: int, what: str) -> str:
    """`1 video`, `2 videos`"""
    return f"{n} {what}{'s' * (n != 1)}"


def first_few(words: Iterable[str], most: int = 3) -> str:
    """`a, b, c, …`: the first `most` of many words."""
    shown = list(islice(words, most + 1))
    return ", ".join(shown[:most]) + ", …" * (len(shown) > most)


def first_line(error: BaseException, named: bool = False) -> str:
    """An error in one line of at most 200 characters: the first line of its text, or the name of its class if it has none.

    named: with the name of its class in any case, for errors that say little without it."""
    kind, line = type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200]
    return f"{kind}: {line}" if named and line else line or kind


class ShardError(ValueError):
    """Something is wrong on disk, or in a command that writes to disk. The message says what to do."""


class VideoError(ValueError):
    """A video that cannot be used, and why."""

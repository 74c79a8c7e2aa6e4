"""Data at rest: WebDataset tar shards with a sample table that answers every question a loader has about a video.

Nothing in this room knows torch or DALI.
"""

import argparse
from collections.abc import Callable


def number(kind: type, allowed: str) -> Callable[[str], int | float]:
    """For argparse: a number of that kind. What is none is answered with which are `allowed`."""

    def parse(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:100]}: must be {what} {allowed}") from None

    return parse


def count(n: int, what: str) -> str:
    """`1 video`, `2 videos`"""
    return f"{n} {what}{'s' * (n != 1)}"


class ShardError(ValueError):
    """Something on disk, or in a command that writes to disk, is not as it must be. The message says what to do."""


class VideoError(ValueError):
    """A video that cannot be used, and why."""

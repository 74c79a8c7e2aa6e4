"""Which of many ways `make test` runs: the others are marked nightly."""

from collections.abc import Callable, Collection, Iterable

import pytest


def ways(names: Iterable[str], often: Collection[str]) -> list:
    """Values of a parameter: the names, those that are not in `often` marked."""
    return [pytest.param(name, marks=_marks(name in often)) for name in names]


def ranked(pairs: Iterable[tuple[int, str]], often: dict[int, set[str]]) -> list:
    """Values of two parameters, ranks and name; often: by ranks."""
    return [pytest.param(ranks, name, marks=_marks(name in often[ranks])) for ranks, name in pairs]


def cases(rows: Iterable[tuple], often: Callable[..., bool]) -> list:
    """Values of several parameters, of which `often` says whether."""
    return [pytest.param(*row, marks=_marks(often(*row))) for row in rows]


def _marks(often: bool) -> list:
    return [] if often else [pytest.mark.nightly]

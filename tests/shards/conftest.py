from __future__ import annotations

from pathlib import Path

import pytest

from shards.datasets import Item
from tests.shards import sets


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return sets.source(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def copied(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five videos packed with profile copy, in three shards. Not to be written to."""
    out = tmp_path_factory.mktemp("packed") / "copy"
    sets.packed(items, out, sets.COPY)
    return out


@pytest.fixture(scope="session")
def intra(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with profile intra."""
    out = tmp_path_factory.mktemp("packed") / "intra"
    sets.packed(items, out, sets.INTRA)
    return out

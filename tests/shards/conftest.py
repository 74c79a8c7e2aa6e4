from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shards.annotations import Caption, Item
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


@pytest.fixture(scope="session")
def rough(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five videos (profile copy) with something rejected before, between and after them; five shards, one of
    rejects only."""
    out = tmp_path_factory.mktemp("rough") / "train"
    missing = [replace(items[0], id=f"gone{i}", path=Path(f"/nowhere/{i}.mp4")) for i in range(5)]
    half = replace(items[1], captions=(*items[1].captions, Caption(" ")))
    sets.packed([missing[0], items[0], half, *missing[1:4], *items[2:], missing[4]], out)
    return out

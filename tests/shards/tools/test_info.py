"""info counts every split that can be packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shards.annotations import Item
from shards.tools.info import describe, measure
from tests.shards.sets import INTRA, packed


def test_a_shard_without_videos_is_counted(items: list[Item], tmp_path: Path) -> None:
    gone = [replace(items[0], id=f"gone{i}", path=tmp_path / f"{i}.mp4") for i in range(2)]
    packed([*gone, items[0]], tmp_path / "set", INTRA, workers=1)
    numbers = measure(tmp_path / "set")
    assert (numbers["videos"], numbers["shards"], numbers["source_codecs"]) == (1, 2, {"h264": 1})
    assert describe(tmp_path / "set")["left out"] == "2 videos rejected"

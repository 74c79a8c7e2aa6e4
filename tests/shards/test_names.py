from dataclasses import replace
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Item
from shards.names import Names
from shards.split import Split
from tests.shards.sets import COPY, packed

SHARDS = [(0, ["kitchen/egg", "cup"], ["kitchen%2Fegg", "cup"]), (2, [], []), (2, ["sea", "cup"], ["sea", "cup_2"])]


def test_each_name_leads_to_all_rows_that_have_it() -> None:
    names = Names(SHARDS)
    found = {name: names.rows(name) for name in ("kitchen/egg", "kitchen%2Fegg", "cup", "sea", "cup_2", "lake")}
    assert found == {"kitchen/egg": [0], "kitchen%2Fegg": [0], "cup": [1, 3], "sea": [2], "cup_2": [3], "lake": []}
    assert Names([]).rows("cup") == []


def test_names_of_one_hash_are_all_looked_at(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [replace(item, id=id) for item, id in zip(items, ("kitchen/egg", "cup", "sea", "sky"), strict=False)]
    packed(named, tmp_path / "train", COPY)
    monkeypatch.setattr("shards.names.hash", lambda name: 7, raising=False)
    split = Split(tmp_path / "train")
    assert len(split.shards) == 2
    stored = [split.video(row) for row in range(len(split))]
    assert [video.id for video in map(split.find, ("kitchen/egg", "cup", "sea", "sky"))] == [v.id for v in stored]
    assert [split.find(video.key).index for video in stored] == [0, 1, 2, 3]


def test_a_damaged_table_hides_no_video_of_the_others(items: list[Item], tmp_path: Path) -> None:
    named = [replace(item, id=id) for item, id in zip(items, ("egg", "cup", "sea", "sky"), strict=False)]
    packed(named, tmp_path / "train", COPY)
    whole = Split(tmp_path / "train")
    ids = [whole.video(row).id for row in range(len(whole))]
    first_of_second = int(whole.shard_starts[1])
    table = tmp_path / "train" / f"{whole.shards[0]}.parquet"
    before = table.read_bytes()
    table.write_bytes(b"no table")
    split = Split(tmp_path / "train")
    assert split.find(ids[first_of_second]).index == first_of_second
    with pytest.raises(ShardError, match="cannot be read"):
        split.find(ids[0])
    table.write_bytes(before)
    assert split.find(ids[0]).index == 0

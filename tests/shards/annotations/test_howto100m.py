"""The reader of HowTo100M, whole videos and clips."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Caption, Counts, howto100m
from tests.shards.annotations.reading import videos, write
from tests.shards.sets import reading


@pytest.fixture
def howto(tmp_path: Path) -> Path:
    videos(tmp_path / "videos", "nVbIUDjzWY4.mp4", "aa/JTMC9ypFtZ0.webm", "unlisted.mp4")
    write(
        tmp_path / "HowTo100M_v1.csv",
        "video_id,category_1,category_2,rank,task_id\n"
        "nVbIUDjzWY4,Cars & Other Vehicles,Motorcycles,27,52907\n"
        "JTMC9ypFtZ0,Food and Entertaining,Recipes,3,1\n"
        "deadlink000,Food and Entertaining,Recipes,4,1\n",
    )
    write(
        tmp_path / "caption.json",
        {
            "nVbIUDjzWY4": {"text": ["paint wheels"], "start": [9], "end": [12.5]},
            "unlisted": {"text": ["x"], "start": [0], "end": [1]},
            "JTMC9ypFtZ0": {"text": ["flour", "", None, "eggs", "oven"], "start": [0.08, 3, 3, 4.0, 60], "end": [3.5, 4, 4, 7.25, 61]},
            "deadlink000": {"text": ["gone", "too"], "start": [0, 5], "end": [5, 10]},
        },
    )  # fmt: skip
    return tmp_path


def test_howto100m_whole_videos(howto: Path) -> None:
    options = ("--annotations", howto / "caption.json", "--list", howto / "HowTo100M_v1.csv")
    read = reading("howto100m", howto / "videos", *options)
    assert [item.id for item in read.items] == ["nVbIUDjzWY4", "JTMC9ypFtZ0", "deadlink000"]
    assert read.items[0].captions == (Caption("paint wheels", 9.0, 12.5),)
    assert read.items[0].meta == {
        "category_1": "Cars & Other Vehicles", "category_2": "Motorcycles", "rank": "27", "task_id": "52907",
    }  # fmt: skip
    assert read.missing == Counts(1, 2) and read.items[1].start is None
    food = reading("howto100m", howto / "videos", *options, "--category", "Food and Entertaining")
    assert [item.id for item in food.items] == ["JTMC9ypFtZ0", "deadlink000"]
    everything = reading("howto100m", howto / "videos", *options[:2])
    assert [item.id for item in everything.items] == ["nVbIUDjzWY4", "unlisted", "JTMC9ypFtZ0", "deadlink000"]
    with pytest.raises(
        ShardError, match="no video has the category_1 'Food'; the list has 'Food and Entertaining', 'Cars"
    ):
        reading("howto100m", howto / "videos", *options, "--category", "Food")
    with pytest.raises(ShardError, match="--category is looked up in --list"):
        reading("howto100m", howto / "videos", *options[:2], "--category", "Food")
    (howto / "caption.json").write_text((howto / "caption.json").read_text()[:100])
    with pytest.raises(ShardError, match=r"caption\.json is not a JSON object of videos"):
        reading("howto100m", howto / "videos", *options)


def test_howto100m_clips(howto: Path) -> None:
    options = ("--annotations", howto / "caption.json", "--list", howto / "HowTo100M_v1.csv", "--clips")
    read = reading("howto100m", howto / "videos", *options, "--min-duration", "4")
    assert [(i.id, i.start, i.end, i.captions) for i in read.items] == [
        ("nVbIUDjzWY4_8750_12750", 8.75, 12.75, (Caption("paint wheels", 9.0, 12.5),)),
        ("JTMC9ypFtZ0_80_7250", 0.08, 7.25, (Caption("flour eggs", 0.08, 7.25),)),
        ("JTMC9ypFtZ0_58500_62500", 58.5, 62.5, (Caption("oven", 60.0, 61.0),)),
        ("deadlink000", None, None, (Caption("gone", 0.0, 5.0), Caption("too", 5.0, 10.0))),
    ]
    assert read.items[1].meta["video"] == "JTMC9ypFtZ0" and read.missing == Counts(1, 2)


def test_clips_are_long_enough_and_lose_no_caption() -> None:
    said = tuple(Caption(f"w{n}", n * 1.7, n * 1.7 + 2.1) for n in range(50))
    cut = list(howto100m.clips(said, 6.0))
    assert " ".join(caption.text for _, _, caption in cut) == " ".join(c.text for c in said)
    assert all(end - start >= 6.0 - 1e-9 and start >= 0 for start, end, _ in cut)
    assert [start for start, _, _ in cut] == sorted({start for start, _, _ in cut})
    assert list(howto100m.clips((Caption("a", 1, 1), Caption("no times"), Caption("", 2, 9)), 6.0)) == [
        (0.0, 6.0, Caption("a", 1, 1))
    ]


def test_howto100m_clips_name_what_they_leave_out(howto: Path) -> None:
    said = {
        "nVbIUDjzWY4": {"text": ["a", "", "b"], "start": [1, 1, 1], "end": [9, 9, 9]},
        "JTMC9ypFtZ0": {"text": ["no times"], "start": [None], "end": [None]},
    }
    file = write(howto / "caption.json", said)
    read = reading("howto100m", howto / "videos", "--annotations", file, "--clips")
    assert [(i.id, [c.text for c in i.captions]) for i in read.items] == [
        ("nVbIUDjzWY4_1000_9000", ["a b"]), ("JTMC9ypFtZ0", ["no times"]),
    ]  # fmt: skip
    assert [i.problem for i in read.items] == ["", "no caption has both text and times to cut at"]
    assert "2 videos ('nVbIUDjzWY4', 'JTMC9ypFtZ0') with captions left out by --clips" in read.warnings[0]

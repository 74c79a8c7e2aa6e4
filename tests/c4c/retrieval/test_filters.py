"""A glob as SQL matches what fnmatch matches; a choice that cannot be is refused."""

import itertools
from fnmatch import fnmatchcase

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from c4c.retrieval.index.filters import Choice, as_regex, of_path, sql_text

NAMES = ["cooking/a.mp4", "cooking/deep/b.mp4", "Cooking/a.mp4", "cooking", "cookingx.mp4", "a'b%_.mp4", "back\\slash.mp4", "[x].mp4",
         "x.mp4", "new\nline.mp4", "Ünï/ü.mp4", "a.b", "aXb", "a^b", "a-b", "a]b", "a b", "$a", "a&&b", "a{2}b", "a|b", "(a)", "🎬.mp4"]  # fmt: skip
GLOBS = ["*", "cooking/*", "cooking/*.mp4", "?ooking/*", "*'*", "*%_*", "*\\*", "[[]x].mp4", "[x].mp4", "[!x].mp4", "*.mp4", "a.b", "a?b",
         "a[.]b", "a[^X]b", "a[!X]b", "a[]]b", "a[X^.-]b", "a[--0]b", "a[z-a]b", "a[!z-a]b", "*\n*", "Ü*", "*[ü-ÿ].mp4", "[", "[!", "a[b", "$*",
         "a[&]&b", "a*{2}b", "*|*", "(*)", "🎬*", "[🎬].mp4", "**/b.mp4", ""]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    db = lancedb.connect(tmp_path_factory.mktemp("lance"))
    return db.create_table("names", pa.table({"video": NAMES}))


def matched(table, where: str) -> set[str]:
    return set(table.search().where(where).to_arrow()["video"].to_pylist())


def test_globs_match_what_fnmatch_matches(table):
    for glob in GLOBS:
        expected = {name for name in NAMES if fnmatchcase(name, glob)}
        assert matched(table, f"regexp_like(video, {sql_text(as_regex(glob))})") == expected, glob
    assert {glob for glob in GLOBS if any(fnmatchcase(name, glob) for name in NAMES)} != set(GLOBS)


def test_every_short_glob_of_special_characters(table):
    for chars in itertools.product("[]!-^\\a*", repeat=3):
        glob = "".join(chars)
        expected = {name for name in NAMES if fnmatchcase(name, glob)}
        assert matched(table, f"regexp_like(video, {sql_text(as_regex(glob))})") == expected, glob


def test_a_name_without_wildcards_is_a_video_or_a_folder(table):
    assert matched(table, of_path("cooking")) == {"cooking", "cooking/a.mp4", "cooking/deep/b.mp4"}
    assert matched(table, of_path("cooking/")) == {"cooking/a.mp4", "cooking/deep/b.mp4"}
    assert matched(table, of_path("cooking/deep")) == {"cooking/deep/b.mp4"}
    assert matched(table, of_path("a'b%_.mp4")) == {"a'b%_.mp4"}
    assert matched(table, of_path("x' OR 'a' = 'a")) == set()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"min_duration": -1.0}, "min_duration=-1.0"),
        ({"max_duration": float("nan")}, "max_duration=nan"),
        ({"min_duration": 5.0, "max_duration": 4.0}, "at least 5 and at most 4"),
        ({"path": ""}, "empty"),
        ({"candidates": 0}, "candidates=0"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        Choice(**choice)


def test_conditions():
    assert Choice().where() == []
    assert Choice(min_duration=1, max_duration=float("inf")).where() == ["duration >= 1.0"]
    assert Choice(max_duration=2.5, path="a*").where() == [of_path("a*"), "duration <= 2.5"]
    assert Choice(min_duration=np.float64(2), max_duration=np.float32(2.5)).where() == [
        "duration >= 2.0",
        "duration <= 2.5",
    ]


def test_no_video_lasts_forever(table):
    (condition,) = Choice(min_duration=float("inf")).where()
    assert matched(table, condition) == set()

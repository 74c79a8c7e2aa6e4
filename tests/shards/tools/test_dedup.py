"""dedup finds what is there twice, proves it, and says where it crosses from one split to another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from c4c.shard import main
from shards.annotations import Caption, Item
from shards.split import Split
from shards.tools import dedup as module
from shards.tools.dedup import DuplicateGroup, RepeatedCaption, dedup
from shards.video.profiles import Profile
from tests.shards.sets import COPY, packed


@pytest.fixture(scope="module")
def again(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test split that shares with the training split: a file twice under new names, a name, and a caption."""
    folder = tmp_path_factory.mktemp("again")
    other = folder / "renamed.mp4"
    other.write_bytes(items[0].path.read_bytes())
    leaked = [Item(f"leak{i}", other, (Caption("  ONE,  with a Comma "),)) for i in range(2)]
    named = replace(items[1], path=items[2].path, captions=(Caption("nine"),))
    packed([*leaked, named], folder / "test", COPY)
    return folder / "test"


def ids(groups: list[DuplicateGroup]) -> list[list[str]]:
    return [[id for _, id in group.members] for group in groups]


def test_nothing_is_found_where_nothing_is(copied: Path) -> None:
    report = dedup([copied])
    assert report.clean and report.videos == 5
    assert (report.content, report.source, report.names, report.captions) == ([], [], [], 0)


def test_a_leak_is_found_by_its_bytes(copied: Path, again: Path) -> None:
    steps = []
    report = dedup([copied, again], on_step=lambda *step: steps.append(step))
    assert ids(report.content) == [["plain", "leak0", "leak1"], ["web", "dir/por.trait"]]
    assert all(group.leak for group in report.content)
    assert {split for split, _ in report.content[0].members} == {str(copied), str(again)}
    assert ids(report.names) == [["dir/por.trait", "dir/por.trait"]]
    assert report.source == []  # what is equal byte for byte is not told twice
    assert not report.clean
    assert (report.captions, report.caption_leaks) == (1, 1)
    (example,) = report.caption_examples
    assert example == RepeatedCaption("one, with a comma", 3, (str(copied), str(again)))
    assert ("bytes", 0, 5) in steps and ("bytes", 5, 5) in steps


def test_each_repeated_caption_is_spelled_out(items: list[Item], tmp_path: Path) -> None:
    said = (Caption("one text"), Caption("another text"))
    packed([replace(items[i], captions=said) for i in (0, 1)], tmp_path / "train", COPY)
    told = dedup([tmp_path / "train"]).caption_examples
    assert sorted(example.text for example in told) == ["another text", "one text"]


def test_inside_one_split_it_is_no_leak(again: Path) -> None:
    report = dedup([again])
    assert ids(report.content) == [["leak0", "leak1"]] and not report.content[0].leak
    assert (report.captions, report.caption_leaks) == (1, 0)


def test_a_source_packed_in_two_ways_is_known(items: list[Item], intra: Path, tmp_path: Path) -> None:
    packed([replace(items[0], id="same")], tmp_path / "test", Profile(name="intra", fps=3, short_side=48))
    report = dedup([intra, tmp_path / "test"])
    assert report.content == [] and ids(report.source) == [["plain", "same"]] and report.source[0].leak
    assert dedup([intra, tmp_path / "test"], sources=False).clean


def test_equal_checksums_are_no_proof(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_content_hashes", lambda every: np.zeros(len(every), np.uint64))
    monkeypatch.setattr(module, "_length_hashes", lambda every: np.zeros(len(every), np.uint64))
    assert dedup([copied]).clean


def test_the_command_line(copied: Path, again: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["dedup", str(copied)]) == 0
    assert "5 videos in 1 split: 0 groups of the same bytes" in capsys.readouterr().out
    assert main(["dedup", str(copied), str(again)]) == 1
    out = capsys.readouterr().out
    assert f"the same bytes (LEAK between splits): plain ({copied}), leak0 ({again}), leak1 ({again})" in out
    assert "caption with 3 videos in several splits: one, with a comma" in out
    assert main(["dedup", str(copied), str(again), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["clean"] is False and told["content"][0]["leak"] is True
    assert told["content"][0]["videos"][0] == {"split": str(copied), "id": "plain"}
    assert told["caption_examples"][0]["videos"] == 3
    assert main(["dedup", str(copied / "missing")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert len(Split(copied)) == 5

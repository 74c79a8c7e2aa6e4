"""Splits put together and divided: every video once, its bytes as they were, and tars shared where they can be."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from c4c.shard import main
from shards import ShardError, first_few, tarcopy
from shards.split import Split
from shards.tar import read_index, read_members
from shards.tools.regroup import Piece, SourceSplit, new_folder, write_split
from shards.tools.reshard import SplitPart, merge, split
from shards.tools.verify import verify
from tests.shards.sets import files


def contents(*paths: Path) -> dict[str, tuple]:
    """{id: all that is known of a video, places apart}; every id is in one of the splits only."""
    out: dict[str, tuple] = {}
    for path in paths:
        opened = Split(path)
        for i in range(len(opened)):
            video = opened.video(i)
            assert video.id not in out
            frames = [values.tolist() for values in vars(video.frames).values()]
            flat = [v for k, v in vars(video).items() if k not in ("index", "shard", "offset", "frames")]
            out[video.id] = (flat, frames, opened.read(video), opened.json(video), opened.captions(i))
    return out


def rejects(*paths: Path) -> list[str]:
    return sorted(line for path in paths for line in (path / "rejects.jsonl").read_text().splitlines())


def same_file(a: Path, b: Path) -> bool:
    return os.stat(a).st_ino == os.stat(b).st_ino


# ---- one split into several ----


@pytest.mark.parametrize("profile", ["copied", "intra"])
def test_parts_hold_every_video_once(profile: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = request.getfixturevalue(profile)
    made = split(whole, tmp_path, [SplitPart("a", 0.4), SplitPart("b")], seed=1)
    assert [m.info["videos"] for m in made] == [2, 3] and [m.path for m in made] == [tmp_path / "a", tmp_path / "b"]
    assert contents(tmp_path / "a", tmp_path / "b") == contents(whole)
    for tar in tmp_path.glob("*/*.tar"):
        assert read_index(tar.with_suffix(".idx")) == read_members(tar)


def test_what_is_written_anew_is_what_the_packer_writes(copied: Path, rough: Path, tmp_path: Path) -> None:
    for nth, source in enumerate((copied, rough)):
        opened = Split(source)
        shards = [[Piece(0, i, np.arange(s["videos"]))] for i, s in enumerate(opened.info["shards"])]
        out = tmp_path / str(nth)
        with new_folder(out) as folder:
            made = write_split(folder, [SourceSplit(opened)], shards, name="set", split="train", origin={})
        assert made.how == {"rewritten": len(shards)} and made.info["digest"] == opened.digest
        ours, theirs = files(out), files(source)
        assert ours.pop("dataset.json") != theirs.pop("dataset.json")
        assert ours == theirs


def test_the_choice_is_the_seeds(copied: Path, tmp_path: Path) -> None:
    chosen = []
    for nth, seed in enumerate((0, 0, 1, 2, 3)):
        split(copied, tmp_path / str(nth), [SplitPart("a", 2)], seed=seed)
        chosen.append(frozenset(contents(tmp_path / str(nth) / "a")))
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1
    assert files(tmp_path / "0" / "a") == files(tmp_path / "1" / "a")


def test_whole_shards_are_linked(copied: Path, tmp_path: Path) -> None:
    made = split(copied, tmp_path / "by", [SplitPart("a", 0.4), SplitPart("b")], whole_shards=True)
    assert sum(made[0].how.values()) + sum(made[1].how.values()) == 3
    assert not (made[0].how + made[1].how).keys() & {"rewritten", "copy"}
    assert contents(tmp_path / "by" / "a", tmp_path / "by" / "b") == contents(copied)
    made = split(copied, tmp_path / "copies", [SplitPart("a")], copy=True)
    assert made[0].how == {"copy": 3}
    assert not same_file(tmp_path / "copies" / "a" / "000000.tar", copied / "000000.tar")


def test_lists_of_ids(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ids = [Split(copied).video(i).id for i in range(5)]
    (tmp_path / "ids.txt").write_text("\n".join([ids[4], ids[0], ids[1]]) + "\n\n", encoding="utf-8")
    command = ["split", str(copied), "--out", str(tmp_path), "--parts", f"test={tmp_path / 'ids.txt'}", "train=rest"]
    assert main(command) == 0
    assert list(contents(tmp_path / "test")) == [ids[0], ids[1], ids[4]]  # in the order of the source
    assert list(contents(tmp_path / "train")) == [ids[2], ids[3]]
    assert len(Split(tmp_path / "train").shards) == 1  # a whole shard of the source
    assert "3 videos, 4 captions" in capsys.readouterr().err
    with pytest.raises(ShardError, match=r"1 of the listed ids are not in .*'nobody'"):
        split(copied, tmp_path / "no", [SplitPart("a", ids=frozenset(["nobody", ids[0]]))])
    with pytest.raises(ShardError, match="in the lists of both a and b"):
        split(copied, tmp_path / "no", [SplitPart(n, ids=frozenset([ids[0]])) for n in "ab"])
    assert not (tmp_path / "no").exists()


def test_videos_that_no_part_takes_are_told(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["split", str(copied), "--parts", "a=0.4", "b=1"]
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert f"2 videos of {copied} in no part" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "c=rest", "--out", str(tmp_path / "three")]) == 0
    assert "in no part" not in capsys.readouterr().err


def test_rejects_go_along(rough: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    made = split(rough, tmp_path, [SplitPart("a", 2), SplitPart("b")], seed=3)
    assert contents(*parts) == contents(rough) and rejects(*parts) == rejects(rough)
    assert sum(m.info["rejected_videos"] for m in made) == 5 and sum(m.info["rejected_captions"] for m in made) == 1
    merge(parts, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(rough) and rejects(tmp_path / "again") == rejects(rough)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["a=6"], "part a asks for 6 videos, but only 5 of 5 are left"),
        (["a=0.05", "b=rest"], "part a would be empty"),
        (["a=0.6", "b=0.6"], "add up to more than 1"),
        (["a=1", "a=2"], "give each name once"),
        (["a=rest", "b=rest"], "the size rest at most once"),
        (["../a=1"], "a plain name"),
        (["a"], "must be NAME=SIZE"),
        (["a=2.0"], "at most 1"),
        (["a=10%"], "--parts a=10%: write a share as a fraction, a=0.1\n"),
        (["a=100%"], "a fraction, a=1.0\n"),
        (["a=nowhere.txt"], "not an existing file of ids"),
    ],
)
def test_sizes_that_cannot_be_meant(parts, words, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["split", str(copied), "--out", str(tmp_path / "out"), "--parts", *parts]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "out").iterdir())


# ---- several splits into one ----


def test_merging_the_parts_gives_the_set(copied: Path, tmp_path: Path) -> None:
    split(copied, tmp_path, [SplitPart("a", 3), SplitPart("b")], whole_shards=True)
    made = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all", name="other")
    assert contents(tmp_path / "all") == contents(copied)
    assert not made.how.keys() & {"rewritten", "copy"} and sum(made.how.values()) == 3
    assert (made.info["name"], made.info["split"]) == ("other", "all")
    assert made.info["plan"]["merged"][0]["digest"] == Split(tmp_path / "a").digest


def test_names_that_clash_are_refused_or_told_apart(copied: Path, rough: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"5 names in more than one .*'plain', 'dir/por\.trait'.*--prefix"):
        merge([copied, rough], tmp_path / "both")
    assert not list(tmp_path.iterdir())
    merge([copied, rough], tmp_path / "both", prefix=True)
    there, want = contents(tmp_path / "both"), contents(copied)
    assert set(there) == set(want) | {f"train/{id}" for id in want}
    for id, (_, frames, data, described, captions) in want.items():
        assert there[id][1:] == (frames, data, described, captions)
        assert there[f"train/{id}"][1:] == (frames, data, described | {"id": f"train/{id}"}, captions)
    told = [json.loads(line)["id"] for line in rejects(tmp_path / "both")]
    assert sorted(told) == [*(f"gone{i}" for i in range(5)), "train/dir/por.trait"]
    assert verify(tmp_path / "both", 1) == []


def test_an_ellipsis_stands_only_for_names_that_are_left_out(copied: Path, tmp_path: Path) -> None:
    split(copied, tmp_path, [SplitPart("some", ids=frozenset(["plain", "web"]))])
    with pytest.raises(ShardError, match=r"2 names in more than one .*: 'plain', 'web'\)\. If"):
        merge([tmp_path / "some", copied], tmp_path / "both")
    assert [first_few("abcd"[:n]) for n in (0, 3, 4)] == ["", "a, b, c", "a, b, c, …"]


def test_only_shards_with_a_clash_are_written_anew(copied: Path, tmp_path: Path) -> None:
    split(copied, tmp_path, [SplitPart("some", ids=frozenset(["plain"]))])
    made = merge([tmp_path / "some", copied], tmp_path / "all", prefix=True)
    assert made.how["rewritten"] == 1 and sum(made.how.values()) == 4
    assert "copy/plain" in contents(tmp_path / "all")


def test_profiles_that_differ_are_refused(copied: Path, intra: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"differ in their profile \(chroma: None and 420; .*name: copy and intra"):
        merge([copied, intra], tmp_path / "both")
    with pytest.raises(ShardError, match="at least two different"):
        merge([copied, copied.parent / "copy"], tmp_path / "both")


def test_nothing_is_overwritten_or_left_behind(copied: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_text("mine")
    with pytest.raises(ShardError, match="exists already and is not empty"):
        split(copied, tmp_path / "out", [SplitPart("b", 2), SplitPart("a")])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarcopy.os, "copy_file_range", full)
    assert main(["split", str(copied), "--out", str(tmp_path / "other"), "--parts", "a=1"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list((tmp_path / "other").iterdir()) == []


def test_file_systems_without_links_or_ranges(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(copied, tmp_path / "1", [SplitPart("a", 2), SplitPart("b")], seed=1)

    def no(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for where, name in ((tarcopy.os, "copy_file_range"), (tarcopy.os, "link"), (tarcopy.fcntl, "ioctl")):
        monkeypatch.setattr(where, name, no)
    made = split(copied, tmp_path / "2", [SplitPart("a", 2), SplitPart("b")], seed=1)
    assert set((made[0].how + made[1].how).keys()) <= {"copy", "rewritten"}
    for name in "ab":
        assert files(tmp_path / "2" / name) == files(tmp_path / "1" / name)


def test_a_source_that_ends_too_early_is_an_error(copied: Path, tmp_path: Path) -> None:
    with open(copied / "000000.tar", "rb") as source, open(tmp_path / "out", "wb") as target:
        size = os.stat(copied / "000000.tar").st_size
        with pytest.raises(OSError, match="ends 10 bytes before"):
            tarcopy.copy_range(source.fileno(), size - 90, target.fileno(), 100)

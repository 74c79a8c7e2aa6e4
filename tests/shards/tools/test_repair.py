"""repair brings back, byte for byte, what stood beside a tar, and touches a tar only when it is told to."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from c4c.shard import main
from shards import ShardError
from shards.annotations import Item
from shards.packing.plan import input_digest
from shards.split import Split
from shards.tar import read_index
from shards.tools.repair import repair
from shards.tools.verify import verify
from shards.video.profiles import Profile
from tests.shards.sets import COPY, files, packed
from tests.videos import encode


def damaged(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "train"))


def strip(split: Path, *suffixes: str) -> None:
    for path in list(split.iterdir()):
        if path.suffix in suffixes:
            path.unlink()


def cut(tar: Path, at: int) -> None:
    with open(tar, "rb+") as file:
        file.truncate(at)


# ---- undamaged tars ----


@pytest.mark.parametrize("profile", ["copied", "intra"])
def test_tars_alone_give_everything_back(profile: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = request.getfixturevalue(profile)
    split = damaged(whole, tmp_path)
    strip(split, ".idx", ".parquet", ".json", ".jsonl", ".lock")
    steps = []
    done = repair(split, name="set", workers=1, on_shard=lambda *s: steps.append(s))
    assert [(d.shard, d.done, d.videos) for d in done] == [
        ("000000", "rebuilt", 2), ("000001", "rebuilt", 2), ("000002", "rebuilt", 1),
    ]  # fmt: skip
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert files(split) == files(whole)


@pytest.mark.parametrize("profile", [COPY, Profile(name="h264", fps=5, short_side=64)], ids=["cut copies", "h264"])
def test_numbers_and_times_of_the_source_come_back(profile: Profile, items: list[Item], tmp_path: Path) -> None:
    clips = [replace(item, start=0.6, end=1.1) for item in (items[0], items[1], items[4])]
    packed(clips, tmp_path / "set", profile, shard_videos=3)
    before = files(tmp_path / "set")
    assert Split(tmp_path / "set").info["videos"] == 3
    strip(tmp_path / "set", ".idx", ".parquet")
    repair(tmp_path / "set", workers=1)
    assert files(tmp_path / "set") == before


def test_processes_make_no_difference(rough: Path, tmp_path: Path) -> None:
    split = damaged(rough, tmp_path)
    strip(split, ".idx")
    repair(split, workers=2)
    assert files(split) == files(rough)


@pytest.mark.parametrize("lost", ["000000", "000001", "000002", "000004", "dataset"])
def test_rejects_find_their_shard_again(lost: str, rough: Path, tmp_path: Path) -> None:
    assert len(Split(rough).shards) == 5 and Split(rough).info["rejected_videos"] == 5
    split = damaged(rough, tmp_path)
    for path in split.glob(f"{lost}.[ijp]*"):
        path.unlink()
    done = repair(split, name="set", workers=1)
    assert [d.shard for d in done if d.done == "rebuilt"] == [lost] * (lost != "dataset")
    if lost == "dataset":  # what was rejected cannot be known from here to have been the whole input
        info = json.loads((rough / "dataset.json").read_text())
        assert json.loads((split / "dataset.json").read_text()) == info | {"plan": info["plan"] | {"input": None}}
        shutil.copy(rough / "dataset.json", split)
    assert files(split) == files(rough)


def test_only_what_disagrees_is_rebuilt(copied: Path, tmp_path: Path) -> None:
    split = damaged(copied, tmp_path)
    shutil.copy(split / "000000.parquet", split / "000001.parquet")
    (split / "000002.idx").write_text("v1.2 0\n")
    assert [d.done for d in repair(split, workers=1)] == ["kept", "rebuilt", "rebuilt"]
    assert files(split) == files(copied)
    assert [d.done for d in repair(split, workers=1)] == ["kept"] * 3
    assert [d.done for d in repair(split, workers=1, everything=True)] == ["rebuilt"] * 3
    assert files(split) == files(copied)


# ---- damaged tars ----


def end_of_video(split: Path) -> None:
    last = Split(split).video(3)
    cut(split / "000001.tar", last.offset + last.size // 2)


def end_of_json(split: Path) -> None:
    last = Split(split).video(3)
    cut(split / "000001.tar", last.offset + -(-last.size // 512) * 512 + 512 + 100)


def end_of_archive(split: Path) -> None:
    last = Split(split).video(3)
    cut(split / "000001.tar", last.offset - 512)  # where the next sample would begin: only the end mark is missing


def header(split: Path) -> None:
    last = Split(split).video(3)
    data = bytearray((split / "000001.tar").read_bytes())
    data[last.offset - 512 : last.offset] = b"x" * 512
    (split / "000001.tar").write_bytes(data)


@pytest.mark.parametrize("damage", [end_of_video, end_of_json, end_of_archive, header], ids=lambda d: d.__name__)
def test_a_damaged_end_is_cut_only_when_told(damage: Callable, copied: Path, tmp_path: Path) -> None:
    split = damaged(copied, tmp_path)
    damage(split)
    before = files(split)
    with pytest.raises(
        ShardError, match=r"000001\.tar is damaged after sample 'web': .*Whole samples before that: 1.*--truncate"
    ):
        repair(split, workers=1)
    assert files(split) == before
    done = repair(split, workers=1, truncate=True)
    assert [(d.done, d.videos, len(d.lost)) for d in done] == [("kept", 2, 0), ("cut", 1, 1), ("kept", 1, 0)]
    assert (split / "000001.tar.damaged").read_bytes() == before["000001.tar"]
    assert [Split(split).video(i).key for i in range(4)] == [Split(copied).video(i).key for i in (0, 1, 2, 4)]
    assert Split(split).read(Split(split).video(2)) == Split(copied).read(Split(copied).video(2))
    assert Split(split).info["plan"]["input"] is None  # or the packing command would call it complete


def test_what_is_cut_verifies_and_is_packed_anew_only_elsewhere(items, copied: Path, tmp_path: Path) -> None:
    split = damaged(copied, tmp_path)
    end_of_video(split)
    assert main(["repair", str(split), "--truncate", "--workers", "1"]) == 0
    assert verify(split, 1) == []
    with pytest.raises(ShardError, match=r"different packing \(input: None there"):
        packed(items, split)


def test_a_video_that_does_not_decode_is_dropped_only_when_told(copied: Path, tmp_path: Path) -> None:
    split = damaged(copied, tmp_path)
    first = Split(split).video(0)
    with open(split / "000000.tar", "rb+") as file:
        file.seek(first.offset)
        file.write(bytes(first.size))
    strip(split, ".parquet")
    before = files(split)
    with pytest.raises(ShardError, match=r"000000\.tar: plain: not a readable video file.*--drop"):
        repair(split, workers=1)
    assert (split / "000000.tar").read_bytes() == before["000000.tar"]
    done = repair(split, workers=1, drop=True)
    assert [d.videos for d in done] == [1, 2, 1] and "plain: not a readable" in done[0].lost[0]
    opened = Split(split)
    assert len(opened) == 4 and opened.video(0).id == "dir/por.trait"
    assert opened.read(opened.video(0)) == Split(copied).read(Split(copied).video(1))
    assert opened.json(opened.video(0)) == Split(copied).json(Split(copied).video(1))
    (reject,) = map(json.loads, (split / "rejects.jsonl").read_text().splitlines())
    assert reject["id"] == "plain" and "damaged in the tar" in reject["reason"]
    assert (split / "000000.tar.damaged").read_bytes() == before["000000.tar"]


def flip(tar: Path, at: int) -> None:
    with open(tar, "rb+") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 1
        file.seek(at)
        file.write(bytes([byte]))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["video", "json"])
@pytest.mark.parametrize("options", [("--all",), ("--drop",), ("--all", "--drop")])
def test_changed_bytes_are_never_taken_over(copied: Path, tmp_path: Path, capsys, what: str, options: tuple) -> None:
    """The sample still decodes, or its JSON can still be read: nothing but the old table's crc32c tells."""
    split = damaged(copied, tmp_path)
    web = Split(split).video(2)
    place = web.offset + web.size - 40 if what == "video" else read_index(split / "000001.idx")["web.json"][0] + 30
    flip(split / "000001.tar", place)
    (problem,) = verify(split, 1)
    assert problem.key == "web" and str(problem).endswith(f"python -m c4c.shard repair {split} --drop")
    before = files(split)
    code = main(["repair", str(split), "--workers", "1", *options])
    said = "".join(capsys.readouterr().err.split())
    if "--drop" not in options:
        assert code == 1 and files(split) == before
        assert re.search(r"web:its.*changedafterpacking\(crc32cdiffers.*leavethesampleout:.*--drop", said), said
        return
    assert code == 0 and "web:its" in said and verify(split, 1) == []
    assert [Split(split).video(i).id for i in range(4)] == [Split(copied).video(i).id for i in (0, 1, 3, 4)]
    assert (split / "000001.tar.damaged").read_bytes() == before["000001.tar"]


def rewritten(split: Path, change: Callable[[dict], object]) -> None:
    """Have the first sample's JSON changed, in a tar that is otherwise as the packer writes it."""
    tar = split / "000000.tar"
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]
    described = json.loads(members[1][1])
    text = change(described)
    members[1] = (members[1][0], (text if isinstance(text, str) else json.dumps(described)).encode())
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as new:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))


ODD = {
    "no rate": lambda d: d.update(fps="1/0"),
    "a huge rate": lambda d: d.update(fps="1e999999999"),
    "a rate that is none": lambda d: d.update(fps=[25]),
    "a huge width": lambda d: d.update(width=10**30),
    "a duration of words": lambda d: d.update(duration="long"),
    "an endless duration": lambda d: d.update(duration=float("inf")),
    "frames below 0": lambda d: d.update(source_frames=-5),
    "huge frame numbers": lambda d: d.update(frame_number=[10**12] * 50),
    "frame numbers that are none": lambda d: d.update(frame_number=7),
    "captions that are none": lambda d: d.update(captions="a man"),
    "captions without text": lambda d: d.update(captions=[{"text": None, "start": 0, "end": 1}]),
    "a profile that is none": lambda d: d.update(profile=["copy"]),
    "a codec that is none": lambda d: d.update(codec={"h": 264}),
    "another rotation": lambda d: d.update(rotation=10**9, profile=d["profile"] | {"name": "intra"}),
    "a list": lambda d: "[1, 2]",
    "nested a thousand deep": lambda d: "[" * 100_000 + "]" * 100_000,
    "an id that is none": lambda d: d.update(id=["plain"]),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_a_json_that_no_packing_writes_is_said_in_a_sentence(copied: Path, tmp_path: Path, capsys, change) -> None:
    split = damaged(copied, tmp_path)
    rewritten(split, change)
    strip(split, ".parquet", ".idx")
    assert main(["repair", str(split), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert "000000.tar" in "".join(said.split()) and "Traceback" not in said and len(said) < 1000, said


# ---- what cannot be repaired ----


def foreign(path: Path, samples: list[dict]) -> Path:
    path.mkdir()
    import webdataset

    with webdataset.TarWriter(str(path / "000000.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"txt": "a caption"}, r"no \.json member \(only mp4, txt\)"),
        (
            {"json": {"caption": "a caption"}},
            r"lacks captions, codec, .*This tar is not a c4c shard, or one of another format",
        ),
    ],
    ids=["txt", "json"],
)
def test_tars_of_other_programs_are_told_apart(more: dict, words: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", [{"__key__": "one", "mp4": encode(5)} | more])
    before = files(folder)
    with pytest.raises(ShardError, match=rf"{words}.*python -m c4c\.shard folder"):
        repair(folder)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["../out.mp4", "/tmp/out.mp4", "sub/one.mp4"])
def test_names_in_a_tar_lead_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "000000.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    with pytest.raises(ShardError, match="which the packer never writes"):
        repair(tmp_path / "in")
    assert [p.name for p in tmp_path.iterdir()] == ["in"] and len(list((tmp_path / "in").iterdir())) == 1


def test_what_is_no_split_is_answered_in_words(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["repair", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(ShardError, match="holds no tar"):
        repair(tmp_path)
    split = damaged(copied, tmp_path)
    (split / "000001.tar").unlink()
    with pytest.raises(ShardError, match=r"000001\.tar is missing"):
        repair(split)
    (split / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"000001\.tar is missing"):
        repair(split)
    (split / "000001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ShardError, match=r"000001\.tar is not a tar"):
        repair(split, workers=1)
    (split / "packing.json").write_text("{}")
    with pytest.raises(ShardError, match="not been packed to its end"):
        repair(split)


def test_profiles_do_not_mix(copied: Path, intra: Path, tmp_path: Path) -> None:
    split = damaged(copied, tmp_path)
    for suffix in ("tar", "idx", "parquet"):
        shutil.copy(intra / f"000001.{suffix}", split)
    with pytest.raises(ShardError, match="must be of one profile"):
        repair(split, workers=1)


def test_the_input_digest_comes_from_the_tars(items: list[Item], copied: Path) -> None:
    assert Split(copied).info["plan"]["input"] == input_digest(items)
    assert COPY.describe() == Split(copied).info["profile"]

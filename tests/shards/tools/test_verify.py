"""verify finds every kind of damage and names what is damaged, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from c4c.shard import main
from shards import ShardError
from shards.split import Split
from shards.tar import read_index
from shards.tools.verify import _verify_video, verify


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def json_at(split: Path, key: str) -> int:
    return next(read_index(p)[f"{key}.json"][0] for p in split.glob("*.idx") if f"{key}.json" in read_index(p))


def in_video(split: Path) -> None:
    video = Split(split).video(2)
    flip(split / "000001.tar", video.offset + video.size // 2)


def in_video_header(split: Path) -> None:
    flip(split / "000001.tar", Split(split).video(2).offset - 500)


def in_json(split: Path) -> None:
    flip(split / "000001.tar", json_at(split, "web") + 20)


def in_json_header(split: Path) -> None:
    flip(split / "000001.tar", json_at(split, "web") - 500)


def in_index(split: Path) -> None:
    offset, _ = read_index(split / "000001.idx")["web.webm"]
    replace(split / "000001.idx", f"webm {offset} ", f"webm {offset + 1} ")


def line_of_index(split: Path) -> None:
    lines = (split / "000001.idx").read_text().splitlines()
    (split / "000001.idx").write_text("\n".join(lines[:-1]) + "\n")


def in_table(split: Path) -> None:
    path = split / "000001.parquet"
    flip(path, path.stat().st_size // 3)


def without(suffix: str) -> Callable[[Path], None]:
    return lambda split: (split / f"000001.{suffix}").unlink()


def end_of_tar(split: Path) -> None:
    """The last sample of the shard loses its end."""
    last = Split(split).video(3)
    with open(split / "000001.tar", "rb+") as file:
        file.truncate(last.offset + last.size // 2)


def padding_of_tar(split: Path) -> None:
    path = split / "000001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def tables_of_another_shard(split: Path) -> None:
    shutil.copy(split / "000000.parquet", split / "000001.parquet")


STREAM = "%D1%81%D1%82%20%D1%80%D0%B8%D0%BC"  # the second video of that shard
DAMAGE = [
    (in_video, {"web": "crc32c differs: its bytes"}),
    (in_video_header, {"web": r"disagree about web\.webm"}),
    (in_json, {"web": "crc32c differs: its json"}),
    (in_json_header, {"web": r"disagree about web\.json"}),
    (in_index, {"web": r"disagree about web\.webm"}),
    (line_of_index, {None: "index cannot be read"}),
    (in_table, {None: "table cannot be read"}),
    (without("tar"), {None: r"000001\.tar is missing"}),
    (without("idx"), {None: r"000001\.idx is missing"}),
    (without("parquet"), {None: r"000001\.parquet is missing"}),
    (end_of_tar, {None: r"the tar has \d+ bytes", STREAM: "tar ends after"}),
    (padding_of_tar, {None: r"the tar has \d+ bytes"}),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damage_is_named_and_nothing_else(copied: Path, tmp_path: Path, damage, expected: dict) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    damage(split)
    found = verify(split, workers=1)
    assert {p.shard for p in found} == {"000001"}
    assert [p.key for p in found] == list(expected)
    for problem in found:
        assert re.search(expected[problem.key], problem.what), problem


@pytest.mark.slow
def test_nothing_is_wrong_with_what_was_packed(copied: Path, intra: Path) -> None:
    steps = []
    assert verify(copied, 2, lambda *step: steps.append(step)) == []
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert verify(intra, 2) == []


@pytest.mark.slow
def test_shards_of_another_set_do_not_pass(copied: Path, intra: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    tables_of_another_shard(split)
    (problem,) = verify(split, workers=1)
    assert (problem.shard, problem.key) == ("000001", None) and "crc32c is not the one in dataset.json" in problem.what
    edit(split, lambda info: info["shards"][1].update(table_crc32c=info["shards"][0]["table_crc32c"]))
    assert {p.key for p in verify(split, workers=1)} > {"plain", "dir%2Fpor%2Etrait"}


def edit(split: Path, change: Callable[[dict], object]) -> None:
    info = json.loads((split / "dataset.json").read_text())
    change(info)
    (split / "dataset.json").write_text(json.dumps(info))


def other_counts(split: Path) -> None:
    np.save(split / "captions.npy", np.array([2, 1, 1, 3, 1], np.uint8))


SPLIT_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another profile": (lambda s: edit(s, lambda i: i["profile"].update(name="intra")), "its json says that it was packed with"),
    "another digest": (lambda s: edit(s, lambda i: i.update(digest="0" * 64)), r"^dataset\.json: digest is 0{64}, the tables say"),
    "rejected": (lambda s: edit(s, lambda i: i.update(rejected_videos=7)), r"^dataset\.json: rejected_videos is 7, the tables say 0"),
    "counts": (other_counts, r"^captions\.npy does not fit the tables"),
    "counts missing": (lambda s: (s / "captions.npy").unlink(), r"^captions\.npy is missing\. Rebuild .*repair"),
    "no counts": (lambda s: (s / "captions.npy").write_bytes(b"PK\3\4"), r"^captions\.npy cannot be read"),
    "rejects": (lambda s: (s / "rejects.jsonl").write_text('{"id": "x"}\n'), r"^rejects\.jsonl does not say what the tables"),
    "no rejects": (lambda s: (s / "rejects.jsonl").unlink(), r"^rejects\.jsonl is missing"),
    "one more shard": (lambda s: (s / "000009.tar").write_bytes(b""), r"^000009\.tar is not a shard of this split"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), SPLIT_DAMAGE.values(), ids=SPLIT_DAMAGE.keys())
def test_every_file_is_checked_against_the_others(copied: Path, tmp_path: Path, damage: Callable, said: str) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    damage(split)
    found = verify(split, workers=1)
    assert any(re.search(said, str(p).removeprefix(f"{p.shard}: {p.key}: ")) for p in found), [*map(str, found)]
    assert all(p.remedy for p in found)


def test_a_frame_table_that_lies_is_found(copied: Path) -> None:
    split = Split(copied)
    video = split.video(0)
    data = split.read(video)
    assert _verify_video(video, data) is None
    for name in ("offset", "size"):
        values = getattr(video.frames, name).copy()
        values[7] += 1
        lies = dataclasses.replace(video, frames=dataclasses.replace(video.frames, **{name: values}))
        assert _verify_video(lies, data) == "the frame table is wrong about frame 7"
    short = type(video.frames)(**{name: values[:-1] for name, values in vars(video.frames).items()})
    assert "50 frames are in the file, the table has 49" in _verify_video(
        dataclasses.replace(video, frames=short), data
    )


def test_pictures_in_colours_that_nobody_can_read_are_found(copied: Path) -> None:
    """An earlier version packed them."""
    split = Split(copied)
    video = next(video for video in map(split.video, range(len(split))) if video.codec == "h264")
    assert _verify_video(video, split.read(video)) is None
    unknown = dataclasses.replace(video, coding=dataclasses.replace(video.coding, colorspace=8))  # YCgCo
    assert "its colours are not known" in _verify_video(unknown, split.read(video))


def test_what_is_not_finished_is_refused(copied: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    (split / "packing.json").write_text(json.dumps(json.loads((split / "dataset.json").read_text())["plan"]))
    (split / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"3 of 3 shards are packed. Run the packing command again"):
        verify(split)


@pytest.mark.slow
def test_the_command_line_says_it_all(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("train", "test"):
        shutil.copytree(copied, tmp_path / name)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/test: all good\n{tmp_path}/train: all good\n"
    in_video(tmp_path / "train")
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/test: all good",
        f"{tmp_path}/train/000001: web: crc32c differs: its bytes changed after packing. Copy the tar again, or leave the "
        f"sample out: python -m c4c.shard repair {tmp_path}/train --drop",
        f"{tmp_path}/train: 1 problem",
    ]
    assert main(["verify", str(tmp_path / "missing")]) == 1
    assert "there is no folder" in capsys.readouterr().err

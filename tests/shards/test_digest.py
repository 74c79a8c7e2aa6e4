"""The digest of a split changes with whatever decides its frames; that of a split of an earlier version stays what it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards import ShardError
from shards.annotations import Caption, Item
from shards.concat import Concat
from shards.digest import BYTES, ROWS, fingerprint, fingerprints
from shards.packing.finish import read_totals
from shards.packing.pack import pack
from shards.split import Split
from shards.tools.repair import repair
from shards.tools.reshard import merge
from shards.tools.verify import verify
from tests.shards.sets import COPY, files, packed
from tests.videos import encode


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of 20 a second, the first of which alone is a keyframe."""
    path = tmp_path_factory.mktemp("gop") / "a.mp4"
    path.write_bytes(encode(60, 20, (64, 48)))
    return path


def cut(video: Path, out: Path, start: float, **options) -> Split:
    items = [Item("a", video, (Caption("x"),), {}, start, 3.0)]
    pack(items, out, dataset="set", split="train", profile=COPY, workers=1, **options)
    return Split(out)


def earlier(split: Path, out: Path) -> Path:
    """A copy of the split as earlier versions wrote it."""
    shutil.copytree(split, out)
    info = json.loads((out / "dataset.json").read_text())
    info["digest"] = read_totals(out, info["profile"], [s["name"] for s in info["shards"]], BYTES).info["digest"]
    assert info.pop("digest_rule") == ROWS
    (out / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
    return out


def test_a_cut_that_is_moved_inside_its_gop_is_another_split(video: Path, tmp_path: Path) -> None:
    one = cut(video, tmp_path / "out", 0.5)
    before = cut(video, tmp_path / "other", 0.5)
    two = cut(video, tmp_path / "out", 1.0, update=True)
    assert one.digest == before.digest and before.video(0).crc32c == two.video(0).crc32c, "the same bytes"
    assert two.digest != before.digest and fingerprint(two.video(0)) != fingerprint(before.video(0))
    assert len(Concat([before, two])) == 2
    with pytest.raises(ShardError, match="hold the same videos"):
        Concat([before, one])


def test_a_row_has_one_fingerprint_however_it_is_read(copied: Path, intra: Path) -> None:
    for path in (copied, intra):
        split, found = Split(path), []
        for name in split.shards:
            with pq.ParquetFile(path / f"{name}.parquet") as file:
                found += fingerprints(file)
        assert found == [fingerprint(split.video(i)) for i in range(len(split))] and len(set(found)) == 5


CHANGES = {
    "size": 1, "crc32c": 1, "codec": "other", "width": 2, "height": 2, "rotation": 90, "mirrored": True, "fps": 7,
    "source_frames": 3, "duration": 0.5, "extradata": b"other", "coding": None,
}  # fmt: skip


def test_all_that_decides_frames_counts_and_the_place_does_not(copied: Path) -> None:
    row = Split(copied).video(0)
    changed = [replace(row, **{name: value}) for name, value in CHANGES.items()]
    for name in ("number", "time", "offset", "size", "key"):
        values = getattr(row.frames, name).copy()
        values[-1] = 1 - values[-1]
        changed.append(replace(row, frames=replace(row.frames, **{name: values})))
    assert len({fingerprint(row), *map(fingerprint, changed)}) == 1 + len(changed)
    assert fingerprint(replace(row, offset=1, shard="other", index=9)) == fingerprint(row)


def test_a_split_of_an_earlier_version_keeps_its_digest(copied: Path, tmp_path: Path) -> None:
    old = earlier(copied, tmp_path / "old")
    before = files(old)
    assert Split(old).digest != Split(copied).digest and verify(old, workers=1) == []
    repair(old, everything=True, workers=1)
    assert files(old) == before and verify(old, workers=1) == []
    for name, wrong in (("digest", "0" * 64), ("digest_rule", ROWS)):
        info = json.loads(before["dataset.json"]) | {name: wrong}
        (old / "dataset.json").write_text(json.dumps(info))
        assert any("digest is" in problem.what for problem in verify(old, workers=1)), name
        repair(old, workers=1)
        assert verify(old, workers=1) == []
    (old / "dataset.json").write_text(json.dumps(info | {"digest_rule": 3}))
    with pytest.raises(ShardError, match="'digest_rule' is 3"):
        Split(old)


def test_what_is_made_of_an_earlier_split_has_the_digest_of_now(
    items: list[Item], copied: Path, tmp_path: Path
) -> None:
    old = earlier(copied, tmp_path / "old")
    packed(items[:2], tmp_path / "a")
    packed(items[2:], tmp_path / "b")
    both = [earlier(tmp_path / name, tmp_path / f"old {name}") for name in "ab"]
    info = merge(both, tmp_path / "merged").info
    assert (info["digest"], info["digest_rule"]) == (Split(copied).digest, ROWS)
    assert packed(items, old, update=True)["digest"] == Split(old).digest != Split(copied).digest, "nothing is changed"
    packed(items[:4], old, update=True)
    packed(items, old, update=True)
    assert files(old) == files(copied)

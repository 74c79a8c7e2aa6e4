"""What a repair had to leave out is remembered, wherever the repair was stopped; one that fails leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from shards import ShardError, tarcopy
from shards.annotations import Item
from shards.split import Split
from shards.tools import rebuild
from shards.tools.repair import repair
from shards.tools.reshard import SplitPart, split
from shards.tools.verify import verify
from tests.shards.sets import files, packed


def counts(items: list[Item]) -> dict:
    """Of the annotations, as a reader counts them."""
    captions = sum(len(item.captions) for item in items)
    return {
        "published": {"videos": None, "captions": None},
        "annotations": {"videos": len(items), "captions": captions},
        "files": len(items),
        "missing": {"videos": 0, "captions": 0},
    }


@pytest.fixture(params=[False, True], ids=["plain", "reconciled"])
def damaged(request: pytest.FixtureRequest, items: list[Item], copied: Path, tmp_path: Path) -> Path:
    """A split of three shards; the bytes of the first video are zeros."""
    out = tmp_path / "train"
    if request.param:
        packed(items, out, workers=1, reconciliation=counts(items))
    else:
        shutil.copytree(copied, out)
    zero(out, 0)
    return out


def zero(out: Path, index: int) -> None:
    video = Split(out).video(index)
    with open(out / f"{video.shard}.tar", "rb+") as file:
        file.seek(video.offset)
        file.write(bytes(video.size))


def cut_short(out: Path, index: int) -> None:
    """Have a tar end inside a video."""
    video = Split(out).video(index)
    os.truncate(out / f"{video.shard}.tar", video.offset + video.size // 2)


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def assert_remembered(out: Path, items: list[Item], lost: list[str]) -> None:
    """The split is in order, names what is lost, and does not pass for all of the videos."""
    assert verify(out, 1) == []
    assert [r["id"] for r in rejects(out)] == lost and all("damaged in the tar: " in r["reason"] for r in rejects(out))
    info = json.loads((out / "dataset.json").read_text())
    assert info["plan"]["input"] is None
    if reconciled := info.get("reconciliation"):
        assert reconciled["rejected"] == {"videos": None, "captions": None}
    with pytest.raises(ShardError, match=r"different packing \(input: None there"):
        packed(items, out, workers=1, reconciliation=counts(items) if reconciled else None)


def test_a_loss_is_remembered_where_another_shard_fails(damaged: Path, items: list[Item]) -> None:
    cut_short(damaged, 4)
    with pytest.raises(ShardError, match=r"000002\.tar is damaged before the first sample"):
        repair(damaged, workers=1, drop=True)
    assert [d.done for d in repair(damaged, workers=1, drop=True, truncate=True)] == ["kept", "kept", "cut"]
    assert_remembered(damaged, items, ["plain", items[4].id])


@pytest.mark.parametrize("step", ["write_atomic", "write_table"])  # of the index, which comes first, and of the table
def test_a_loss_is_remembered_where_the_repair_dies(damaged: Path, items: list[Item], monkeypatch, step: str) -> None:
    def die(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rebuild, step, die)
        repair(damaged, workers=1, drop=True)
    assert [d.done for d in repair(damaged, workers=1, drop=True)] == ["rebuilt", "kept", "kept"]
    assert_remembered(damaged, items, ["plain"])


def test_videos_behind_a_cut_are_named(damaged: Path, items: list[Item]) -> None:
    zero(damaged, 2)
    cut_short(damaged, 3)
    done = repair(damaged, workers=1, drop=True, truncate=True)
    assert [d.videos for d in done] == [1, 0, 1] and len(done[1].lost) == 2
    assert_remembered(damaged, items, ["plain", items[3].id, "web"])


@pytest.mark.parametrize("table", [None, b"no table", "000000"])
def test_a_cut_without_a_table_is_remembered(copied: Path, items: list[Item], tmp_path: Path, table) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    cut_short(out, 3)
    (out / "000001.parquet").unlink()
    if table:
        data = table if isinstance(table, bytes) else (out / f"{table}.parquet").read_bytes()
        (out / "000001.parquet").write_bytes(data)
    repair(out, workers=1, truncate=True)
    assert_remembered(out, items, ["000001.tar"])
    (out / "000001.parquet").unlink()
    repair(out, workers=1)
    assert_remembered(out, items, ["000001.tar"])  # once


def test_where_only_the_end_mark_is_missing_nothing_is_lost(copied: Path, items: list[Item], tmp_path: Path) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    tar = out / "000001.tar"
    tar.write_bytes(tar.read_bytes().rstrip(b"\0") + bytes(600))
    assert [d.videos for d in repair(out, workers=1, truncate=True)] == [2, 2, 1]
    (out / "000001.tar.damaged").unlink()
    assert files(out) == files(copied) and packed(items, out, workers=1)["videos"] == 5


def test_a_good_copy_of_the_tar_takes_the_loss_back(copied: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    zero(out, 0)
    repair(out, workers=1, drop=True)
    shutil.copy(copied / "000000.tar", out)
    (out / "000000.tar.damaged").unlink()
    repair(out, workers=1)
    assert rejects(out) == [] and len(Split(out)) == 5


def test_lines_that_no_packing_writes_do_not_stop_a_repair(copied: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    (out / "rejects.jsonl").write_text('7\n["a"]\n{"reason": "none"}\n')
    (out / "000000.parquet").unlink()
    repair(out, workers=1)
    assert rejects(out) == [{"reason": "none"}] and len(Split(out)) == 5


# ---- failures ----


def full(*_, **__) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_files(folder: Path) -> list[str]:
    gc.collect()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [name for link in links if os.path.lexists(link) and (name := os.readlink(link)).startswith(str(folder))]


@pytest.mark.parametrize("step", ["copy_range", "link_or_copy"])
def test_a_repair_that_fails_leaves_nothing_behind(copied: Path, tmp_path: Path, monkeypatch, step: str) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    cut_short(out, 3)
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(tarcopy if step == "copy_range" else rebuild, step, full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left") as caught:
                repair(out, workers=1, truncate=True)
            held, error = open_files(out), caught.value  # whose traceback keeps a file open that nobody closed
            assert files(out) == before and not held and error.errno == errno.ENOSPC
    assert [d.videos for d in repair(out, workers=1, truncate=True)] == [2, 1, 1]


def test_a_table_that_cannot_be_written_leaves_nothing_behind(copied: Path, tmp_path: Path, monkeypatch) -> None:
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    (out / "000001.parquet").unlink()
    before = files(out)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("shards.packing.rows.pq.write_table", full)
        repair(out, workers=1)
    assert files(out).keys() == before.keys()


def test_a_division_that_fails_closes_its_files(copied: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tarcopy, "copy_range", full)
    with pytest.raises(OSError, match="No space left") as caught:
        split(copied, tmp_path / "out", [SplitPart("a", 1)])
    held, error = open_files(tmp_path), caught.value
    assert not held and error.errno == errno.ENOSPC and not list((tmp_path / "out").iterdir())

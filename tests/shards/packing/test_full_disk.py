"""A disk that is full or broken while a split is written: the file is named and the way on, and the next run goes on."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards import ShardError, tar
from shards.annotations import Item
from shards.packing.worker import Job, pack_shard
from shards.storage import Folder
from shards.tools.repair import repair
from shards.tools.reshard import SplitPart, merge, split
from tests.shards.sets import COPY, files, packed

pytestmark = pytest.mark.slow


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Have every file of a name be on a disk that is full: a link to /dev/full, which gives a real ENOSPC."""
    draft = Folder.draft

    def on(wanted: str) -> None:
        def drafted(self: Folder, name: str, tag: str):
            if name != wanted:
                return draft(self, name, tag)
            link = self.path / f".{name}.{tag}full.tmp"
            link.symlink_to("/dev/full")
            return open(link, "w+b")

        monkeypatch.setattr(Folder, "draft", drafted)

    return on


@pytest.mark.parametrize("name", ["packing.json", "rejects.jsonl", "captions.npy", "dataset.json"])
def test_a_full_disk_names_the_file_and_the_way_on(
    items: list[Item], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full, name: str
) -> None:
    out, missing = tmp_path / "out", [Item("gone", Path("/nowhere/x.mp4"), items[0].captions)]
    with monkeypatch.context():
        full(name)
        with pytest.raises(
            ShardError, match=rf"{out}/{name} cannot be written .*No space left.*run the same command again"
        ):
            packed([*items, *missing], out)
    monkeypatch.undo()
    assert not (out / "dataset.json").exists() and not list(out.glob(".*.tmp")) and os.path.exists("/dev/full")
    assert packed([*items, *missing], out)["videos"] == 5
    assert all(
        files(out)[n] == data for n, data in files(copied).items() if n.endswith((".tar", ".idx")) and n < "000002"
    )


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_full_disk_while_a_shard_is_written(items: list[Item], tmp_path: Path, full, suffix: str) -> None:
    full(f"000000.{suffix}")
    with pytest.raises(OSError, match="No space left") as caught:
        pack_shard(Job("000000", tuple(items[:2]), tmp_path, COPY))
    assert caught.value.errno == errno.ENOSPC and not [
        p for p in tmp_path.iterdir() if p.suffix in (".tmp", ".parquet")
    ]
    if suffix != "tar":  # while the tar is filled, temporary files might be to blame as well
        assert caught.value.filename == f"{tmp_path}/000000.{suffix}"


def test_a_disk_that_fails_is_named_too(items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(tar.os, "fsync", broken)
        with pytest.raises(
            ShardError, match=r"out/\S*packing\.json\S* cannot be written .*Input/output error.*run the same"
        ):
            packed(items, tmp_path / "out")
        with pytest.raises(OSError, match=r"Input/output error.*file\.txt"):
            tar.write_atomic(tmp_path / "file.txt", "text")
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "file.txt").exists()
    assert packed(items, tmp_path / "out")["videos"] == 5


def test_a_failed_repair_leaves_dataset_json_as_it_was(copied: Path, items, tmp_path: Path, monkeypatch, full) -> None:
    packed(items, tmp_path / "out")
    before = files(tmp_path / "out")
    full("dataset.json")
    with pytest.raises(OSError, match="No space left") as caught:
        repair(tmp_path / "out", workers=1)
    assert caught.value.filename.endswith("out/dataset.json") and files(tmp_path / "out") == before


@contextmanager
def room(size: int):
    """No file may become larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 5000, None])  # of the largest file; None: all but the end of the largest
def test_a_full_disk_while_splits_are_merged_or_divided(copied: Path, rough: Path, tmp_path: Path, size) -> None:
    size = max(p.stat().st_size for p in copied.glob("*.tar")) - 10 if size is None else size
    out = tmp_path / "out"
    for make in (
        lambda: merge([copied, rough], out, copy=True, prefix=True),
        lambda: split(copied, out, [SplitPart("a", 0.4), SplitPart("b")], seed=1),
    ):
        with room(size), pytest.raises(OSError, match="File too large") as caught:
            make()
        assert Path(caught.value.filename).is_relative_to(out) and ".tmp" not in caught.value.filename
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_full_disk_under_linked_tars(copied: Path, rough: Path, tmp_path: Path) -> None:
    with room(10), pytest.raises(OSError) as caught:
        merge([copied, rough], tmp_path / "out", prefix=True)
    assert caught.value.filename == f"{tmp_path}/out/000000.idx"


def test_a_source_that_cannot_be_read_is_named(copied: Path, rough: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*_) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", broken)
    with pytest.raises(OSError) as caught:
        merge([copied, rough], tmp_path / "out", copy=True, prefix=True)
    assert caught.value.filename == f"{copied}/000000.tar"
    with pytest.raises(OSError) as caught:
        split(copied, tmp_path / "out", [SplitPart("a", 0.4), SplitPart("b")], seed=1)
    assert Path(caught.value.filename).parent == copied

"""Source videos that are gone while they are packed: nothing is committed as complete, and the next run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Caption, Item
from shards.packing.sources import folders_of
from shards.packing.worker import Job, pack_shard
from shards.split import Split
from tests.shards.sets import COPY, files, packed
from tests.videos import encode

pytestmark = pytest.mark.slow

COUNT = 40


@pytest.fixture
def many(tmp_path: Path) -> list[Item]:
    """Forty videos in one folder, two of which are not there from the start."""
    (tmp_path / "videos").mkdir()
    data = encode(4, 10, (32, 32))
    for i in range(COUNT):
        if i not in (0, 25):
            (tmp_path / f"videos/{i}.mp4").write_bytes(data)
    return [Item(str(i), tmp_path / f"videos/{i}.mp4", (Caption(f"number {i}"),)) for i in range(COUNT)]


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("aside"))


def unmounted(folder: Path) -> None:
    """The folder that it was mounted on shows."""
    moved(folder)
    folder.mkdir()


def emptied(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("aside"))
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("vanish", [moved, unmounted, emptied], ids=lambda f: f.__name__)
def test_a_folder_that_goes_while_packing_ends_it(many: list[Item], tmp_path: Path, vanish: Callable) -> None:
    packed(many, tmp_path / "whole", shard_videos=4, workers=1)
    folder, done = tmp_path / "videos", []

    def on_progress(event) -> None:
        done.append(event)
        if len(done) == 6:
            vanish(folder)

    with pytest.raises(
        ShardError, match=r"(is gone or was replaced|vanish while).*bring the files back, and run the same"
    ):
        packed(many, tmp_path / "out", shard_videos=4, workers=1, on_progress=on_progress)
    assert not (tmp_path / "out/dataset.json").exists() and (tmp_path / "out/packing.json").exists()
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "aside").rename(folder)
    info = packed(many, tmp_path / "out", shard_videos=4, workers=1)
    assert (info["videos"], info["rejected_videos"]) == (COUNT - 2, 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def shard(items: list[Item], out: Path, at: int, do: Callable[[], object]) -> None:
    """Pack one shard; `do` happens before item number `at` is opened."""
    out.mkdir()
    job = Job("000000", tuple(items), out, COPY, folders=folders_of(items))
    pack_shard(job, lambda event: do() if (event.what, event.item) == ("opening", at) else None)


def test_a_few_files_that_go_are_rejected(many: list[Item], tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    shard(many[:12], tmp_path / "out", 3, lambda: [(folder / f"{i}.mp4").unlink() for i in (4, 5, 7, 8, 10)])
    assert len(list((tmp_path / "out").glob("000000.*"))) == 3
    with pytest.raises(ShardError, match=r"5 of the 27 files of this shard .* are gone, one of them .*/22\.mp4"):
        shard(many[12:], tmp_path / "other", 3, lambda: [(folder / f"{i}.mp4").unlink() for i in (16, 17, 20, 21, 22)])
    assert list((tmp_path / "other").iterdir()) == []


def test_what_was_not_there_from_the_start_is_rejected(items: list[Item], tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for i in range(4):
        (links / f"{i}.mp4").symlink_to(tmp_path / "nowhere")
    gone = [replace(items[0], id=f"n{i}", path=Path(f"/nowhere/{i}.mp4")) for i in range(4)]
    dangling = [replace(items[0], id=f"d{i}", path=links / f"{i}.mp4") for i in range(4)]
    info = packed([items[0], *gone, *dangling], tmp_path / "out", shard_videos=4)
    assert (info["videos"], info["rejected_videos"]) == (1, 8)
    assert all(json.loads(line)["missing"] for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines())


def test_bad_videos_in_a_row_are_no_folder_that_is_gone(items: list[Item], tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes(b"no video")
    bad = [replace(items[0], id=f"b{i}", path=tmp_path / f"{i}.mp4") for i in range(6)]
    assert packed([*bad, items[0]], tmp_path / "out", shard_videos=3)["rejected_videos"] == 6
    assert len(Split(tmp_path / "out")) == 1

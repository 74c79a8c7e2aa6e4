"""An update that is killed at any step goes on to the same split."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Item
from shards.packing.update import JOURNAL, STAGING
from shards.split import Split
from tests.shards.packing.test_pack import killed
from tests.shards.packing.updates import anew, said, updated
from tests.shards.sets import files, packed
from tests.videos import encode

pytestmark = pytest.mark.slow

# ---- kills ----


def shown(out: Path) -> dict[str, bytes]:
    """What a reader sees of a split that is being updated."""
    others = (".lock", "packing.json", JOURNAL)
    return {
        p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name not in others and p.suffix != ".tmp"
    }


def calls(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> int:
    """How often `action` calls `os.NAME`."""
    real, done = getattr(os, name), []

    def call(*args, **options):
        done.append(args)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, call)
        action()
    return len(done)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_an_update_killed_at_any_step_goes_on(many, decoded, tmp_path: Path, monkeypatch, step: str) -> None:
    begun, old, new = tmp_path / "begun", many[:6], [said(many[0], "new"), *many[2:5], many[6]]
    packed(old, begun)
    shutil.copytree(begun, tmp_path / "out")
    before, expected = files(begun), anew(new, tmp_path)
    steps, journals = calls(monkeypatch, step, lambda: updated(new, tmp_path / "out")), 0
    assert steps > (20 if step == "replace" else 3)
    for nth in range(steps):
        out, late = tmp_path / f"{step}{nth}", nth % 3 == 0 and step == "replace"
        shutil.copytree(begun, out)
        decoded.clear()
        assert killed(monkeypatch, step, nth, late, lambda out=out: updated(new, out))
        try:
            Split(out)
            assert shown(out) in (before, expected)
        except ShardError as error:
            assert "is incomplete" in str(error)
        if (out / JOURNAL).exists():
            journals += 1
            if nth % 2:  # anybody who comes along ends it
                with pytest.raises(ShardError, match="different packing"):
                    packed(old, out)
                assert files(out) == expected
        else:
            assert shown(out) in (before, expected)
        updated(new, out)
        assert files(out) == expected and len(decoded) <= 2
    assert journals > 2


def test_staged_shards_that_are_gone_are_missed(
    many: list[Item], decoded: list[str], tmp_path: Path, monkeypatch
) -> None:
    out, items = tmp_path / "out", [said(item, "new") for item in many[:6]]
    packed(many[:6], out)
    assert killed(monkeypatch, "unlink", 0, True, lambda: updated(items, out))
    assert (out / JOURNAL).exists()
    shutil.rmtree(out / STAGING)
    with pytest.raises(ShardError, match=r"000000\.parquet is gone"):
        updated(items, out)


def test_a_stopped_update_to_another_list_is_no_hindrance(many, decoded, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    packed(many[:6], out)
    assert killed(monkeypatch, "replace", 7, True, lambda: updated(many[:8], out, shard_videos=3))
    items = [said(many[0], "new"), *many[1:9]]
    decoded.clear()
    updated(items, out, shard_videos=3)
    assert files(out) == anew(items, tmp_path, shard_videos=3)


UPDATER = """
import sys
from pathlib import Path
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.video.profiles import Profile
folder, out, new = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "new"
names = sorted(folder.glob("*.mp4"))
items = [Item(p.stem, p, (Caption(f"{p.stem} {new and i % 3 == 0}"),)) for i, p in enumerate(names[2:] if new else names[:6])]
pack(items, out, dataset="set", split="train", profile=Profile(short_side=96), shard_videos=2, workers=1, update=new)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers end with a killed packer on Linux only")
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    folder, data = tmp_path / "videos", encode(100, 24, (320, 240))
    folder.mkdir()
    for i in range(8):
        (folder / f"v{i}.mp4").write_bytes(data if i != 4 else b"not a video")

    def start(out: Path, which: str) -> subprocess.Popen:
        command = [sys.executable, "-c", UPDATER, str(folder), str(out), which]
        return subprocess.Popen(command, cwd=Path(__file__).parents[3], start_new_session=True)

    begun, out, whole, stopped = tmp_path / "begun", tmp_path / "out", tmp_path / "whole", 0
    assert start(begun, "old").wait() == 0
    shutil.copytree(begun, whole)
    began = time.monotonic()
    assert start(whole, "new").wait() == 0
    seconds, rng = time.monotonic() - began, random.Random(3)
    shutil.copytree(begun, out)
    for _ in range(3):
        process = start(out, "new")
        time.sleep(seconds * rng.uniform(0.4, 0.9))
        os.killpg(process.pid, signal.SIGKILL)
        stopped += process.wait() == -signal.SIGKILL
        if (out / "dataset.json").exists():
            assert shown(out) in (files(begun), files(whole))
            if shown(out) == files(whole):
                shutil.rmtree(out)
                shutil.copytree(begun, out)
    assert stopped
    assert start(out, "new").wait() == 0
    assert files(out) == files(whole)

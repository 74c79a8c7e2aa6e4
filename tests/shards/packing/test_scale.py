"""Packing beyond one machine and one good day: parts, Dask, object stores, videos that hang or kill, hostile names."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from c4c.shard import main
from shards import ShardError, VideoError, storage
from shards.annotations import Caption, Item
from shards.packing.pack import finish_parts, missing
from shards.split import Split
from shards.tar import MAX_KEY, read_members, safe_key
from shards.tools.verify import verify
from tests.shards.sets import files, packed

# ---- parts ----


@pytest.mark.slow
def test_parts_make_the_same_split(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*options: str, out: Path) -> str:
        command = ["folder", "--videos", str(folder), "--captions", str(folder / "captions.csv"), "--name", "set"]
        command += ["--profile", "copy", "--shard-videos", "2", "--workers", "1", "--out", str(out), *options]
        assert main(command) == 0
        return capsys.readouterr().err

    run(out=tmp_path / "whole" / "train")
    whole, out = files(tmp_path / "whole" / "train"), tmp_path / "parts" / "train"
    said = run("--part", "2/3", out=out)
    assert "part 2/3 is packed. 3 shards of other parts still missing (000000, 000002, 000003)" in said
    assert sorted(p.name for p in out.glob("*.tar")) == ["000001.tar"] and not (out / "dataset.json").exists()
    assert missing(out) == ["000000", "000002", "000003"]
    with pytest.raises(ShardError, match="incomplete: 1 of 4"):
        Split(out)
    assert main(["finish", str(out)]) == 1
    assert "3 of 4 shards are missing (000000, 000002, 000003)" in capsys.readouterr().err
    begun, before = (out / "packing.json").read_bytes(), (out / "000001.tar").stat().st_mtime_ns
    run("--part", "2/3", out=out)
    assert (out / "000001.tar").stat().st_mtime_ns == before
    run("--part", "3/3", out=out)
    assert "7 videos, 7 captions in 4 shards" in run("--part", "1/3", out=out)
    assert {n: d for n, d in files(out).items() if not n.startswith(".lock")} == whole

    (out / "dataset.json").unlink()  # as if the last part had been killed before its last step
    (out / "packing.json").write_bytes(begun)
    assert main(["finish", str(out)]) == 0
    assert files(out) == whole


def test_parts_share_a_folder_and_nobody_else_does(eight: list[Item], tmp_path: Path) -> None:
    target = storage.output(tmp_path)
    with target.locked((1, 2)):
        with target.locked((2, 2)):
            pass
        torn = [target.draft("000000.tar", "p1of2-"), target.draft("000001.tar", "p2of2-")]
        assert packed(eight, tmp_path, part=(2, 2), workers=1) is None  # sweeps what its own part left, no more
        assert [Path(file.name).exists() for file in torn] == [True, False]
        for attempt in ((1, 2), None):
            with pytest.raises(ShardError, match="being packed by another process"), target.locked(attempt):
                pass
        with pytest.raises(ShardError, match="being packed by another process"):
            finish_parts(tmp_path)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4"])
def test_parts_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["folder", "--videos", ".", "--captions", "c.csv", "--out", "x", "--part", text])
    assert "such as 2/16" in capsys.readouterr().err or text == "-1/4"


# ---- videos that hang or kill, and that are mended ----

SPELL = """
import os, signal, time
import shards.video.profiles
real = shards.video.profiles.store
def store(file, name, *rest):
    if name == "v1.mp4":
        time.sleep(3600)
    if name == "v2.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(file, name, *rest)
shards.video.profiles.store = store
"""


@pytest.mark.slow
def test_a_video_that_hangs_and_one_that_kills_cost_only_themselves(
    eight: list[Item], whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spell").mkdir()
    (tmp_path / "spell" / "sitecustomize.py").write_text(SPELL)
    events, out = [], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "spell"))
        info = packed(eight, out, shard_videos=4, workers=2, timeout=1.0, on_progress=events.append)
    assert (info["videos"], info["rejected_videos"], len(events)) == (5, 3, 8)
    reasons = {r["id"]: r["reason"] for r in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}
    assert reasons["v1"] == "it took longer than 1 s" and reasons["v2"] == "it crashes the program (SIGSEGV)"
    assert not list(out.glob(".*.json")) and not verify(out, 1)

    # a packer that goes on comes to the same verdicts without trying again, as it does while a verdict is on record
    before = files(out)
    (out / "000000.parquet").unlink()
    (out / ".000000.lost.json").write_text(json.dumps({1: reasons["v1"], 2: reasons["v2"]}))
    packed(eight, out, shard_videos=4, workers=1)
    assert files(out) == before

    # and mended ones are packed when that is asked for
    assert packed(eight, out, shard_videos=4, workers=1)["videos"] == 5
    assert packed(eight, out, shard_videos=4, workers=1, retry_rejects=True)["videos"] == 7
    packed(eight, tmp_path / "mended", shard_videos=4, workers=1)
    assert files(out) == files(tmp_path / "mended")


def test_only_shards_with_rejects_are_retried(eight: list[Item], tmp_path: Path) -> None:
    broken = tmp_path / "v5.mp4"
    broken.write_bytes(b"no video")
    mixed = [*eight[:5], replace(eight[5], path=broken), *eight[6:]]
    out = tmp_path / "out"
    packed(mixed, out, workers=1)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    broken.write_bytes(eight[4].path.read_bytes())
    starts = []
    assert packed(mixed, out, workers=1, retry_rejects=True, on_start=lambda *a: starts.append(a))["videos"] == 8
    assert starts == [(6, 8)]
    changed = [n for n, t in before.items() if (out / n).stat().st_mtime_ns != t]
    assert changed == ["000002.tar"] and (out / "rejects.jsonl").read_bytes() == b""


def test_a_pipe_is_not_waited_for(eight: list[Item], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a regular file"), storage.opened(tmp_path / "pipe.mp4"):
        pass


# ---- hostile names ----

NAMES = [
    "../../escape", "/etc/passwd", "a/b", "a\\b", "line\nbreak", "nul\0byte", "..", ".", "-rf", "~", "CON", "nul", "Com1",
    "a.b.c", "x" * 300, "ünï cödé 長", "\u202etxt.exe", "%2e%2e%2f", " ", "'; drop table", "*?[a]", "🎬", "tab\there",
]  # fmt: skip


def test_names_from_data_are_never_paths(eight: list[Item], tmp_path: Path) -> None:
    items = [Item(name, eight[0].path, (Caption("c"),), {"name": name}) for name in NAMES]
    too_long, not_unicode = "長" * MAX_KEY, "bad \udc80"
    out = tmp_path / "deep" / "out"
    odd = [replace(items[0], id=too_long), replace(items[0], id=not_unicode), replace(items[0], id="")]
    info = packed([*items, *odd], out, shard_videos=64, workers=1)
    assert info["videos"] == len(NAMES) and not verify(out, 1)
    split = Split(out)
    assert [split.video(i).id for i in range(len(split))] == NAMES
    assert [split.json(split.video(i))["meta"]["name"] for i in range(len(split))] == NAMES
    for member in read_members(out / "000000.tar"):
        key, extension = member.split(".")
        assert extension in ("mp4", "json") and not set(key) & set("/\\:*?\"<>|\0\n ~'") and len(key) <= MAX_KEY
        assert key.upper() not in ("CON", "NUL", "COM1") and key not in ("", "..")
    reasons = [json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [r.split(":")[0].split(" (")[0] for r in reasons] == [
        "its name is too long", "its name is not valid Unicode", "a video needs a name"]  # fmt: skip
    written = {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {("deep", "out")}  # nothing else was written
    assert len({safe_key(name).lower() for name in NAMES}) == len(NAMES)


def test_captions_and_files_that_are_not_unicode(eight: list[Item], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"v\xff.mp4")
    shutil.copy(eight[0].path, path)
    info = packed([Item("v", path, (Caption("fine"), Caption("bad \udc80")))], tmp_path / "out", workers=1)
    assert (info["videos"], info["captions"], info["rejected_captions"]) == (1, 1, 1)
    assert not verify(tmp_path / "out", 1)

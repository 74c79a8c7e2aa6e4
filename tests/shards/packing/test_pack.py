"""Packing: what is committed, in which order, the same bytes however often it stopped, and bad input named."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards import ShardError
from shards.annotations import Caption, Item
from shards.packing import pack as packing
from shards.packing import scheduler
from shards.packing.worker import Job, Progress, pack_shard
from shards.split import Split
from shards.tar import read_index
from shards.video.profiles import Profile
from shards.video.source import scan
from tests.shards.sets import COPY, INTRA, files, packed
from tests.shards.video.test_video import audio_only

# ---- what is stored ----


def test_copy_stores_the_source_bytes(items: list[Item], copied: Path) -> None:
    split = Split(copied)
    for i, item in enumerate(items):
        video = split.video(i)
        assert split.read(video) == item.path.read_bytes()
        assert (video.id, video.ext) == (item.id, item.path.suffix[1:].lower())
    assert [split.video(i).codec for i in range(5)] == ["h264", "h264", "vp9", "h264", "hevc"]


def test_intra_stores_pictures_of_the_grid(items: list[Item], intra: Path) -> None:
    split = Split(intra)
    numbers = [[0, 8, 16, 25, 33, 41], [0, 9, 18, 29, 38], [0, 8, 16, 24], [0, 8, 16, 25], [0, 10, 20, 30]]
    for i, expected in enumerate(numbers):
        video = split.video(i)
        assert video.frames.number.tolist() == expected == split.json(video)["frame_number"]
        assert (video.codec, video.ext, min(video.width, video.height)) == ("mjpeg", "mp4", 64)
    assert [split.video(i).source_frames for i in range(5)] == [50, 45, 30, 30, 40]
    assert split.json(split.video(1))["source"] == {
        "file": "portrait.mkv",
        "bytes": items[1].path.stat().st_size,
        "codec": "h264",
        "width": 120,
        "height": 160,
    }


def test_a_shard_is_a_run_of_the_input(copied: Path) -> None:
    assert sorted(files(copied)) == sorted(
        [f"00000{i}.{suffix}" for i in range(3) for suffix in ("tar", "idx", "parquet")]
        + ["captions.npy", "dataset.json", "rejects.jsonl"]
    )
    info = json.loads((copied / "dataset.json").read_text())
    assert [(s["name"], s["videos"], s["captions"]) for s in info["shards"]] == [
        ("000000", 2, 3),
        ("000001", 2, 4),
        ("000002", 1, 1),
    ]
    assert (info["videos"], info["captions"], info["name"], info["split"]) == (5, 8, "set", "train")
    assert (info["rejected_videos"], info["rejected_captions"], info["profile"]) == (0, 0, {"name": "copy"})
    assert (copied / "rejects.jsonl").read_bytes() == b""


def test_default_shards_are_16_to_256_videos(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    monkeypatch.setattr(scheduler, "run_locally", lambda some, *_: jobs.append(some))
    monkeypatch.setattr(packing, "finish", lambda *_: {})
    for count, expected in ((10, 10), (40, 16), (1024, 32), (20_000, 256)):
        many = [replace(items[0], id=str(i)) for i in range(count)]
        packed(many, tmp_path / str(count), shard_videos=None)
        assert len(jobs[-1][0].items) == expected
        assert [item for job in jobs[-1] for item in job.items] == many


def test_the_digest_is_of_what_is_stored_and_said(items: list[Item], copied: Path, intra: Path, tmp_path: Path) -> None:
    changed = [replace(items[0], captions=(Caption("other"),)), *items[1:]]
    digests = {packed(changed, tmp_path / "changed")["digest"], Split(copied).digest, Split(intra).digest}
    assert len(digests) == 3


@pytest.mark.slow
@pytest.mark.parametrize("profile", [COPY, INTRA], ids=["copy", "intra"])
def test_bytes_do_not_depend_on_workers(items, copied: Path, intra: Path, tmp_path: Path, profile: Profile) -> None:
    packed(items, tmp_path / "one", profile, workers=1)
    assert files(tmp_path / "one") == files(copied if profile == COPY else intra)


def test_progress_counts_every_input_once(items: list[Item], tmp_path: Path) -> None:
    starts, events = [], []
    broken = replace(items[1], id="broken", path=tmp_path / "missing.mp4")
    out = tmp_path / "out"

    def run() -> None:
        packed([*items, broken], out, on_start=lambda *a: starts.append(a), on_progress=events.append)

    run()
    assert starts == [(0, 6)] and len(events) == 6
    assert sum(e.bytes for e in events) == sum(item.path.stat().st_size for item in items)
    assert [e for e in events if e.rejected] == [Progress(0, "broken: the file is missing", missing=True)]
    (out / "000001.parquet").unlink()
    run()
    assert starts[1:] == [(4, 6)] and len(events) == 8
    run()
    assert starts[2:] == [(6, 6)] and len(events) == 8


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("--profile must be one of .*; got h265", {"name": "h265"}),
        ("--fps 0: must be a whole number", {"fps": 0}),
        ("--fps 500: must be a whole number", {"fps": 500}),
        ("--short-side 8: must be a whole number", {"short_side": 8}),
        ("--quality 0: must be a whole number", {"quality": 0}),
        ("--chroma must be 420 or 444; got 422", {"chroma": 422}),
        ("--quality 32: must be a whole number", {"quality": 32}),
    ],
)
def test_profiles_out_of_range_are_refused(message: str, wrong: dict) -> None:
    with pytest.raises(ShardError, match=message):
        Profile(**wrong)


# ---- stopping and going on ----


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def killed(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, late: bool, action: Callable[[], object]) -> bool:
    """Whether `action` comes to the n-th call of `os.NAME`, before (or `late`: after) which everything ends."""
    real, calls = getattr(os, name), itertools.count()

    def call(*args, **options):
        mine = next(calls) == nth
        if not mine or late:
            real(*args, **options)
        if mine:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, name, call)
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_shard_killed_at_any_rename_is_packed_again(items, copied: Path, tmp_path: Path, monkeypatch, late) -> None:
    whole = {name: data for name, data in files(copied).items() if name.startswith("000000")}
    for nth in range(4):
        out = tmp_path / str(nth)
        out.mkdir()
        job = Job("000000", tuple(items[:2]), out, COPY)
        assert killed(monkeypatch, "replace", nth, late, lambda job=job: pack_shard(job)) == (nth < 3)
        there = {n: d for n, d in files(out).items() if not n.endswith(".tmp")}
        assert all(whole[name] == data for name, data in there.items())  # nothing half-written has a real name
        assert "000000.parquet" not in there or len(there) == 3  # and the parquet comes last
        pack_shard(job)
        assert {n: d for n, d in files(out).items() if not n.endswith(".tmp")} == whole


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_packer_killed_at_any_step_goes_on(items, copied: Path, tmp_path: Path, monkeypatch, step, late) -> None:
    """The packer's own steps around its workers: packing.json, rejects.jsonl, dataset.json, and clearing up."""
    whole, stopped = files(copied), []
    for nth in range(4):
        out = tmp_path / str(nth)
        shutil.copytree(copied, out)
        (out / "packing.json").write_text(json.dumps(json.loads(whole["dataset.json"])["plan"]))
        (out / "dataset.json").unlink()
        (out / ".000001.tar.77.tmp").write_bytes(b"torn")
        stopped.append(killed(monkeypatch, step, nth, late, lambda out=out: packed(items, out)))
        packed(items, out)
        assert files(out) == whole
    assert sum(stopped) >= 2 and not stopped[-1]


def test_a_lost_shard_is_packed_again(items: list[Item], copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(copied, out)
    (out / "000001.parquet").unlink()
    (out / "000002.tar").unlink()
    (out / ".000001.tar.123.tmp").write_bytes(b"torn")
    untouched = (out / "000000.tar").stat().st_mtime_ns
    packed(items, out)
    assert files(out) == files(copied)
    assert (out / "000000.tar").stat().st_mtime_ns == untouched
    with open(out / "000001.tar", "ab") as file:
        file.truncate(1000)
    packed(items, out)
    assert files(out) == files(copied)


def test_a_finished_split_is_left_alone(items: list[Item], copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "run_locally", lambda *_: pytest.fail("packed again"))
    before = {p: p.stat().st_mtime_ns for p in copied.iterdir() if p.name != ".lock"}
    assert packed(items, copied) == json.loads((copied / "dataset.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in before} == before


# ---- refusals ----


def test_a_second_packer_is_refused(items: list[Item], copied: Path) -> None:
    with open(copied / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="being packed by another process"):
            packed(items, copied)
    packed(items, copied)


def test_file_systems_without_locks_are_put_up_with(items, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert packed(items, copied)["videos"] == 5


def test_other_arguments_are_refused_and_nothing_is_lost(items: list[Item], copied: Path, tmp_path: Path) -> None:
    finished, half = tmp_path / "finished", tmp_path / "half"
    for out in (finished, half):
        shutil.copytree(copied, out)
    (half / "packing.json").write_text(json.dumps(json.loads((half / "dataset.json").read_text())["plan"]))
    (half / "dataset.json").unlink()
    (half / "000002.parquet").unlink()
    for out in (finished, half):
        before = files(out)
        for word, attempt in (
            ("profile is copy there, intra asked for", lambda out=out: packed(items, out, INTRA)),
            (
                r"1 video differ \('plain'\).*--update",
                lambda out=out: packed([replace(items[0], captions=(Caption("new"),)), *items[1:]], out),
            ),
            ("shard_videos is 2 there, 3 asked for.*--update", lambda out=out: packed(items, out, shard_videos=3)),
        ):
            with pytest.raises(ShardError, match=f"different packing: .*{word}"):
                attempt()
            assert files(out) == before


def test_files_of_unknown_origin_are_not_touched(items: list[Item], tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ShardError, match=r"000000\.tar and no record"):
        packed(items, tmp_path)
    assert files(tmp_path) == {"000000.tar": b"somebody's"}
    (tmp_path / "packing.json").write_text("{half")
    with pytest.raises(ShardError, match=r"packing\.json is not JSON"):
        packed(items, tmp_path)


def test_two_videos_of_one_name_are_refused(items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"share the name 'plain'.*plain\.mp4.*web\.webm"):
        packed([*items, replace(items[2], id="plain")], tmp_path)
    with pytest.raises(ShardError, match="nothing to pack"):
        packed([], tmp_path)


# ---- bad input ----


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> list[tuple[Item, str]]:
    """Unusable inputs and the reason that each must be given."""
    folder = tmp_path_factory.mktemp("bad")
    good = items[0].path.read_bytes()
    contents = {
        "empty": (b"", "the file is empty (0 bytes)"),
        "text": (b"this is no video\n" * 50, "not a readable video file"),
        "audio": (audio_only(), "no video stream in the file (streams: audio)"),
        "cut": (good[: len(good) // 2], "not a readable video file"),
        "missing": (None, "the file is missing"),
        "folder": (None, "the file cannot be read (Is a directory)"),
        "mute": (good, "it has no caption"),
        "blank": (good, "it has no caption"),
    }
    (folder / "folder.mp4").mkdir()
    out = []
    for name, (data, reason) in contents.items():
        if data is not None:
            (folder / f"{name}.mp4").write_bytes(data)
        captions = {"mute": (), "blank": (Caption(" \t"), Caption(""))}.get(name, (Caption("fine"),))
        out.append((Item(name, folder / f"{name}.mp4", captions), reason))
    return out


def test_bad_input_is_listed_and_the_rest_is_packed(items: list[Item], bad: list, tmp_path: Path) -> None:
    half = replace(items[0], id="half", captions=(Caption("kept"), Caption("  ")))
    mixed = [items[0], *(item for item, _ in bad), half, items[2]]
    events: list[Progress] = []
    info = packed(mixed, tmp_path, on_progress=events.append)
    split = Split(tmp_path)
    assert [split.video(i).id for i in range(len(split))] == ["plain", "half", "web"]
    assert [c["text"] for c in split.captions(1)] == ["kept"]
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    videos = [line for line in lines if "caption" not in line]
    assert [(line["id"], line["path"]) for line in videos] == [(item.id, str(item.path)) for item, _ in bad]
    for line, (_, reason) in zip(videos, bad, strict=True):
        assert line["reason"].startswith(reason)
    captions = [(line["id"], line["caption"]) for line in lines if "caption" in line]
    assert captions == [("blank", " \t"), ("blank", ""), ("half", "  ")]
    assert (info["videos"], info["rejected_videos"], info["rejected_captions"]) == (3, len(bad), 3)
    assert sum(e.rejected is not None for e in events) == len(bad) and len(events) == len(mixed)


def test_a_shard_of_bad_videos_only_is_committed_empty(items: list[Item], bad: list, tmp_path: Path) -> None:
    mixed = [bad[0][0], bad[1][0], items[0]]
    assert [s["videos"] for s in packed(mixed, tmp_path)["shards"]] == [0, 1]
    assert pq.read_table(tmp_path / "000000.parquet").num_rows == 0
    assert read_index(tmp_path / "000000.idx") == {}
    split = Split(tmp_path)
    assert [split.video(i).id for i in range(len(split))] == ["plain"]
    assert split.caption_counts.tolist() == [2]


def test_nothing_but_bad_input_is_an_error(bad: list, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"rejects\.jsonl says why for each. First: empty: the file is empty"):
        packed([item for item, _ in bad], tmp_path)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == len(bad) + 2
    assert not (tmp_path / "dataset.json").exists()
    with pytest.raises(ShardError, match="is incomplete"):
        Split(tmp_path)


def test_a_damaged_frame_rejects_the_video_in_both_profiles(items: list[Item], tmp_path: Path) -> None:
    data = bytearray(items[0].path.read_bytes())
    at = int(scan(bytes(data)).frames.offset[20])
    data[at : at + 60] = bytes(60)
    (tmp_path / "bad.mp4").write_bytes(data)
    for profile in (COPY, INTRA):
        info = packed(
            [Item("bad", tmp_path / "bad.mp4", items[0].captions), items[2]], tmp_path / profile.name, profile
        )
        assert (info["videos"], info["rejected_videos"]) == (1, 1)

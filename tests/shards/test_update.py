"""--update: what comes out is what a new packing would give, nothing is decoded twice, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c4c.shard import main
from shards import ShardError
from shards.annotations import Caption, Item
from shards.packing import scheduler, worker
from shards.packing.pack import pack
from shards.packing.update import JOURNAL, STAGING
from shards.packing.worker import Progress, pack_shard
from shards.schema import JSON_CRCS, REJECTS
from shards.split import Split
from shards.tools.repair import repair
from shards.tools.verify import verify
from shards.video.profiles import Profile
from tests.shards.sets import COPY, INTRA, files, packed
from tests.shards.test_pack import killed
from tests.videos import encode


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Nine small videos with two captions each, the last two of them cut with timed captions."""
    folder = tmp_path_factory.mktemp("nine")
    out = []
    for i in range(9):
        path = folder / f"v{i}.mp4"
        path.write_bytes(encode(8 + i, 12, (64, 48)))
        captions = (Caption(f"caption {i}"), Caption("again", 0.1, 0.3 + i / 10))
        out.append(Item(f"v{i}", path, captions, {"nth": i}, *((0.2, 0.6) if i > 6 else (None, None))))
    return out


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from here on. Shards are packed in this process."""
    names, real = [], worker.store

    def store(file, name: str, *args):
        names.append(name)
        return real(file, name, *args)

    def run_locally(jobs, workers: int, on_progress: Callable[[Progress], None]) -> None:
        for job in jobs:
            pack_shard(job, lambda event: event.what == "done" and on_progress(event.progress))

    monkeypatch.setattr(worker, "store", store)
    monkeypatch.setattr(scheduler, "run_locally", run_locally)
    return names


def updated(items: list[Item], out: Path, profile: Profile = COPY, **options) -> dict:
    return packed(items, out, profile, update=True, **options)


def said(item: Item, *texts: str) -> Item:
    return replace(item, captions=tuple(map(Caption, texts)))


def anew(items: list[Item], tmp_path: Path, profile: Profile = COPY, **options) -> dict[str, bytes]:
    out = tmp_path / "anew"
    shutil.rmtree(out, ignore_errors=True)
    packed(items, out, profile, **options)
    return files(out)


# ---- the same as a new packing ----

CHANGES = {
    "added at the end": (lambda v: v[:7], lambda v: v, ["v7.mp4", "v8.mp4"]),
    "added in front": (lambda v: v[1:], lambda v: v, ["v0.mp4"]),
    "removed": (lambda v: v, lambda v: [*v[:3], *v[4:8]], []),
    "captions": (lambda v: v, lambda v: [said(v[0], "new"), *v[1:7], said(v[7], "a", "b", "c"), v[8]], []),
    "times of a cut": (
        lambda v: v,
        lambda v: [*v[:8], replace(v[8], captions=(Caption("later", 0.3, 0.5), Caption("x", 0, 9)))],
        [],
    ),
    "meta": (lambda v: v, lambda v: [*v[:4], replace(v[4], meta={2: "two", 10: ["ten"]}), *v[5:]], []),
    "order": (lambda v: v, lambda v: v[::-1], []),
    "the cut": (lambda v: v, lambda v: [*v[:7], replace(v[7], end=0.5), v[8]], ["v7.mp4"]),
    "a file of another name": (
        lambda v: [replace(v[0], path=v[1].path), *v[1:]],
        lambda v: v,
        ["v0.mp4"],
    ),
    "all at once": (
        lambda v: v[:8],
        lambda v: [v[8], said(v[0], "new"), *v[2:4], replace(v[7], meta={}), v[5]],
        ["v8.mp4"],
    ),
}


@pytest.mark.parametrize(
    ("change", "profile"),
    [(name, COPY) for name in CHANGES]
    + [(name, Profile(short_side=32)) for name in ("added in front", "captions", "all at once")],
)
def test_an_update_gives_what_packing_anew_gives(many, decoded, tmp_path: Path, change: str, profile: Profile) -> None:
    before, after, new = CHANGES[change]
    out = tmp_path / "out"
    digest = packed(before(many), out, profile)["digest"]
    expected = anew(after(many), tmp_path, profile)
    decoded.clear()
    info = updated(after(many), out, profile)
    assert decoded == new and files(out) == expected
    assert (info["digest"] == digest) == (change == "meta")
    decoded.clear()
    assert updated(after(many), out, profile) == packed(after(many), out, profile) == info and not decoded


def test_only_changed_shards_are_touched(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, starts, events = tmp_path / "out", [], []
    packed(many, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("0*")}
    changed = [*many[:4], said(many[4], "new"), *many[5:]]
    updated(changed, out, on_start=lambda *a: starts.append(a), on_progress=events.append)
    touched = {name for name, mtime in before.items() if (out / name).stat().st_mtime_ns != mtime}
    assert touched == {"000002.tar", "000002.idx", "000002.parquet"}
    assert starts == [(7, 9)] and [(e.bytes, e.stored, e.rejected) for e in events] == [(0, True, None)] * 2


def test_shards_keep_their_size_unless_told(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(many[:6], out)
    decoded.clear()
    assert [s["videos"] for s in updated(many[:7], out, shard_videos=None)["shards"]] == [2, 2, 2, 1]
    updated(many[:7], out, shard_videos=5)
    assert decoded == ["v6.mp4"] and files(out) == anew(many[:7], tmp_path, shard_videos=5)


def test_an_update_of_nothing_packs(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    updated(many, tmp_path / "out")
    assert files(tmp_path / "out") == anew(many, tmp_path)


@pytest.mark.parametrize("other", [False, True], ids=["same list", "other list"])
def test_an_unfinished_split_is_brought_up_to_date(many, decoded, tmp_path: Path, other: bool) -> None:
    out, source = tmp_path / "out", tmp_path / "v1.mp4"
    shutil.copy(many[1].path, source)
    items = [many[0], replace(many[1], path=source), *many[2:]]
    info = packed(items, out)
    (out / "packing.json").write_text(json.dumps(info["plan"]))
    for name in ("dataset.json", "000001.parquet", "000004.tar"):
        (out / name).unlink()
    source.write_bytes(encode(30, 12, (64, 48)))
    items = [*items[:6], said(items[6], "new"), *items[7:]] if other else items
    expected = anew(items, tmp_path)
    decoded.clear()
    updated(items, out)
    assert sorted(decoded) == ["v1.mp4", "v2.mp4", "v3.mp4", "v8.mp4"] and files(out) == expected


def test_a_replaced_file_is_packed_again(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "v0.mp4"
    shutil.copy(many[0].path, source)
    items = [replace(many[0], path=source), *many[1:]]
    packed(items, out)
    source.write_bytes(many[5].path.read_bytes())
    expected = anew(items, tmp_path)
    decoded.clear()
    updated(items, out)
    assert decoded == ["v0.mp4"] and files(out) == expected

    source.unlink()  # what is gone stays, also if its reader no longer knows its extension
    items = [replace(items[0], path=tmp_path / "v0"), said(many[1], "new"), *many[2:]]
    decoded.clear()
    info = updated(items, out)
    assert not decoded and (info["videos"], info["rejected_videos"]) == (9, 0)
    assert Split(out).json(Split(out).video(0))["source"]["file"] == "v0.mp4"


def test_rejected_videos_are_tried_again(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, bad, gone = tmp_path / "out", tmp_path / "bad.mp4", tmp_path / "gone.mp4"
    bad.write_bytes(b"no video")
    items = [many[0], Item("bad", bad, (Caption("x"),)), *many[1:4], Item("gone", gone, (Caption("y"),)), *many[4:]]
    packed(items, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.tar")}
    decoded.clear()
    updated(items, out)
    touched = {name for name, mtime in before.items() if (out / name).stat().st_mtime_ns != mtime}
    assert decoded == ["bad.mp4"] and touched == {"000000.tar"}
    for path in (bad, gone):
        shutil.copy(many[0].path, path)
    decoded.clear()
    assert updated(items, out)["videos"] == 11 and decoded == ["bad.mp4", "gone.mp4"]
    assert files(out) == anew(items, tmp_path)
    gone.unlink()
    assert updated([item for item in items if item.id != "gone"], out)["videos"] == 10


def test_rejects_alone_cost_no_tar(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(many[:4], out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.tar")}
    absent = Item("gone", tmp_path / "gone.mp4", (Caption("x"), Caption(" ")))
    items = [*many[:4], absent]
    updated(items, out, shard_videos=2)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before and files(out) == anew(items, tmp_path)
    items = [absent, *many[:4]]
    updated(items, out, shard_videos=5)
    expected = anew(items, tmp_path, shard_videos=5)
    assert files(out) == expected
    before, items = (out / "000000.tar").stat().st_mtime_ns, [*many[:4], absent]
    updated(items, out, shard_videos=5)
    assert (out / "000000.tar").stat().st_mtime_ns == before and files(out) == anew(items, tmp_path, shard_videos=5)


def old_format(out: Path) -> None:
    """Make it what the first version wrote."""
    for path in out.glob("*.parquet"):
        table = pq.read_table(path).drop_columns(["mirrored", "coding"])
        pq.write_table(table, path)
    info = json.loads((out / "dataset.json").read_text())
    info["format"] = info["plan"]["format"] = 1
    for shard in info["shards"]:
        del shard["table_crc32c"]
    (out / "dataset.json").write_text(json.dumps(info))


def test_format_1_is_updated_without_decoding(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    digest = packed(many, out)["digest"]
    tars = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    old_format(out)
    with pytest.raises(ShardError, match=r"its format is 1, this version writes 2\. Run .* --update"):
        packed(many, out)
    repair(out, workers=1)
    assert json.loads((out / "dataset.json").read_text())["format"] == 1  # the tables are still the old ones
    decoded.clear()
    info = updated(many, out)
    # it has the columns of format 2, and remains what it is: nobody has looked at the videos again
    assert not decoded and (info["format"], info["plan"]["format"], info["digest"]) == (1, 2, digest)
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == tars and not verify(out, 1)
    assert all("coding" in pq.read_schema(p).names for p in out.glob("*.parquet"))
    old_format(out)
    updated([said(many[0], "new"), *many[1:]], out)
    assert not decoded and Split(out).info["format"] == 1
    repair(out, everything=True, workers=1)  # which looks at those of profile copy
    assert Split(out).info["format"] == 2


def test_a_damaged_stored_video_is_packed_again(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(many, out)
    video = Split(out).video(0)
    with open(out / "000000.tar", "r+b") as file:
        file.seek(video.offset + video.size // 2)
        file.write(b"damage")
    items = [many[0], said(many[1], "new"), *many[2:]]
    decoded.clear()
    updated(items, out)
    assert decoded == ["v0.mp4"] and files(out) == anew(items, tmp_path)


def test_a_damaged_shard_is_not_replaced(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, items = tmp_path / "out", [said(many[0], "new"), *many[1:]]
    packed(many, out)
    (out / "000002.parquet").unlink()
    before = files(out)
    with pytest.raises(ShardError, match=r"shard 000002 of .* is damaged\. Mend it .*repair"):
        updated(items, out)
    assert files(out) == before
    (out / "000002.tar").unlink()
    updated(items, out)
    assert files(out) == anew(items, tmp_path)


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


@pytest.mark.skipif(sys.platform != "linux", reason="workers end with a killed packer on Linux only")
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    folder, data = tmp_path / "videos", encode(100, 24, (320, 240))
    folder.mkdir()
    for i in range(8):
        (folder / f"v{i}.mp4").write_bytes(data if i != 4 else b"not a video")

    def start(out: Path, which: str) -> subprocess.Popen:
        command = [sys.executable, "-c", UPDATER, str(folder), str(out), which]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)

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


# ---- refusals ----


def test_an_update_is_refused_before_any_work(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"dataset": "set", "split": "train", "shard_videos": 2, "update": True}
    packed(many, out, INTRA)
    before = files(out)
    for word, attempt in (
        (r"short_side is 64 there, 32 asked for.*transcoded", lambda: updated(many, out, replace(INTRA, short_side=32))),
        (r"profile is intra there, copy asked for", lambda: updated(many, out, COPY)),
        (r"the data set is set there, other asked", lambda: pack(many, out, profile=INTRA, **options | {"dataset": "other"})),
        (r"the split is train there, test asked", lambda: pack(many, out, profile=INTRA, **options | {"split": "test"})),
        (r"not one of the 9 videos", lambda: updated([replace(many[0], id="x")], out, INTRA)),
        (r"--part exclude each other", lambda: updated(many, out, INTRA, part=(1, 2))),
        (r"not one of the videos can be packed \(first: v0: it has no caption\)", lambda: updated([said(many[0], " ")], out, INTRA)),
    ):  # fmt: skip
        with pytest.raises(ShardError, match=word):
            attempt()
        assert files(out) == before
    from upath import UPath

    with pytest.raises(ShardError, match="--update needs a folder"):
        updated(many, UPath("memory://bucket/train"), INTRA)


def test_a_refusal_says_what_differs(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    out, half = tmp_path / "out", tmp_path / "half"
    blank = said(many[1], "x", " ")
    packed([many[0], blank, *many[2:8]], out)
    shutil.copytree(out, half)
    (half / "packing.json").write_text(json.dumps(json.loads((half / "dataset.json").read_text())["plan"]))
    (half / "dataset.json").unlink()
    (half / "000003.parquet").unlink()
    items = [many[0], blank, *many[3:]]

    def refusal(items: list[Item], path: Path = out, **options) -> str:
        with pytest.raises(ShardError) as caught:
            packed(items, path, **options)
        return str(caught.value)

    end = " Run the same command with --update to bring it up to date, or choose another --out."
    head = f"{out} holds a different packing: "
    assert refusal([*items[:7], said(items[7], "new")]) == (
        head + "8 videos are asked for, it was made from 8 (1 removed: 'v2'; 1 added: 'v8')." + end
    )
    assert refusal([many[0], blank, said(many[2], "new"), *many[3:8]]) == (
        head + "the captions of 1 video differ ('v2')." + end
    )
    assert refusal([blank, many[0], *many[2:8]]) == head + "the order of the videos differs." + end
    assert "meta" in refusal([replace(many[0], meta={}), blank, *many[2:8]])
    assert refusal([many[0], blank, *many[2:8]], profile=replace(INTRA, fps=4)) == (
        head + "the profile is copy there, intra asked for. Choose another --out."
    )
    assert refusal(items, half) == (
        f"{half} holds a different packing: 8 videos are asked for, of it 6 are packed (1 removed: 'v2')." + end
    )
    assert "not in what is packed so far" in refusal([many[0], blank, *many[2:6]], half)


# ---- the closing table ----


def test_the_closing_table_adds_up(many: list[Item], decoded: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    gone = tmp_path / "gone.mp4"
    items = [
        many[0],
        Item("bad", bad, (Caption("a"), Caption(" "))),
        Item("gone", gone, (Caption("a"), Caption("b"), Caption(""))),
        Item("mute", many[1].path, ()),
        Item("mute and gone", gone, ()),
        said(many[2], "kept", "  ", "kept, too"),
        Item("odd", gone, (Caption("a"),), problem="its captions cannot be read"),
    ]
    counts = {
        "annotations": {"videos": 7, "captions": sum(len(item.captions) for item in items)},
        "missing": {"videos": 0, "captions": 0}, "published": {"videos": None, "captions": None}, "files": 4,
    }  # fmt: skip
    out = tmp_path / "out"
    expected = {
        "packed": {"videos": 2, "captions": 4},
        "rejected": {"videos": 3, "captions": 4},
        "missing": {"videos": 2, "captions": 3},
    }
    told = packed(items, out, reconciliation=counts)["reconciliation"]
    assert {name: told[name] for name in expected} == expected
    repair(out, workers=1, everything=True)
    assert Split(out).info["reconciliation"] == told
    wrong = counts | {"annotations": {"videos": 8, "captions": 11}}
    with pytest.raises(ShardError, match="annotations hold 8 videos, but 2 packed, 3 rejected and 2 missing are 7"):
        packed(items, tmp_path / "wrong", reconciliation=wrong)

    # rejects of an older version do not tell how many captions their videos had
    for path in out.glob("*.parquet"):
        table = pq.read_table(path)
        rejects = json.loads(table.schema.metadata[REJECTS])
        told = [{k: v for k, v in r.items() if k not in ("captions", "missing")} for r in rejects]
        metadata = {REJECTS: json.dumps(told).encode(), JSON_CRCS: table.schema.metadata[JSON_CRCS]}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    repair(out, workers=1)
    assert Split(out).info["reconciliation"]["rejected"] == {"videos": None, "captions": None}
    assert Split(out).info["reconciliation"]["packed"] == expected["packed"]
    decoded.clear()
    told = updated(items, out, reconciliation=counts)["reconciliation"]
    assert {name: told[name] for name in expected} == expected and decoded == ["bad.mp4"]


# ---- on the screen ----


def test_the_command(many: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    captions = tmp_path / "captions.csv"

    def run(*options: str, rows: list[str]) -> tuple[int, str]:
        captions.write_text("video,caption\n" + "\n".join(rows) + "\n")
        command = ["folder", "--videos", str(many[0].path.parent), "--captions", str(captions), "--name", "set"]
        command += ["--profile", "copy", "--workers", "1", "--out", str(tmp_path / "train"), *options]
        code = main(command)
        return code, " ".join(capsys.readouterr().err.split())

    rows = [f"v{i}.mp4,caption {i}" for i in range(4)]
    gone = [f"gone{i}.mp4,x" for i in range(30)]
    code, told = run(rows=rows + gone)
    assert code == 0 and told.count("the file is missing") == 5 and "and 25 more: see" in told
    code, told = run(rows=[*rows[:3], "v3.mp4,new", "v4.mp4,more"])
    assert code == 1 and "30 removed: 'gone0', 'gone1', 'gone2', ...; 1 added: 'v4'" in told and "--update" in told
    code, told = run("--update", rows=[*rows[:3], "v3.mp4,new", "v4.mp4,more"])
    assert code == 0 and "5 videos, 5 captions in 1 shard" in told and "4 were taken from the shards there" in told
    code, told = run("--update", rows=[*rows[:3], "v3.mp4,new", "v4.mp4,more"])
    assert code == 0 and "all of it was there already" in told


def test_a_varying_frame_rate_is_noted(many, decoded, tmp_path: Path, monkeypatch) -> None:
    real = worker.store

    def store(*args):
        stored = real(*args)
        return replace(stored, source=replace(stored.source, drift=2.34))

    monkeypatch.setattr(worker, "store", store)
    events: list[Progress] = []
    packed(many[:1], tmp_path / "out", on_progress=events.append)
    assert [e.note for e in events] == [
        "v0: its frame rate varies: frames are sampled by time; counting frames as the official code does would be up to "
        "2.3 s off (data.sampling=uniform_by_frame)"
    ]

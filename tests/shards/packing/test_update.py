"""--update: what comes out is what a new packing would give, nothing is decoded twice, and a kill costs nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from c4c.shard import main
from shards import ShardError
from shards.annotations import Caption, Item
from shards.packing import worker
from shards.packing.pack import pack
from shards.packing.worker import Progress
from shards.split import Split
from shards.tools.repair import repair
from shards.video.profiles import Profile
from tests.shards.packing.updates import anew, said, updated
from tests.shards.sets import COPY, INTRA, files, packed
from tests.videos import encode

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
    with pytest.raises(ShardError, match=r"shard 000002 of .* is damaged\. Repair it .*repair"):
        updated(items, out)
    assert files(out) == before
    (out / "000002.tar").unlink()
    updated(items, out)
    assert files(out) == anew(items, tmp_path)


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
    assert code == 1 and "30 removed: 'gone0', 'gone1', 'gone2', …; 1 added: 'v4'" in told and "--update" in told
    code, told = run("--update", rows=[*rows[:3], "v3.mp4,new", "v4.mp4,more"])
    assert code == 0 and "5 videos, 5 captions in 1 shard" in told and "4 were taken from existing shards" in told
    code, told = run("--update", rows=[*rows[:3], "v3.mp4,new", "v4.mp4,more"])
    assert code == 0 and "all of it was packed already" in told


def test_what_may_surprise_is_noted(many, decoded, tmp_path: Path, monkeypatch) -> None:
    real = worker.store

    def store(*args):
        stored = real(*args)
        return replace(stored, source=replace(stored.source, drift=2.34, notes=("its pictures change",)))

    monkeypatch.setattr(worker, "store", store)
    events: list[Progress] = []
    packed(many[:1], tmp_path / "out", on_progress=events.append)
    assert [e.note for e in events] == [
        "v0: its pictures change; its frame rate varies: frames are sampled by time; counting frames as the official code does would be up to "
        "2.3 s off (data.sampling=uniform_by_frame)"
    ]

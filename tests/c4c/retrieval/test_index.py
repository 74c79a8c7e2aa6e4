"""`python -m c4c.index`: what is in the index, the second time, after kills, by several processes and ranks."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from c4c import index as command
from c4c.retrieval.encoder import Encoder
from c4c.retrieval.index.store import Store
from pipelines.eval_loader import EvalLoader
from shards.annotations import Caption, Item
from tests.buckets import object_store
from tests.c4c.retrieval.encoders import write
from tests.c4c.retrieval.indexes import Running, contents, run
from tests.often import ranked, ways
from tests.pipelines.conftest import pack_videos
from tests.shards.sets import packed
from tests.videos import encode

pytestmark = [pytest.mark.slow, pytest.mark.launch]  # imports open_clip, DALI and deepspeed; starts ranks

KILLS = 10
SMALL = {"options": {"g": "25", "bf": "2"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "a.safetensors")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of ten videos of 1 to 6 s, one of them below it; what is no video, and a loop of links."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more" / "deep").mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.mp4").write_bytes(encode(25 + 17 * i, 25, [(64, 48), (48, 64), (96, 48)][i % 3], **SMALL))
    (folder / "more" / "deep" / "x.mkv").write_bytes(encode(60, 24, format="matroska"))
    (folder / "more" / "loop").symlink_to(folder)
    for name in ("notes.txt", ".hidden.mp4", "more/._x.mkv", "poster.jpg"):
        (folder / name).write_text("no video")
    return folder


@pytest.fixture(scope="module")
def words(model, videos):
    return ["--ckpt", model, "--videos", videos, "--segment", "2", "--runtime", "torch", "--device", "cpu"]


@pytest.fixture(scope="module")
def unbroken(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "my.index"
    code, said = run(*words, "--out", out)
    assert code == 0, said
    return out


def test_all_videos_are_in_the_index_with_their_segments(unbroken, videos):
    store = Store.open(unbroken)
    assert store.videos() == [*(f"{i}.mp4" for i in range(9)), "more/deep/x.mkv"] and store.failures() == []
    segments = store.segments_of("8.mp4")
    assert [(s.start, s.end) for s in segments] == [
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
        (4, 6),
        (pytest.approx(4.44), pytest.approx(6.44)),
    ]
    assert {s.path for s in segments} == {str(videos / "8.mp4")} and segments[0].duration == pytest.approx(6.44)
    rows = contents(unbroken)
    assert {(row["width"], row["height"]) for row in rows if row["video"] == "1.mp4"} == {(48, 64)}
    assert all(row["thumbnail"][:2] == b"\xff\xd8" for row in rows)
    assert np.allclose(np.linalg.norm([row["vector"] for row in rows], axis=1), 1, atol=1e-6)
    assert store.about.identity["head"] == "meanP" and (store.text_encoder() / "encoder.json").is_file()


@pytest.mark.parametrize("head", ways(["meanP", "wti"], ["meanP"]))
def test_whole_videos_have_the_vectors_of_evaluation(head, videos, tmp_path):
    model = write(tmp_path / "model.safetensors", head)
    files = {name: (videos / name).read_bytes() for name in ("0.mp4", "4.mp4", "8.mp4")}
    split = pack_videos(tmp_path / "set", files, "copy")
    common = ["--ckpt", model, "--segment", "0", "--runtime", "torch", "--device", "cpu"]
    for name, source in (
        ("plain", tmp_path / "set" / "4.mp4"),
        ("plain", tmp_path / "set" / "8.mp4"),
        ("packed", split.path),
    ):
        code, said = run(*common, "--videos", source, "--out", tmp_path / name)
        assert code == 0, said
    encoder = Encoder.load(str(model), device="cpu")
    reader = EvalLoader(split, encoder.data)
    ((indices, frames, mask),) = list(reader)
    reader.close()
    with torch.no_grad():
        _, clips = encoder.model(frames, mask, encoder.tokenizer(["none"], 77))
    plain, packed = Store.open(tmp_path / "plain"), Store.open(tmp_path / "packed")
    assert plain.videos() == ["4.mp4", "8.mp4"] and packed.videos() == ["0", "4", "8"]
    for index, clip in zip(indices.tolist(), clips, strict=True):
        key = split.video(index).key
        for store, one in ((packed, f"{key}#000000"), (plain, f"{key}.mp4#000000")):
            if store is plain and key == "0":
                continue
            vector = encoder.video_vectors(clip[None])[0].numpy()
            assert np.abs(store.vectors_of([one])[one] - vector).max() < 1e-5
            if head == "wti":
                assert np.abs(store.frames_of([one])[one] - clip.numpy()).max() < 2e-3 * clip.abs().max()
    assert packed.segments_of("4")[0].path == f"{split.path}::4"


def test_a_packed_video_that_an_earlier_version_named_by_its_key_is_not_there_twice(words, videos, tmp_path):
    items = [Item(f"sub/{i}", videos / f"{i}.mp4", (Caption("x"),)) for i in (0, 1)]
    packed(items, tmp_path / "set")
    out = tmp_path / "my.index"
    common = [*words[:2], "--videos", tmp_path / "set", *words[4:], "--out", out]
    code, said = run(*common)
    assert code == 0 and "note" not in said and f"2 videos found; loading {words[1]}\n" in said, said
    assert Store.open(out).videos() == ["sub/0", "sub/1"]
    for i in (0, 1):
        names = {"video": f"sub%2F{i}", "id": f"sub%2F{i}#000000"}
        Store.open(out)._segments.update(where=f"video = 'sub/{i}'", values=names)
    code, said = run(*common)
    assert code == 0 and "note: 2 videos of" in said and "--refresh gives each its own" in said, said
    assert Store.open(out).videos() == ["sub%2F0", "sub%2F1"]
    code, said = run(*common, "--refresh")
    assert code == 0 and "note" not in said and f"{out}: 2 videos, " in said, said
    assert Store.open(out).videos() == ["sub/0", "sub/1"]
    assert {row["video"] for row in contents(out)} == {"sub/0", "sub/1"}


def test_only_new_and_changed_videos_the_second_time(words, unbroken, videos, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "my.index"
    folder.mkdir()
    for name in ("0.mp4", "1.mp4", "2.mp4", "3.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    common = [*words[:2], "--videos", folder, *words[4:], "--out", out, "--json", tmp_path / "out.json"]

    def indexed(*more):
        code, said = run(*common, *more)
        assert code == 0, said
        return json.loads((tmp_path / "out.json").read_text()), said

    assert indexed()[0]["videos"] == 4
    before = {known.video: known.written for known in Store.open(out).known()}
    (folder / "4.mp4").write_bytes((videos / "4.mp4").read_bytes())  # new
    (folder / "1.mp4").write_bytes((videos / "8.mp4").read_bytes())  # changed, and longer
    (folder / "2.mp4").unlink()  # vanished
    (folder / "3.mp4").write_bytes(b"no video any more")
    result, said = indexed()
    assert (result["videos"], result["unchanged"], result["vanished"]) == (2, 1, ["2.mp4"])
    assert [row["path"] for row in result["unreadable"]] == [str(folder / "3.mp4")]
    assert "vanished    1 video, not there any more; --prune" in said and "not a readable video file" in said
    store = Store.open(out)
    assert store.videos() == ["0.mp4", "1.mp4", "2.mp4", "4.mp4"] and len(store.segments_of("1.mp4")) == 6
    assert store.failures() == [(str(folder / "3.mp4"), result["unreadable"][0]["reason"])]
    after = {known.video: known.written for known in store.known()}
    assert after["0.mp4"] == before["0.mp4"] and after["1.mp4"] > before["1.mp4"]

    result, said = indexed("--prune")  # what could not be read is told again, and is not tried again
    assert (result["videos"], result["unchanged"], len(result["unreadable"])) == (0, 3, 1) and "removed" in said
    assert Store.open(out).videos() == ["0.mp4", "1.mp4", "4.mp4"]
    (folder / "3.mp4").write_bytes((videos / "3.mp4").read_bytes())
    result, _ = indexed()
    assert (result["videos"], result["unreadable"]) == (1, []) and Store.open(out).failures() == []
    assert indexed("--refresh")[0]["videos"] == 4 and len(Store.open(out)) == len(contents(out))


def versions(out, table="segments"):
    folder = out / f"{table}.lance" / "_versions"
    return len(list(folder.glob("*.manifest"))) if folder.is_dir() else 0


def killed(words, out, draw, kills, check):
    """Start the command `kills` times and kill it at a random moment, after a few commits or before; how many had ended."""
    ended = 0
    for _ in range(kills):
        running = Running([*words, "--out", out, "--commit", "1"])
        target, until = versions(out) + draw.choice([0, 0, 1, 1, 2]), time.monotonic() + 60
        while versions(out) < target and running.processes[0].is_alive() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(draw.random() * (0.02 if target else 1.0))
        ended += not running.processes[0].is_alive()
        running.kill()
        check()
    return ended


def test_killed_at_any_moment_and_resumed_gives_the_index_of_an_unbroken_run(words, unbroken, tmp_path):
    out = tmp_path / "my.index"

    def whole():
        if versions(out, "failures"):  # the last of its tables: before it, there is no index yet
            rows = contents(out)
            have = {row["video"]: row["segments"] for row in rows}
            assert len(rows) == sum(have.values())  # whole videos, each once

    assert killed(words, out, random.Random(18), KILLS, whole) < KILLS // 2
    code, said = run(*words, "--out", out)
    assert code == 0, said
    assert contents(out) == contents(unbroken)


@pytest.fixture
def touched(videos):
    """The videos, all but one of which have another time while a test runs."""
    times = {path: path.stat().st_mtime_ns for path in videos.glob("*.mp4")}
    for path in times:
        os.utime(path, ns=(1, 1))
    yield videos
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))


def test_a_changed_video_is_never_missing_whenever_its_indexing_is_killed(words, touched, unbroken, tmp_path):
    out = tmp_path / "my.index"
    shutil.copytree(unbroken, out)
    whole = len(Store.open(out))

    def present():
        store = Store.open(out)
        assert store.n_videos == 10 and len(store) == whole == len(
            store.search(np.eye(32, dtype=np.float32)[:1], 99)[0]
        )

    assert killed(words, out, random.Random(19), 5, present) < 3
    code, said = run(*words, "--out", out)
    assert code == 0, said
    same = [{**row, "mtime_ns": 1} if not row["video"].endswith("mkv") else row for row in contents(unbroken)]
    assert contents(out) == same


@pytest.mark.parametrize(
    ("ranks", "name"),
    ranked([(n, name) for n in (0, 2) for name in ("SIGINT", "SIGTERM")], {0: {"SIGINT"}, 2: {"SIGTERM"}}),
)
def test_a_signal_stops_it_and_what_is_done_stays(name, ranks, words, videos, tmp_path):
    """Videos that come in one by one, slowly: a commit holds more of them than there are."""
    folder, out = tmp_path / "videos", tmp_path / "my.index"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.mp4").symlink_to(videos / f"{i % 9}.mp4")
    running = Running([*words[:2], *words[4:], "--videos", folder, "--out", out, "--commit", "8"], ranks)
    until = time.monotonic() + 60
    while versions(out) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    for process in running.processes:
        os.kill(process.pid, signal.Signals[name])
    code, said = running.finish()
    assert code == 128 + signal.Signals[name], said
    line = f"stopped by {name}: what is indexed stays, and the same command goes on\n"
    assert line in said and said.count("stopped by") == 1 and "Traceback" not in said, said
    assert 0 < Store.open(out).n_videos < 300


def test_two_processes_at_once_lose_nothing_and_make_nothing_twice(words, unbroken, tmp_path):
    out = tmp_path / "my.index"
    both = [Running([*words, "--out", out, "--commit", "2"]) for _ in range(2)]
    for one in both:
        code, said = one.finish()
        assert code == 0, said
    assert contents(out) == contents(unbroken)


@pytest.mark.nightly
def test_two_ranks_make_the_index_of_one(words, unbroken, tmp_path):
    out, summary = tmp_path / "my.index", tmp_path / "out.json"
    code, said = run(*words, "--out", out, "--json", summary, ranks=2)
    assert code == 0, said
    assert contents(out) == contents(unbroken)
    assert json.loads(summary.read_text())["videos"] == 10 and said.count("10 videos, ") == 1


@pytest.mark.network
def test_an_index_in_a_bucket_is_the_one_on_a_disk(words, unbroken, tmp_path):
    with object_store() as (_, variables):
        pytest.importorskip("s3fs").S3FileSystem().mkdir("bucket")
        for said in ("indexed     10 videos", "indexed     0 videos"):
            code, printed = run(*words, "--out", "s3://bucket/my.index", **variables)
            assert code == 0 and said in printed, printed
        assert contents("s3://bucket/my.index") == contents(unbroken)


def test_mistakes_are_told_in_one_sentence_before_anything_is_made(
    words, unbroken, videos, tmp_path, monkeypatch, capsys
):
    other = write(tmp_path / "b.safetensors", seed=1)
    given = dict(zip(words[::2], words[1::2], strict=True))
    for more, told in (
        ({"--stride": "3"}, "--stride 3: must be at least 0.01 and at most --segment 2"),
        ({"--segment": "0", "--stride": "3"}, "--segment 0 asks for whole videos"),
        ({"--videos": tmp_path / "none"}, "there is no such file or folder"),
        ({"--ckpt": tmp_path / "none"}, "there is no such file or folder"),
        ({"--device": "tpu"}, "--device tpu: must be cpu"),
        ({"--commit": "0"}, "--commit 0: must be at least 1"),
        ({"--json": tmp_path}, "it is a folder"),
        ({"--out": videos}, "it is a folder of other things"),
        ({"--out": "/proc/my.index", "--ckpt": __file__}, "--out /proc/my.index cannot be written"),
        ({"--out": other / "my.index", "--ckpt": __file__}, f"{other} is not a folder"),
        ({"--out": tmp_path, "--json": tmp_path / "out.json"}, "that is --out, or lies in it"),
        ({"--out": unbroken, "--segment": "4"}, f"{unbroken} is an index of segments of 2 s every 1 s, not of segments of 4 s every 2 s"),
        ({"--out": unbroken, "--ckpt": other}, "is an index of checkpoint "),
        ({"--out": unbroken, "--runtime": "onnx"}, "is an index by --runtime torch, not onnx"),
    ):  # fmt: skip
        call = given | {"--out": tmp_path / "my.index"} | more
        monkeypatch.setattr("sys.argv", ["index", *(str(word) for pair in call.items() for word in pair)])
        code, said = command.main(), capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert code == 1 and len(lines) == 1 and told in lines[0] and "Traceback" not in said, said
    assert not (tmp_path / "my.index").exists()


def test_names_that_are_no_text_links_to_nowhere_and_two_folders_with_the_same_names(words, videos, tmp_path):
    data = (videos / "0.mp4").read_bytes()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.mp4").write_bytes(data)
    with open(os.fsencode(tmp_path / "a") + b"/caf\xe9.mp4", "wb") as file:
        file.write(data)
    (tmp_path / "a" / "nowhere.mp4").symlink_to(tmp_path / "nothing")
    common = [*words[:2], *words[4:], "--out", tmp_path / "my.index"]
    code, said = run(*common, "--videos", tmp_path / "a")
    assert code == 0 and "nowhere.mp4: the file is missing" in said, said
    code, said = run(*common, "--videos", tmp_path / "b", tmp_path / "a" / "same.mp4")
    assert code == 0 and "indexed     1 video " in said, said
    store = Store.open(tmp_path / "my.index")
    assert store.videos() == ["b/same.mp4", "caf\\xe9.mp4", "same.mp4"]
    assert store.segments_of("b/same.mp4")[0].path == str(tmp_path / "b" / "same.mp4")
    (tmp_path / "b" / "same.mp4").rename(tmp_path / "b" / "moved.mp4")
    code, said = run(*common, "--videos", tmp_path / "b", "--prune")
    assert code == 0 and Store.open(tmp_path / "my.index").videos() == ["caf\\xe9.mp4", "moved.mp4", "same.mp4"]

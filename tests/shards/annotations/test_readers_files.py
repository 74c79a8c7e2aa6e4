"""Finding video files by name, in folders and behind URLs; whole packings with their reconciliation; hostile names."""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from c4c import shard, shard_console
from shards import ShardError, VideoError
from shards.annotations.files import Files
from shards.split import Split
from shards.storage import opened
from tests.shards.annotations.reading import paths, texts, videos, write
from tests.shards.sets import files, reading
from tests.videos import encode

CLIP = encode(12, 6, (32, 32))


# ---- which file a name stands for ----


def test_the_order_of_preference(tmp_path: Path) -> None:
    names = ("a.avi", "a.webm", "a.mp4", "sub/b.mkv", "sub/b.MP4", "c.d.avi", "c.mp4", "sub/a.json", "e.txt", "é 1.mp4")
    found = Files(videos(tmp_path, *names))
    assert (len(found), len(list(found))) == (8, 8)

    def at(name: str, **options) -> str:
        return str(found.find(name, **options).relative_to(tmp_path))

    assert [at("a"), at("a.webm"), at("a.mov")] == ["a.mp4", "a.webm", "a.mp4"]
    assert [at("b"), at("sub/b"), at("sub/b.mkv"), at("c"), at("c.d")] == [
        "sub/b.MP4", "sub/b.MP4", "sub/b.mkv", "c.mp4", "c.d.avi",
    ]  # fmt: skip
    assert at("é 1") == "é 1.mp4" and not found.absent
    assert [at("b", anywhere=False), at("a.mov", anywhere=False), at("e"), at("d")] == ["b", "a.mov", "e", "d"]
    assert found.absent == {"b", "a.mov", "e", "d"}
    assert at(
        "nothing",
    ) == "nothing" and str(found.find("x", "y", "c")).endswith("c.mp4")


def test_two_folders_with_one_name_are_an_error_only_if_it_is_asked_for(tmp_path: Path) -> None:
    found = Files(videos(tmp_path, "240p/a.mp4", "full/a.mp4", "full/b.mp4"))
    assert found.find("b") and found.find("full/a") == tmp_path / "full" / "a.mp4"
    with pytest.raises(ShardError, match=r"'a' may be 240p/a\.mp4 or full/a\.mp4 under .*give --videos the folder"):
        found.find("a")


def test_links(tmp_path: Path) -> None:
    blobs = videos(tmp_path / "blobs", "1.mp4", "folder/2.mp4")
    root = videos(tmp_path / "videos", "own.mp4")
    (root / "a.mp4").symlink_to(blobs / "1.mp4")
    (root / "inside.mp4").symlink_to(root / "own.mp4")
    (root / "out").symlink_to(blobs / "folder")
    (root / "circle").symlink_to(root)
    closed = Files(root)
    assert list(closed) == ["inside.mp4", "own.mp4"]
    assert "2 links ('a.mp4', 'out') out of --videos" in closed.warnings()[0]
    for name in ("a.mp4", "out/2.mp4"):
        with pytest.raises(ShardError, match=f"{name}' leads out of .*--follow-links"):
            closed.find(name)
    assert list(Files(root, follow_links=True)) == ["a.mp4", "inside.mp4", "out/2.mp4", "own.mp4"]


def test_a_link_that_leads_to_itself_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    root = videos(tmp_path / "videos", "own.mp4")
    (root / "itself.mp4").symlink_to("itself.mp4")
    assert list(Files(root)) == list(Files(root, follow_links=True)) == ["itself.mp4", "own.mp4"]
    with pytest.raises(VideoError, match="cannot be read"), opened(root / "itself.mp4"):
        pass


def test_no_video_found_is_said_before_anything_is_packed(tmp_path: Path) -> None:
    root = videos(tmp_path / "videos", "other.mp4")
    rows = write(tmp_path / "c.csv", "video,caption\na,1\nb,2\n")
    with pytest.raises(ShardError, match=r"not one of 2 videos is among the 1 video file under .*is --videos right"):
        reading("folder", root, "--captions", rows)


# ---- URLs ----


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real http server of the folder `www`, with listings."""
    (tmp_path / "www").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "www")) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_videos_over_http(tmp_path: Path, server: str) -> None:
    for name in ("sub/video0.mp4", "sub/video 1%.mp4", "gone.txt"):
        (tmp_path / "www" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "www" / name).write_bytes(CLIP)
    file = write(tmp_path / "x.json", {"video0.mp4": ["one"], "video 1%.mp4": ["two"], "video2.mp4": ["three"]})
    read = reading("msrvtt", server, "--annotations", file)
    assert [item.id for item in read.items] == ["video0", "video 1%", "video2"]
    assert read.items[0].path.read_bytes() == read.items[1].path.read_bytes() == CLIP
    assert (read.files, read.missing.videos) == (2, 1)
    command = ["msrvtt", "--videos", server, "--annotations", str(file), "--out", str(tmp_path / "out")]
    assert shard.main([*command, "--profile", "copy", "--workers", "1"]) == 0
    split = Split(tmp_path / "out")
    assert [split.video(i).size for i in range(len(split))] == [len(CLIP)] * 2
    with pytest.raises(ShardError, match=r"cannot be listed|no files are listed there"):
        Files(server + "/nowhere")


def test_videos_on_another_file_system(tmp_path: Path) -> None:
    from upath import UPath

    root = UPath("memory://bucket/videos")
    for name in ("a/v_one.mp4", "two.webm"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    told = {f"v_{n}": {"duration": 1, "timestamps": [[0, 1]], "sentences": [n]} for n in ("one", "two", "three")}
    read = reading("activitynet", str(root), "--annotations", write(tmp_path / "train.json", told))
    assert [item.path.read_bytes() for item in read.items[:2]] == [b"a/v_one.mp4", b"two.webm"]
    assert read.missing.videos == 1
    with pytest.raises(ShardError, match="no files are listed there"):
        Files("memory://bucket/none")


# ---- whole packings ----


def test_packing_ends_with_a_reconciliation(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_console, "console", Console(stderr=True, width=120))
    for name, data in (("TrainValVideo/video0.mp4", CLIP), ("TrainValVideo/video1.mp4", b"bad"), ("more.mp4", CLIP)):
        (videos(tmp_path / "videos", name) / name).write_bytes(data)
    data = {
        "videos": [{"video_id": f"video{n}", "category": n} for n in range(3)],
        "sentences": [{"video_id": f"video{n}", "caption": text} for n in range(3) for text in ("one", "two", " ")],
    }
    write(tmp_path / "MSRVTT_data.json", data)
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo2\nvideo0\nvideo1\n")
    command = [
        "msrvtt", "--annotations", str(tmp_path / "MSRVTT_data.json"), "--split", str(tmp_path / "MSRVTT_train.9k.csv"),
        "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "msrvtt" / "train"), "--workers", "1",
    ]  # fmt: skip
    assert shard.main(command) == 0
    info = json.loads((tmp_path / "msrvtt" / "train" / "dataset.json").read_text())
    assert (info["name"], info["split"]) == ("msrvtt", "train")
    assert info["reconciliation"] == {
        "published": {"videos": 9000, "captions": 180_000},
        "annotations": {"videos": 3, "captions": 9},
        "files": 3,
        "missing": {"videos": 1, "captions": 3},
        "rejected": {"videos": 1, "captions": 4},
        "packed": {"videos": 1, "captions": 2},
        "warnings": [
            "9000 videos are published for this split, the given annotations hold 3",
            "180000 captions are published for this split, the given annotations hold 9",
        ],
    }
    split = Split(tmp_path / "msrvtt" / "train")
    assert [c["text"] for c in split.captions(0)] == ["one", "two"]
    told = capsys.readouterr().err
    assert "note 9000 videos are published for this split, the given annotations hold 3" in told
    assert "3 video files found" in told and "note 9000 videos are published, 1 were packed" in told
    assert "videos │ 9000 │ 3 │ 1 │ 1 │ 1" in " ".join(told.split())
    before = files(tmp_path / "msrvtt" / "train")
    assert shard.main(command) == 0 and files(tmp_path / "msrvtt" / "train") == before


TIMES = "0\t1\t0\t1"
SAMPLES = {  # for each reader: its files, one of two there, options, and the captions of the one
    "msrvtt": (
        "video9.webm", {"a.json": {"video9.mp4": ["x", "y"], "video99.mp4": ["z"]}}, "--annotations a.json", ["x", "y"],
    ),
    "msvd": (
        "-4wsuPCjDBc_5_15.avi", {"a.json": {"-4wsuPCjDBc_5_15": ["x"], "b": ["z"]}, "t.txt": "-4wsuPCjDBc_5_15\nb\n"},
        "--annotations a.json --split t.txt", ["x"],
    ),
    "lsmdc": (
        "1012_Film/1012_Film_00.05.16.065-00.05.21.941.avi",
        {"a.csv": f"1012_Film_00.05.16.065-00.05.21.941\t{TIMES}\tx\ngone\t{TIMES}\tz\n"}, "--annotations a.csv", ["x"],
    ),
    "activitynet": (
        "QOlSCBRmfWY.mp4",
        {"a.json": {f"v_{id}": {"duration": 2, "timestamps": [[1, 2], [0, 1]], "sentences": ["x", "y"]}
                    for id in ("QOlSCBRmfWY", "gone0000000")}},
        "--annotations a.json", ["x", "y"],
    ),
    "didemo": (
        "1@N02_2.mov", {"a.json": [{"video": v, "description": d, "times": [[0, 1]]}
                                   for v, d in (("1@N02_2.mov", "x"), ("gone.avi", "z"), ("1@N02_2.mov", "y"))]},
        "--annotations a.json", ["x", "y"],
    ),
    "howto100m": (
        "a/JTMC9ypFtZ0.mp4", {"a.json": {id: {"text": ["x"], "start": [0], "end": [1.5]} for id in ("JTMC9ypFtZ0", "g")}},
        "--annotations a.json", ["x"],
    ),
    "webvid": (
        "videos/000001_000050/1066674784.mp4",
        {"a.csv": "videoid,contentUrl,duration,page_dir,name\n1066674784,u,P,000001_000050,x\n2,u,P,p,z\n"},
        "--annotations a.csv", ["x"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_every_reader_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    video, annotations, options, said = SAMPLES[name]
    (videos(tmp_path / "videos", video) / video).write_bytes(encode(12, 6, (32, 32), "mpeg4", "avi", {}))
    for file, content in annotations.items():
        write(tmp_path / file, content)
    monkeypatch.chdir(tmp_path)
    command = [
        name,
        "--videos",
        "videos",
        "--out",
        "out/train",
        "--workers",
        "1",
        "--profile",
        "copy",
        *options.split(),
    ]
    assert shard.main(command) == 0
    split = Split(tmp_path / "out" / "train")
    counts = split.info["reconciliation"]
    assert (split.info["name"], split.info["split"], len(split), split.video(0).size) == (
        name, "train", 1, (tmp_path / "videos" / video).stat().st_size,
    )  # fmt: skip
    assert [caption["text"] for caption in split.captions(0)] == said and split.caption_counts.tolist() == [len(said)]
    assert (counts["files"], counts["missing"]["videos"], counts["rejected"]["videos"]) == (1, 1, 0)
    assert (counts["annotations"]["videos"], counts["packed"]) == (2, {"videos": 1, "captions": len(said)})
    rejects = [json.loads(line) for line in (tmp_path / "out" / "train" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == ["the file is missing"]


def test_captions_beside_videos_and_in_a_jsonl(tmp_path: Path) -> None:
    root = videos(tmp_path / "v", "a.mp4", "sub/b.mkv", "sub/c.mp4", "two.avi", "two.mp4", "d.mp4")
    write(root / "a.txt", "one\n\n two \n")
    write(
        root / "sub/b.json", {"captions": ["x", {"text": "y", "start": 1, "end": 2.5}], "meta": {"k": 1}, "cut": [1, 5]}
    )
    write(root / "sub/c.json", ["z"])
    write(root / "two.json", {"caption": "same"})
    write(root / "unrelated.json", "not json")
    read = reading("folder", root)
    assert texts(read) == {
        "a": ["one", "two"], "d": [], "sub/b": ["x", "y"], "sub/c": ["z"], "two.avi": ["same"], "two.mp4": ["same"],
    }  # fmt: skip
    item = read.items[2]
    assert (item.captions[1].start, item.captions[1].end, item.meta) == (1.0, 2.5, {"k": 1})
    assert (item.start, item.end) == (1.0, 5.0)
    assert read.warnings == (
        "1 caption file ('unrelated.json') without a video of the same name beside",
        "1 video ('d') without a caption in the annotations",
    )
    lines = [
        {"video": "a.mp4", "caption": "one", "start": 0, "end": 1},
        {"video": "sub/b", "captions": ["x", {"text": "y", "end": 2}], "meta": {"k": 2}},
        {"video": "a.mp4", "caption": "two"},
        {"video": "a.mp4", "id": "a_1", "caption": "three", "cut": [0.5, 2]},
    ]
    file = write(tmp_path / "c.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    read = reading("folder", root, "--captions", file)
    assert texts(read) == {"a": ["one", "two"], "sub/b": ["x", "y"], "a_1": ["three"]}
    assert paths(read, root) == ["a.mp4", "sub/b.mkv", "a.mp4"]
    assert (read.items[2].start, read.items[2].end, read.items[1].meta) == (0.5, 2.0, {"k": 2})
    for line, words in (
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"caption": "x"}', "the video is not named"),
        ('{"video": "a", "caption": 1}', "caption: expected text, found int"),
        ('{"video": "a", "caption": "x", "start": "soon"}', "start is 'soon'"),
        ('{"video": "a", "caption": "x", "cut": [3, 3]}', "not after its start"),
        ('{"video": "a", "caption": "x", "cut": 3}', "cut: expected"),
        ('{"video": "a", "caption": "x"}\n{"video": "a", "caption": "x", "cut": [1, 2]}', 'give each its "id"'),
    ):
        with pytest.raises(ShardError, match=words):
            reading("folder", root, "--captions", write(file, line))


HOSTILE = ("../secret", "/etc/passwd", "a/../../secret", "nul\0")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_read_outside(tmp_path: Path, name: str) -> None:
    root = videos(tmp_path / "videos", "fine.mp4")
    videos(tmp_path, "secret.mp4", "secret")
    folder = json.dumps({"video": "fine", "caption": "x"}) + "\n" + json.dumps({"video": name, "caption": "x"})
    tried = {
        "msrvtt": ("--annotations", write(tmp_path / "a.json", {"fine.mp4": ["x"], f"{name}.mp4": ["x"]})),
        "lsmdc": ("--annotations", write(tmp_path / "b.csv", f"fine\t0\t0\t0\t0\tx\n{name}\t0\t0\t0\t0\tx\n")),
        "didemo": (
            "--annotations",
            write(tmp_path / "c.json", [{"video": n, "description": "x", "times": [[0, 0]]} for n in ("fine", name)]),
        ),
        "howto100m": ("--annotations", write(tmp_path / "d.json", {name: {"text": ["x"], "start": [0], "end": [1]}})),
        "folder": ("--captions", write(tmp_path / "e.jsonl", folder)),
    }
    for reader, options in tried.items():
        with pytest.raises(ShardError, match=r"leads out of|is not named|a NUL character"):
            reading(reader, root, *options)


def test_newlines_and_slashes_in_names_are_escaped(tmp_path: Path) -> None:
    names = ["new\nline", "sla/sh", "..", "x\\..\\y", "tab\t", "%2e%2e%2fz"]
    root = tmp_path / "videos"
    data = {}
    for n, name in enumerate(names):
        (videos(root, f"{n}.mp4") / f"{n}.mp4").write_bytes(CLIP)
        data[name] = f"{n}.mp4"
    lines = (json.dumps({"video": file, "id": name, "caption": "x"}) for name, file in data.items())
    out = tmp_path / "deep" / "out"
    command = ["folder", "--videos", str(root), "--captions", str(write(tmp_path / "c.jsonl", "\n".join(lines)))]
    before = {p for p in tmp_path.rglob("*") if "deep" not in p.parts}
    assert shard.main([*command, "--out", str(out), "--workers", "1", "--profile", "copy"]) == 0
    split = Split(out)
    assert [split.video(i).id for i in range(len(split))] == names
    with tarfile.open(out / "000000.tar") as tar:
        members = tar.getnames()
    assert len(members) == 2 * len(names)
    assert not any(c in name for name in members for c in "/\\\n\t") and not any(n.startswith(".") for n in members)
    assert {p for p in tmp_path.rglob("*") if "deep" not in p.parts} == before
    assert {p.parent for p in (tmp_path / "deep").rglob("*")} == {tmp_path / "deep", out}

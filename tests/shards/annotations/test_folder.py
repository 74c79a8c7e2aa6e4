"""The reader of a folder and a csv, `info`, and the command line that packs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from c4c import shard, shard_console
from shards import ShardError
from shards.annotations import Caption, Counts, Item
from shards.tools.info import describe
from tests.shards.annotations.reading import notes
from tests.shards.sets import files, reading
from tests.videos import encode


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    out = tmp_path / "videos"
    for name in ("a.mp4", "b.MP4", "sub/c.webm", "d.e.mp4", "two.mp4", "two.mkv", "x[1].mp4", "x1.mp4"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"")
    (out / "a.json").write_text("{}")
    return out


def table(folder: Path, text: str | bytes) -> Path:
    path = folder.parent / "captions.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def items(folder: Path, text: str | bytes) -> list[Item]:
    return reading("folder", folder, "--captions", table(folder, text)).items


def test_one_item_a_video_in_the_order_of_the_csv(videos: Path) -> None:
    text = 'video,caption\nb.MP4,first\na.mp4,"two, with a comma"\nb.MP4,"third\nline"\n b.MP4 , spaces \n'
    assert items(videos, text) == [
        Item("b", videos / "b.MP4", (Caption("first"), Caption("third\nline"), Caption("spaces"))),
        Item("a", videos / "a.mp4", (Caption("two, with a comma"),)),
    ]


def test_a_name_may_lack_its_extension(videos: Path) -> None:
    found = items(videos, "video,caption\na,1\nb,2\nsub/c,3\nd.e,4\nx[1],5\n")
    assert [(i.id, i.path.name) for i in found] == [
        ("a", "a.mp4"),
        ("b", "b.MP4"),
        ("sub/c", "c.webm"),
        ("d.e", "d.e.mp4"),
        ("x[1]", "x[1].mp4"),
    ]


def test_what_is_not_there_or_not_clear_is_left_to_the_packer(videos: Path) -> None:
    long = "n" * 300
    rows = table(videos, f"video,caption\nmissing,1\ntwo,2\n{long},3\nno/where.mp4,4\na,5\na,6\n")
    found = reading("folder", videos, "--captions", rows)
    assert found.missing == Counts(4, 4)
    assert notes(found) == ("'two' may be two.mkv or two.mp4: write its extension",)
    assert [(i.id, i.path) for i in found.items[:4]] == [
        ("missing", videos / "missing"),
        ("two", videos / "two"),
        (long, videos / long),
        ("no/where", videos / "no/where.mp4"),
    ]


def test_videos_that_differ_in_their_extension_keep_it(videos: Path) -> None:
    assert [i.id for i in items(videos, "video,caption\ntwo.mp4,1\ntwo.mkv,2\na.mp4,3\n")] == [
        "two.mp4",
        "two.mkv",
        "a",
    ]


def test_times_and_other_columns(videos: Path) -> None:
    text = "\ufeffstart,video,note,caption,end\n1.5,a,ignored,one,3\n,a,,two,\n"  # with the mark that Excel writes
    assert items(videos, text)[0].captions == (Caption("one", 1.5, 3.0), Caption("two"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,text\na,1\n", r"no column caption and video in its header \['file', 'text'\].*video,caption"),
        ("video|caption\na|1\n", "no column caption and video.*semicolons or tabs"),
        ("video,caption,start\na,1,soon\n", "line 2: start is 'soon', not a number of seconds"),
        ("video,caption,start\na,1,1_30\n", "line 2: start is '1_30', not a number of seconds"),
        ("video,caption,end\na,1,nan\n", "line 2: end is 'nan'"),
        ("video,caption\na,1\n,2\n", "line 3: the video is not named"),
        ("video,caption\na,a man, running\n", "line 2: more cells than the header has.*double quotes"),
        ("", "no column"),
        ("video,caption\na,caf\u00e9\n".encode("latin-1"), "is not in UTF-8"),
        ("video,caption\n../../secret,1\n", r"'\.\./\.\./secret' leads out of"),
        ("video,caption\n/etc/passwd,1\n", "'/etc/passwd' leads out of"),
    ],
)
def test_a_csv_that_cannot_be_meant(videos: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        items(videos, text)


def test_a_link_that_leads_out_is_refused(videos: Path) -> None:
    (videos.parent / "outside.mp4").write_bytes(b"")
    (videos / "link.mp4").symlink_to(videos.parent / "outside.mp4")
    with pytest.raises(ShardError, match="leads out of"):
        items(videos, "video,caption\nlink.mp4,1\n")


def test_missing_arguments_are_named(videos: Path) -> None:
    with pytest.raises(ShardError, match=r"--videos .*nowhere: there is no such folder"):
        items(videos / "nowhere", "video,caption\n")
    with pytest.raises(ShardError, match=r"none\.csv: there is no such file"):
        reading("folder", videos, "--captions", videos / "none.csv")


# ---- info ----


def test_info_counts(copied: Path, intra: Path) -> None:
    told = describe(copied)
    assert told["name"] == "set train"
    assert told["profile"] == "copy"
    assert told["videos"] == "5 in 3 shards"
    assert told["left out"] == "nothing"
    assert told["captions"] == "8 (1 to 3, median 1 a video, 1 to 4, median 1 words)"
    assert told["duration"].startswith("0.00 h (1.2 to 2, median 1.33")
    assert told["stored frames"] == "195 (30 to 50, median 40 a video)"
    assert told["stored codec"] == told["source codec"] == "h264 (3), vp9 (1), hevc (1)"
    assert told["frame size"] == "160x120 (3), 120x160 (1), 96x64 (1)"
    assert told["source fps"] == "25 (2), 29.97 (1), 24 (1), 30 (1)"
    assert told["sliceable"] == "4 of 5"
    assert told["digest"] == json.loads((copied / "dataset.json").read_text())["digest"]
    told = describe(intra)
    assert told["profile"] == "intra, fps 3, short_side 64, quality 3, chroma 420"
    assert told["stored frames"] == "23 (4 to 6, median 4 a video)"
    assert (
        told["stored codec"] == "mjpeg (5)"
        and told["source codec"] == "h264 (3), vp9 (1), hevc (1)"
        and told["sliceable"] == "5 of 5"
    )


# ---- the command line ----


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder: two good videos, a bad one, one that is not there, and an empty caption."""
    (tmp_path / "own").mkdir()
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / "own" / name).write_bytes(encode(30, 25))
    (tmp_path / "own" / "bad [x].mp4").write_bytes(b"no video")
    rows = 'one,"a, b"\none,second\ntwo,third\nbad [x],fourth\ngone,fifth\ntwo,\n'
    (tmp_path / "own.csv").write_text("video,caption\n" + rows)
    return tmp_path


def run(own: Path, *more: str) -> int:
    command = ["folder", "--videos", str(own / "own"), "--captions", str(own / "own.csv"), "--out", str(own / "mine")]
    return shard.main([*command, "--workers", "1", *more])


def test_packing_a_folder(own: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_console, "console", Console(stderr=True, width=200))
    assert run(own, "--short-side", "48", "--fps", "2") == 0
    told = capsys.readouterr().err
    assert "rejected bad [x]: not a readable video file" in told
    assert "missing gone: the file is missing" in told
    assert re.search(r"^mine ", told, re.MULTILINE) and "mine mine" not in told
    assert f"{own / 'mine'}: 2 videos, 3 captions in 1 shard" in told
    assert (
        f"1 video and 1 caption missing; 1 video and 2 captions rejected: see {own / 'mine' / 'rejects.jsonl'}" in told
    )
    told = describe(own / "mine")
    assert (told["name"], told["left out"]) == (
        "mine",
        "1 video and 1 caption missing; 1 video and 2 captions rejected",
    )
    assert told["profile"] == "intra, fps 2, short_side 48, quality 3, chroma 420"
    before = files(own / "mine")
    assert run(own, "--short-side", "48", "--fps", "2") == 0
    assert "all of it was packed already" in capsys.readouterr().err
    assert run(own) == 1  # other arguments
    assert "error: " in (told := capsys.readouterr().err) and "different packing" in told
    assert files(own / "mine") == before
    assert shard.main(["info", str(own / "mine")]) == 0
    assert "1 video and 2 captions rejected" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_bad_arguments_are_answered_in_words(own: Path, capsys: pytest.CaptureFixture) -> None:
    for more, words in (
        (("--quality", "0"), "--quality 0: must be a whole number from 1 to 31 with --profile intra"),
        (("--videos", str(own / "none")), "there is no such folder"),
    ):
        assert run(own, *more) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert f"error: {words}" in told or words in told
    assert not (own / "mine").exists()
    with pytest.raises(SystemExit):
        shard.main([])


def test_the_progress_line_fits_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("msrvtt train", "a data set with a name that is long"):
        screen = io.StringIO()
        monkeypatch.setattr(
            shard_console, "console", Console(file=screen, width=80, force_terminal=True, color_system=None)
        )
        with shard_console.bar() as progress:
            task = progress.add_task(name, total=10_000, note="123 videos/s 45.6 MB/s 12 rejects")
            progress.update(task, completed=5000)
        last = [line for line in screen.getvalue().splitlines() if "videos/s" in line][-1].split("\r")[-1]
        assert re.search(r"━+.* 5000/10000 123 videos/s 45\.6 MB/s 12 rejects ETA +-?-?[-:\d]+", last), last
        assert name[:12] in last


def test_two_splits_of_a_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["demo", "--out", str(tmp_path), "--train", "2", "--test", "2", "--workers", "2"]
    assert shard.main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "test", "train"]
    assert describe(tmp_path / "train")["name"] == "demo train"
    assert describe(tmp_path / "test")["profile"] == "intra, fps 3, short_side 64, quality 3, chroma 420"
    assert json.loads((tmp_path / "test" / "dataset.json").read_text())["videos"] == 2


def test_a_disk_that_fails_is_not_a_bad_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions beside a video that cannot be read for now end the command: the video is not left out for good."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.txt").write_bytes(b"\xff\xff\xff")
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self.name == "a.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(ShardError, match=r"a\.txt cannot be read \(Input/output error\)"):
            reading("folder", tmp_path)
    first, second = reading("folder", tmp_path).items
    assert not first.problem and "the text is not in UTF-8" in second.problem


def test_videos_that_the_captions_do_not_name_are_told(videos: Path) -> None:
    text = "video,caption\na,1\nsub/c,2\nx[1].mp4,3\n"
    (videos / "b.gif").write_bytes(b"")  # a preview
    note = "5 video files ('b.MP4', 'd.e.mp4', …) not packed: not in captions.csv"
    assert reading("folder", videos, "--captions", table(videos, text)).warnings == (note,)
    text += "b.MP4,4\nd.e,5\ntwo.mp4,6\ntwo.mkv,7\nx1,8\n"
    assert reading("folder", videos, "--captions", table(videos, text)).warnings == ()


def test_captions_that_were_forgotten_are_asked_for(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is written; and where a file names none, the advice is one that works."""
    out = tmp_path / "out"
    with pytest.raises(
        ShardError, match=r"not one of 8 videos under .* has a caption beside it: .*--captions, .*a\.txt"
    ):
        reading("folder", videos)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.mp4").write_bytes(encode(10, 10, (48, 32)))
    command = ["folder", "--videos", str(tmp_path / "good"), "--out", str(out), "--profile", "copy", "--workers", "1"]
    assert shard.main(command) == 1 and not out.exists()
    command += ["--captions", str(table(videos, "video,caption\na,\n"))]
    capsys.readouterr()
    assert shard.main(command) == 1
    said = capsys.readouterr().err
    assert "not one of the videos has a caption" in said and "--update" in said and "--retry-rejects" not in said
    table(videos, "video,caption\na,one\n")
    assert shard.main([*command, "--update"]) == 0


def test_an_id_of_two_cuts_is_named(videos: Path) -> None:
    path = videos.parent / "captions.jsonl"
    rows = [{"video": "a.mp4", "id": "l1", "cut": [i, i + 1], "caption": "x"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ShardError) as caught:
        reading("folder", videos, "--captions", path)
    assert str(caught.value) == (
        f"{path}, line 2: the id 'l1' is already that of another cut of 'a.mp4' ({path}, line 1). Give each its own"
    )
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "id"}) + "\n" for row in rows))
    with pytest.raises(ShardError, match="needs another name: give each its"):
        reading("folder", videos, "--captions", path)

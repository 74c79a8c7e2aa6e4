"""What `python -m c4c.shard` refuses before it packs, and what it says afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from c4c import packing, shard, shard_console, shard_tools
from shards.tools.info import describe, measure
from tests.videos import encode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shard_console, "console", Console(stderr=True, width=250))
    folder = tmp_path / "data/videos"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"v {i}.mp4").write_bytes(encode(10, 10, (48, 32)))
    return folder


def pack(videos: Path, out: Path, rows: str = "v 0,one\nv 1,two\n", columns: str = "video,caption") -> int:
    captions = videos.parent.parent / "captions.csv"
    captions.write_text(f"{columns}\n{rows}", encoding="utf-8")
    command = [
        "folder",
        "--videos",
        videos,
        "--captions",
        captions,
        "--out",
        out,
        "--workers",
        "1",
        "--profile",
        "copy",
    ]
    return shard.main([str(word) for word in command])


def test_an_out_that_hides_or_holds_something_is_refused(videos: Path, tmp_path: Path, capsys) -> None:
    assert pack(videos, tmp_path / "sets/train") == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for out, words in (
        (videos, "is the folder of the videos: choose another"),
        (videos.parent, "holds the videos"),
        (tmp_path / "sets", "holds a split (train), and a split of its own there would hide it"),
        (tmp_path / "captions.csv", "cannot be written: it is no folder; name one"),
    ):
        assert pack(videos, out) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: --out {out} {words}") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert pack(videos, videos / "packed") == 0
    assert "note --out" in (said := capsys.readouterr().err) and "is inside the folder of the videos" in said
    assert pack(videos, tmp_path / "sets/train") == 0, "what is there goes on"
    assert "all of it was packed already" in capsys.readouterr().err


def test_the_first_rejects_are_shown_and_all_of_them_are_listed(videos: Path, tmp_path: Path, capsys) -> None:
    rows = "v 0,one\n" + "".join(f"my phone/{i} [x],gone\n" for i in range(30)) + "v 1,\n"
    assert pack(videos, tmp_path / "set", rows) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("missing")] == [
        f"missing my phone/{i} [x]: the file is missing" for i in range(5)
    ]
    assert f"and 26 more: see {tmp_path / 'set/rejects.jsonl'}" in said
    assert any(
        line.startswith("30 videos and 30 captions missing; 1 video and 1 caption rejected: see ") for line in said
    )
    listed = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").read_text().splitlines()]
    assert sum("caption" not in one for one in listed) == 31
    assert all(f"my phone/{i} [x]" in {one["id"] for one in listed} for i in range(30))


def test_captions_that_training_would_cut_are_counted(videos: Path, tmp_path: Path, capsys) -> None:
    assert pack(videos, tmp_path / "short") == 0
    assert "tokens" not in capsys.readouterr().err
    long = "v 0,一个男人在厨房里做饭，然后把鸡蛋打进碗里，再用筷子搅拌均匀\nv 1," + "very " * 90 + "long\nv 1,short\n"
    assert pack(videos, tmp_path / "long", long) == 0
    assert (
        "note 2 of 3 captions in the annotations are longer than 32 tokens (CLIP's tokenizer, start and end included; the "
        "longest has 93): they are cut with data.max_words=32, and by backbones that take no more"
    ) in capsys.readouterr().err
    assert shard.main(["info", str(tmp_path / "long")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "beyond 32 tokens 2 of 3 captions, by CLIP's tokenizer beyond 77 tokens 1 of 3 captions" in said
    assert shard.main(["info", str(tmp_path / "long"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["captions"]["tokens"] == {
        "tokenizer": "CLIP's tokenizer", "longest": 93, "beyond": {"32": 2, "77": 1},
    }  # fmt: skip
    assert told["source_codecs"] == {"h264": 2}


def test_a_folder_on_a_server_is_not_looked_at() -> None:
    with pytest.raises(ValueError, match="it is no folder"):
        list(packing.refuse_place(Path(__file__), "s3://bucket/videos"))


def test_mistakes_are_answered_in_one_sentence(videos: Path, tmp_path: Path, capsys) -> None:
    assert pack(videos, tmp_path / "set") == 0
    file, loop, out = tmp_path / "file", tmp_path / "loop", tmp_path / "out"
    file.write_text("")
    loop.symlink_to(loop)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/dataset.json").mkdir()
    folder = ["folder", "--videos", videos, "--out", out, "--captions"]
    for command, words in (
        ([*folder, tmp_path], f"{tmp_path} cannot be read (Is a directory)"),
        ([*folder, "/proc/self/mem"], "/proc/self/mem cannot be read (Input/output error)"),
        ([*folder, file], f"{file}: no column caption and video in its header"),
        (["folder", "--videos", loop, "--out", out], "Symlink loop from"),
        (["msvd", "--videos", videos, "--annotations", videos, "--split", file, "--out", out], "cannot be read (Is a dir"),
        (["verify", tmp_path / "odd"], f"{tmp_path}/odd/dataset.json cannot be read or written (Is a directory)"),
        (["merge", tmp_path / "set", loop, "--out", out], "Symlink loop from"),
        (["split", tmp_path / "set", "--parts", "a=/proc/self/mem", "--out", out], "/proc/self/mem cannot be read (Input/output error)"),
        (["split", tmp_path / "set", "--parts", "a=1", "--out", file], "it is no folder; name one"),
        (["preview", tmp_path / "set", "--out", tmp_path], "it is a folder; name a file"),
        (["frames", tmp_path / "set", "--key", "v 0", "--out", file / "x"], f"{file} is not a folder"),
        (["frames", tmp_path / "set", "--key", "v 0", "--out", out, "--positions", 10**20], "has the stored frames 0 to 9"),
        (["finish", file], f"{file} cannot be read or written (Not a directory)"),
    ):  # fmt: skip
        capsys.readouterr()
        assert shard.main([str(word) for word in command]) == 1, command
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and words in said[0], (command, said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["folder", "--fps", "nan"], "--fps: nan: must be a whole number from 1 to 240"),
        (["msrvtt", "--fps", "1e9"], "--fps: 1e9: must be a whole number from 1 to 240"),
        (["demo", "--short-side", "2.5"], "--short-side: 2.5: must be a whole number from 16 to 4096"),
        (["demo", "--timeout", "long"], "--timeout: long: must be a number above 0 and below 1e+06"),
        (["demo", "--timeout", "inf"], "--timeout: inf: must be a number above 0 and below 1e+06"),
        (["demo", "--timeout", "nan"], "--timeout: nan: must be a number above 0 and below 1e+06"),
        (["demo", "--train", "-1"], "--train: -1: must be a whole number of at least 1"),
        (["demo", "--seed", "-1"], "--seed: -1: must be a whole number from 0 to 2**63 - 1"),
        (["folder", "--workers", "0"], "--workers: 0: must be a whole number of at least 1"),
        (["folder", "--shard-videos", "0"], "--shard-videos: 0: must be a whole number of at least 1"),
        (["folder", "--short-side", "0"], "--short-side: 0: must be a whole number from 16 to 4096"),
        (["folder", "--chroma", "422"], "--chroma: invalid choice: 422 (choose from 420, 444)"),
        (["demo", "--seed", "x" * 10**4], f"--seed: {'x' * 100}: must be a whole number from 0 to 2**63 - 1"),
        (["didemo", "--seconds", "all"], "--seconds: all: must be a number above 0"),
        (["didemo", "--seconds", "0"], "--seconds: 0: must be a number above 0"),
        (["howto100m", "--min-duration", ""], "--min-duration: : must be a number above 0"),
        (["verify", ".", "--workers", "all"], "--workers: all: must be a whole number of at least 1"),
        (["preview", ".", "--width", "2.5"], "--width: 2.5: must be a whole number from 16 to 10000"),
        (["preview", ".", "--frames", f"{10**20}"], f"--frames: {10**20}: must be a whole number from 1 to 10000"),
        (["preview", ".", "--seed", "-1"], "--seed: -1: must be a whole number from 0 to 2**63 - 1"),
        (["repair", ".", "--workers", "-3"], "--workers: -3: must be a whole number of at least 1"),
        (["frames", ".", "--num-frames", "0"], "--num-frames: 0: must be a whole number of at least 1"),
    ],
)
def test_a_number_out_of_range_is_answered_with_the_range(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        shard.main(words)
    assert f"error: argument {said}\n" in capsys.readouterr().err


def test_options_that_nothing_heeds_are_named(videos: Path, tmp_path: Path, capsys) -> None:
    command = [
        "folder",
        "--videos",
        str(videos),
        "--captions",
        str(tmp_path / "captions.csv"),
        "--out",
        str(tmp_path / "set"),
    ]
    (tmp_path / "captions.csv").write_text("video,caption\nv 0,one\n")
    assert shard.main([*command, "--profile", "copy", "--short-side", "256", "--chroma", "444"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note --")]
    assert notes == [f"note --{name}: --profile copy does not use it" for name in ("short-side", "chroma")]
    assert shard.main([*command[:-1], str(tmp_path / "other"), "--short-side", "32"]) == 0
    assert "does not use it" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        shard.main(["info", "s3://bucket/set"])
    assert "s3://bucket/set: this command reads folders only" in capsys.readouterr().err
    assert shard.main(["repair", str(tmp_path / "set"), "--name", "x"]) == 0
    assert f"--name x was not used: {tmp_path / 'set'}/dataset.json says set" in capsys.readouterr().err.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    ("command", "kept"),
    [(["demo", "--out", "x"], True), (["folder", "--videos", ".", "--captions", "c", "--out", "x"], True),
     (["finish", "x"], False), (["merge", "a", "b", "--out", "x"], False), (["verify", "x"], False)],
)  # fmt: skip
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "memory"])
def test_only_packing_says_that_shards_are_kept(command: list[str], kept: bool, stop, monkeypatch, capsys) -> None:
    def run(args) -> int:
        raise stop

    for module, names in ((shard, ("_demo", "_dataset", "_finish")), (shard_tools, ("_merge", "_verify"))):
        for name in names:
            monkeypatch.setattr(module, name, run)
    monkeypatch.setattr(shard_console, "console", Console(stderr=True, width=250))
    assert shard.main(command) == (130 if isinstance(stop, KeyboardInterrupt) else 1)
    said = capsys.readouterr().err
    assert ("ommitted shards are kept" in said) == kept and said.count("\n") == 1
    assert said.startswith("stopped" if isinstance(stop, KeyboardInterrupt) else "error: there is not enough memory")


def test_times_that_cannot_be_right_are_told(videos: Path, tmp_path: Path, capsys) -> None:
    """Of videos of 1 s: captions outside them, or that end before they start; and a cut behind the end of its file."""
    columns = "video,caption,start,end"
    right = "v 0,a,0,1\nv 0,b,0.2,1.4\nv 1,c,,\nv 1,d,0.5,\nv 1,e,,0.3\n"
    assert pack(videos, tmp_path / "right", right, columns) == 0
    assert "times outside" not in capsys.readouterr().err
    wrong = "v 0,a,0.9,0.5\nv 0,b,500,600\nv 0,c,-5,0.3\nv 0,d,0,9\nv 1,e,1.0,1.5\nv 1,f,0,1\n"
    assert pack(videos, tmp_path / "wrong", wrong, columns) == 0
    assert (
        "note 5 captions of 2 videos have times outside their video, or end before they start: are the times in seconds?"
        in capsys.readouterr().err
    )
    told = measure(tmp_path / "wrong")["captions"]
    assert (told["impossible_times"], measure(tmp_path / "right")["captions"]["impossible_times"]) == (5, 0)
    assert (
        describe(tmp_path / "wrong")["caption trouble"]
        == "5 with times outside their video, or an end before the start"
    )
    assert describe(tmp_path / "right")["caption trouble"] == "none"


def test_cuts_that_end_behind_their_file_and_captions_outside_a_cut_are_told(
    videos: Path, tmp_path: Path, capsys
) -> None:
    rows = [
        {"video": "v 0", "id": "right", "cut": [0.5, 1.2], "caption": {"text": "a", "start": 0.6, "end": 1}},
        {"video": "v 0", "id": "long", "cut": [0.5, 400], "caption": "b"},
        {"video": "v 1", "id": "aside", "cut": [0, 0.5], "caption": {"text": "c", "start": 0.7, "end": 0.9}},
        {"video": "v 1", "id": "before", "cut": [0.5, 1], "caption": {"text": "d", "start": -3, "end": 0.9}},
    ]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["folder", "--videos", videos, "--captions", captions, "--out", tmp_path / "set", "--workers", "1"]
    assert shard.main([str(word) for word in command]) == 0
    said = capsys.readouterr().err
    assert "note 2 captions of 2 videos have times outside their video" in said
    assert "note 1 cut packed shorter than asked for, as the file ends before" in said


def test_captions_that_are_repeated_or_in_other_letters_are_told(videos: Path, tmp_path: Path, capsys) -> None:
    assert pack(videos, tmp_path / "set", "v 0,ein Hünd\nv 0,a dog\nv 1,a dog\nv 1,A dog\n") == 0
    assert "word for word" not in (said := capsys.readouterr().err) and "letters" not in said
    assert pack(videos, tmp_path / "other", "v 0,a dog\nv 0,a dog\nv 0,一只狗\nv 1,собака и кот\nv 1,a dog\n") == 0
    said = capsys.readouterr().err
    assert "note 1 caption repeated word for word in one video (data.drop_duplicate_captions)" in said
    assert "note 2 captions in Chinese, Cyrillic letters, on which CLIP's text tower was not trained" in said


@pytest.mark.parametrize(("options", "said"), [
    (["--quality", "50"], "--quality 50: must be a whole number from 1 to 31"),
    (["--update", "--part", "1/2"], "--update and --part exclude each other"),
    (["--profile", "h264", "--short-side", "65"], "--short-side 65: h264 needs an even number of pixels"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused_before_any_work(options, said, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), *options]
    for command in (["webvid", "--videos", str(tmp_path), "--annotations", "none.csv"], ["demo"], ["demo-narrated"]):
        assert shard.main([*command, *out]) == 1
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_screen_that_is_gone_or_lacks_letters_ends_no_packing(videos: Path, tmp_path: Path) -> None:
    """A full disk behind 2>log, and a terminal of ASCII."""
    command = [sys.executable, "-m", "c4c.shard"]
    captions = tmp_path / "captions.csv"
    captions.write_text(f"video,caption\n{next(videos.iterdir()).name},é 视\n", encoding="utf-8")
    words = ["folder", "--videos", videos, "--captions", captions, "--out", tmp_path / "set", "--profile", "copy"]
    with open("/dev/full", "w") as full:
        subprocess.run([*command, *map(str, words), "--name", "视频"], cwd=ROOT, stderr=full, check=True)
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    for words in (["info", tmp_path / "set"], ["folder", "--help"]):
        done = subprocess.run([*command, *map(str, words)], cwd=ROOT, env=ascii, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

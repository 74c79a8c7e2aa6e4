"""Each reader on a small sample in the published layout: items, captions, counts, and the traps of its files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Caption, Counts, readers
from tests.shards.annotations.reading import paths, texts, videos, write
from tests.shards.sets import reading


def test_every_data_set_is_there() -> None:
    assert list(readers()) == [
        "activitynet", "didemo", "folder", "howto100m", "lsmdc", "msrvtt", "msvd", "webvid",
    ]  # fmt: skip


# ---- LSMDC ----


def test_lsmdc(tmp_path: Path) -> None:
    one, two = "1012_Unbreakable_00.05.16.065-00.05.21.941", "0001_American_Beauty_00.00.51.926-00.00.54.129"
    videos(tmp_path / "videos", f"1012_Unbreakable/{one}.avi", f"0001_American_Beauty/{two}.avi")
    times = "00.05.16.065\t00.05.21.941\t00.05.16.000\t00.05.22.000"
    lines = [
        f'{one}\t{times}\tSOMEONE "smiles, and\t \r',
        f"{two}\t{times}\tShe reads.",
        f"{one}\t{times}\tHe\u2028turns.",
        f"0003_GONE_00.00.01.000-00.00.02.000\t{times}\tLost.",
        f" {two}\t{times}\t",
    ]
    file = write(tmp_path / "LSMDC16_annos_training.csv", "\n".join(lines) + "\n")
    read = reading("lsmdc", tmp_path / "videos", "--annotations", file)
    assert texts(read) == {
        one: ['SOMEONE "smiles, and', "He\u2028turns."],
        two: ["She reads.", ""],
        "0003_GONE_00.00.01.000-00.00.02.000": ["Lost."],
    }
    assert paths(read, tmp_path / "videos")[:2] == [f"1012_Unbreakable/{one}.avi", f"0001_American_Beauty/{two}.avi"]
    assert read.items[0].meta["in_film"] == [
        {"aligned": ["00.05.16.065", "00.05.21.941"], "extracted": ["00.05.16.000", "00.05.22.000"]}
    ]
    assert read.missing == Counts(1, 1) and read.published == Counts(None, 101_079)
    assert read.warnings == ("101079 captions are published for this split, the given annotations hold 5",)
    test = tmp_path / "LSMDC16_challenge_1000_publictect.csv"
    test.write_bytes(file.read_bytes())
    assert reading("lsmdc", tmp_path / "videos", "--annotations", test).published == Counts(1000, 1000)
    with pytest.raises(ShardError, match="line 1: 1 fields between tabs instead of 6"):
        reading("lsmdc", tmp_path / "videos", "--annotations", write(tmp_path / "x.csv", "clip,a,b,c,d,text\n"))
    nameless = write(tmp_path / "y.csv", "\t0\t1\t0\t1\tSomeone leaves.\n")  # not the clip '0' without a sentence
    with pytest.raises(ShardError, match="line 1: 6 fields between tabs, the first of them empty"):
        reading("lsmdc", tmp_path / "videos", "--annotations", nameless)


# ---- ActivityNet ----


def test_activitynet_with_and_without_v_(tmp_path: Path) -> None:
    names = ("v_QOlSCBRmfWY.mp4", "ehGHCYKzyZ8.mkv", "v_abcdefghi.webm", "sub/v_v_bcdefghij.mp4")
    folder = videos(tmp_path / "videos", *names)
    data = {
        "v_QOlSCBRmfWY": {
            "duration": 82.73,
            "timestamps": [[17.37, 60.81], [0.83, 19.86]],
            "sentences": ["Second comes first.", "  Then a girl dances."],
        },
        "v_ehGHCYKzyZ8": {"duration": 61.7, "timestamps": [[0, 61.7]], "sentences": ["A man."]},
        "v_v_abcdefghi": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["A YouTube id that begins with v_."]},
        "v_v_bcdefghij": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["And one whose file says so twice."]},
        "v_notListed00": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["x"]},
    }
    ids = ["v_ehGHCYKzyZ8", "QOlSCBRmfWY", "v_v_abcdefghi", "v_v_bcdefghij", "v_unknown_000"]
    split = write(tmp_path / "train_ids.json", ids)
    read = reading("activitynet", folder, "--annotations", write(tmp_path / "train.json", data), "--split", split)
    assert [item.id for item in read.items] == [
        "v_ehGHCYKzyZ8", "v_QOlSCBRmfWY", "v_v_abcdefghi", "v_v_bcdefghij", "v_unknown_000",
    ]  # fmt: skip
    assert paths(read, folder)[:4] == [names[1], names[0], names[2], names[3]]
    assert read.items[1].captions == (
        Caption("Second comes first.", 17.37, 60.81),
        Caption("Then a girl dances.", 0.83, 19.86),
    )
    assert read.items[1].meta == {"duration": 82.73}
    assert read.missing == Counts(1, 0) and read.published == Counts(10_009)
    told = " ".join(read.warnings)
    assert "1 video ('v_unknown_000') of" in told and "10009 videos are published" in told
    data["v_QOlSCBRmfWY"]["timestamps"].pop()
    with pytest.raises(ShardError, match="v_QOlSCBRmfWY: needs as many timestamps"):
        reading("activitynet", folder, "--annotations", write(tmp_path / "val_1.json", data))


# ---- DiDeMo ----


def test_didemo(tmp_path: Path) -> None:
    names = ("12090392@N02_1_a.mov", "2_b.mp4", "3_c.3gp.mp4", "4.d_e.MOV")
    folder = videos(tmp_path / "videos", *names)
    told = [
        ("12090392@N02_1_a.mov", "then  second", [[0, 0], [0, 2], [1, 1], [1, 1]]),
        ("2_b.avi", "re-encoded", [[5, 5]]),
        ("12090392@N02_1_a.mov", "first", [[0, 0]]),
        ("3_c.3gp", "encoded, the old extension kept", [[0, 1]]),
        ("4.d_e.MOV", "dots", [[0, 1]]),
        ("gone.mp4", "missing on AWS", [[0, 1]]),
    ]
    data = [{"annotation_id": n, "video": v, "description": d, "times": t} for n, (v, d, t) in enumerate(told)]
    file = write(tmp_path / "train_data.json", data)
    read = reading("didemo", folder, "--annotations", file)
    assert list(texts(read)) == ["12090392@N02_1_a.mov", "2_b.avi", "3_c.3gp", "4.d_e.MOV", "gone.mp4"]
    assert paths(read, folder)[:4] == list(names)
    assert read.items[0].captions == (Caption("then second", 2.5, 10.0), Caption("first", 0.0, 5.0))
    assert read.items[0].end is None and read.missing == Counts(1, 1) and read.published == Counts(8395)
    split = write(tmp_path / "test_list.txt", "2_b.avi\nunknown.mp4\n")
    read = reading("didemo", folder, "--annotations", file, "--split", split, "--seconds", "32")
    assert [(i.id, i.start, i.end) for i in read.items] == [("2_b.avi", None, 32.0), ("unknown.mp4", None, 32.0)]
    assert read.published == Counts(1004) and "1 video ('unknown.mp4') of" in read.warnings[0]
    with pytest.raises(ShardError, match="entry 0: needs video, description and times"):
        reading("didemo", folder, "--annotations", write(tmp_path / "x.json", [{"video": "a"}]))


# ---- WebVid ----


@pytest.mark.parametrize("extra", ["", ",page_idx"])
def test_webvid(tmp_path: Path, extra: str) -> None:
    folder = videos(tmp_path, "videos/000001_000050/1066674784.mp4", "videos/000051_000100/21179416.mp4")
    end = ",7" if extra else ""
    file = write(
        tmp_path / "results_2M_val.csv",
        f"videoid,contentUrl,duration,page_dir,name{extra}\n"
        f'1066674784,https://x/a.mp4,PT00H00M10S,000001_000050,"Merida, mexico - may 23"{end}\n'
        f"21179416,https://x/b.mp4,PT00H00M28S,000051_000100,Horse grazing{end}\n"
        f"7,https://x/c.mp4,PT00H00M28S,000051_000100,gone{end}\n"
        f"21179416,https://x/b.mp4,PT00H00M28S,000051_000100,A horse{end}\n"
        f"21179416,https://x/b.mp4,PT00H00M28S,000051_000100,Horse grazing{end}\n",
    )
    for root in (folder, folder / "videos"):
        read = reading("webvid", root, "--annotations", file)
        assert texts(read) == {
            "1066674784": ["Merida, mexico - may 23"], "21179416": ["Horse grazing", "A horse"], "7": ["gone"],
        }  # fmt: skip
        assert [i.path for i in read.items[:2]] == [
            folder / "videos/000001_000050/1066674784.mp4", folder / "videos/000051_000100/21179416.mp4",
        ]  # fmt: skip
        assert read.items[0].meta["duration"] == "PT00H00M10S" and read.missing == Counts(1, 1)
        assert read.warnings == ("1 row ('21179416') with the caption of an earlier row left out",)
    two = "videoid,contentUrl,duration,page_dir,name\n21179416,u,d,000051_000100,a\n21179416,u,d,000001_000050,b\n"
    read = reading("webvid", folder, "--annotations", write(tmp_path / "two.csv", two))
    assert texts(read) == {"21179416": ["a", "b"]} and read.warnings == (
        "1 row ('21179416') with another page_dir than an earlier row of the video: the file is that one's",
    )
    with pytest.raises(ShardError, match="line 2: more cells than the header has"):
        reading("webvid", folder, "--annotations", write(tmp_path / "x.csv", "videoid,contentUrl,duration,page_dir,name\n1,u,d,p,a, b\n"))  # fmt: skip


# ---- annotations that say a thing twice ----


def test_annotations_that_say_a_thing_twice_lose_nothing(tmp_path: Path) -> None:
    root = videos(tmp_path / "videos", "video0.mp4", "video1.mp4", "x.avi", "-4wsuPCjDBc.mp4")

    def read(name: str, content: object, *more: object, suffix: str = ".json"):
        return reading(name, root, "--annotations", write(tmp_path / f"a{suffix}", content), *more)

    # mmaction2's form and MSVD: one video with and without its extension
    assert texts(read("msrvtt", {"video0.mp4": ["a"], "video0": ["b"]})) == {"video0": ["a", "b"]}
    assert texts(read("msvd", {"x": ["a"], "x.avi": ["b"]})) == {"x": ["a", "b"]}
    pickled = tmp_path / "a.pkl"
    pickled.write_bytes(pickle.dumps({"x": [["a"]], b"x": [["b"]]}))
    assert texts(reading("msvd", root, "--annotations", pickled)) == {"x": ["a", "b"]}
    for name, content in (
        ("msrvtt", '{"video0": ["a"], "video0": ["b"]}'),
        ("msvd", '{"x": ["a"], "x": ["b"]}'),
        ("didemo", '[{"video": "x.avi", "description": "a", "description": "b"}]'),
        ("activitynet", '{"v_a": {}, "v_a": {}}'),
    ):
        with pytest.raises(ShardError, match=r"a\.json is not JSON .*twice: join the two"):
            read(name, content)
    with pytest.raises(ShardError, match=r"-4wsuPCjDBc holds the key 'text' twice"):
        read("howto100m", '{"-4wsuPCjDBc": {"text": ["a"], "text": ["b"], "start": [0], "end": [1]}}')
    spoken = '"-4wsuPCjDBc": {"text": ["a"], "start": [0], "end": [1]}'
    assert texts(read("howto100m", f"{{{spoken}, {spoken}}}")) == {"-4wsuPCjDBc": ["a", "a"]}
    event = {"sentences": ["a"], "timestamps": [[0, 1]]}
    with pytest.raises(ShardError, match="'-4wsuPCjDBc' and 'v_-4wsuPCjDBc' are one video"):
        read("activitynet", {"-4wsuPCjDBc": event, "v_-4wsuPCjDBc": event})
    video = {"video_id": "video0", "split": "train"}
    data = {"videos": [video, video], "sentences": [{"video_id": "video0", "caption": "a"}, {"video_id": "video1", "caption": "b"}]}  # fmt: skip
    own = read("msrvtt", data, "--split", "train")
    assert texts(own) == {"video0": ["a"]} and "1 video ('video1') of a.json in no split, left out" in own.warnings
    with pytest.raises(ShardError, match="the video_id 'video0' is listed twice, with different values"):
        read("msrvtt", data | {"videos": [video, {**video, "split": "test"}]})


def test_a_list_that_names_a_video_twice_is_noted(tmp_path: Path) -> None:
    root = videos(tmp_path / "videos", "video0.mp4", "x.avi")
    split = write(tmp_path / "list.txt", "x.avi\nx.avi\n")
    said = write(tmp_path / "a.json", {"x": ["a"]})
    note = "1 video ('x') listed more than once in list.txt: packed once"
    assert note in reading("msvd", root, "--annotations", said, "--split", split).warnings
    said = write(tmp_path / "b.json", [{"video": "x.avi", "description": "a"}, {"video": "x.mov", "description": "b"}])
    assert note.replace("'x'", "'x.avi'") in reading("didemo", root, "--annotations", said, "--split", split).warnings
    assert "1 video ('x.mov') with the file of an earlier video" in " ".join(
        reading("didemo", root, "--annotations", said).warnings
    )
    split = write(tmp_path / "list.csv", "video_id\nvideo0\nvideo0\n")
    said = write(tmp_path / "c.json", {"video0": ["a"]})
    read = reading("msrvtt", root, "--annotations", said, "--split", split)
    assert "1 video ('video0') listed more than once in list.csv: packed once" in read.warnings
    split = write(tmp_path / "list.csv", "video_id,sentence\nvideo0,one\nvideo0,\n")
    read = reading("msrvtt", root, "--annotations", said, "--split", split)
    assert texts(read) == {"video0": ["one", ""]}  # the empty one is for packing to reject
    with pytest.raises(ShardError, match=r"list\.csv, line 3: the video is not named"):
        reading("msrvtt", root, "--split", write(split, "video_id,sentence\nvideo0,one\n ,two\n"))

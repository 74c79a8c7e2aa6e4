"""Each reader on a small sample in the published layout: items, captions, counts, and the traps of its files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Caption, Counts, howto100m, readers
from tests.shards.sets import reading


def videos(root: Path, *names: str) -> Path:
    """A folder of (empty) files; readers do not look into videos."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def texts(read) -> dict[str, list[str]]:
    return {item.id: [caption.text for caption in item.captions] for item in read.items}


def paths(read, root: Path) -> list[str]:
    return [str(item.path.relative_to(root)) for item in read.items]


def test_every_data_set_is_there() -> None:
    assert list(readers()) == [
        "activitynet", "didemo", "folder", "howto100m", "lsmdc", "msrvtt", "msvd", "webvid",
    ]  # fmt: skip


# ---- MSR-VTT ----


@pytest.fixture
def msrvtt(tmp_path: Path) -> Path:
    """TrainValVideo/ and TestVideo/ as in the release; video2 is a .webm, video3 is not there."""
    videos(tmp_path / "videos", "TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4", "TrainValVideo/video2.webm")
    videos(tmp_path / "videos", "TestVideo/video9770.mp4", "TestVideo/video977.mp4")
    splits = {"video0": "train", "video1": "train", "video2": "validate", "video3": "test", "video9770": "test"}
    data = {
        "info": {"year": "2016"},
        "videos": [
            {"category": 9, "url": f"https://www.youtube.com/watch?v={id}", "video_id": id, "start time": 137.72,
             "end time": 149.44, "split": split, "id": nth}
            for nth, (id, split) in enumerate(splits.items())
        ],
        "sentences": [
            {"caption": f"{id} said {n} ", "video_id": id, "sen_id": n} for n in range(3) for id in reversed(splits)
        ],
    }  # fmt: skip
    write(tmp_path / "MSRVTT_data.json", data)
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo2\nvideo0\nvideo3\nvideo8\n")
    write(
        tmp_path / "MSRVTT_JSFUSION_test.csv",
        'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a person, connecting"\nret1,msr977,video977,second\n',
    )
    return tmp_path


def test_msrvtt_train_split(msrvtt: Path) -> None:
    options = ("--annotations", msrvtt / "MSRVTT_data.json", "--split", msrvtt / "MSRVTT_train.9k.csv")
    read = reading("msrvtt", msrvtt / "videos", *options)
    assert [item.id for item in read.items] == ["video2", "video0", "video3", "video8"]
    assert paths(read, msrvtt / "videos")[:2] == ["TrainValVideo/video2.webm", "TrainValVideo/video0.mp4"]
    assert texts(read)["video0"] == ["video0 said 0", "video0 said 1", "video0 said 2"]
    assert read.items[1].meta == {
        "category": 9, "url": "https://www.youtube.com/watch?v=video0", "start time": 137.72, "end time": 149.44,
        "split": "train",
    }  # fmt: skip
    assert (read.items[1].start, read.items[1].end) == (None, None)  # the times are YouTube's: the files are cut
    assert read.reconciliation() == {
        "published": {"videos": 9000, "captions": 180_000},
        "annotations": {"videos": 4, "captions": 9},
        "files": 5,
        "missing": {"videos": 2, "captions": 3},
        "warnings": [
            "1 video ('video8') of MSRVTT_train.9k.csv not in MSRVTT_data.json",
            "1 video ('video8') without a caption in the annotations",
            "9000 videos are published for this split, the given annotations hold 4",
            "180000 captions are published for this split, the given annotations hold 9",
        ],
    }


def test_msrvtt_jsfusion_has_its_own_sentences(msrvtt: Path) -> None:
    split = ("--split", msrvtt / "MSRVTT_JSFUSION_test.csv")
    alone = reading("msrvtt", msrvtt / "videos", *split)
    assert texts(alone) == {"video9770": ["a person, connecting"], "video977": ["second"]}
    assert paths(alone, msrvtt / "videos") == ["TestVideo/video9770.mp4", "TestVideo/video977.mp4"]
    assert alone.published == Counts(1000, 1000)
    both = reading("msrvtt", msrvtt / "videos", *split, "--annotations", msrvtt / "MSRVTT_data.json")
    assert texts(both) == texts(alone) and both.items[0].meta["category"] == 9


@pytest.mark.parametrize(
    ("split", "ids", "published"),
    [
        ("train", ["video0", "video1"], Counts(6513, 130_260)),
        ("validate", ["video2"], Counts(497, 9940)),
        ("test", ["video3", "video9770"], Counts(2990, 59_800)),
        (None, ["video0", "video1", "video2", "video3", "video9770"], Counts(10_000, 200_000)),
    ],
)
def test_msrvtt_own_splits(msrvtt: Path, split: str | None, ids: list[str], published: Counts) -> None:
    more = ("--split", split) if split else ()
    read = reading("msrvtt", msrvtt / "videos", "--annotations", msrvtt / "MSRVTT_data.json", *more)
    assert ([item.id for item in read.items], read.published) == (ids, published)


def test_msrvtt_of_mmaction2(msrvtt: Path) -> None:
    file = write(msrvtt / "train_9k.json", {"video0.mp4": ["one", "two"], "video2.mp4": ["three"]})
    read = reading("msrvtt", msrvtt / "videos", "--annotations", file)
    assert texts(read) == {"video0": ["one", "two"], "video2": ["three"]}
    assert read.published == Counts(9000, 180_000) and read.missing == Counts(0, 0)


def test_msrvtt_said_wrongly(msrvtt: Path) -> None:
    folder = msrvtt / "videos"
    with pytest.raises(ShardError, match="give --annotations, --split, or both"):
        reading("msrvtt", folder)
    with pytest.raises(ShardError, match="has no column sentence: give --annotations"):
        reading("msrvtt", folder, "--split", msrvtt / "MSRVTT_train.9k.csv")
    with pytest.raises(ShardError, match="names no video of its split 'train'"):
        reading("msrvtt", folder, "--annotations", write(msrvtt / "x.json", {"video0.mp4": ["a"]}), "--split", "train")
    with pytest.raises(ShardError, match=r"x\.json is not JSON"):
        reading("msrvtt", folder, "--annotations", write(msrvtt / "x.json", "{"))
    with pytest.raises(ShardError, match=r"^[^ ]*y\.json: there is no such file$"):
        reading("msrvtt", folder, "--annotations", msrvtt / "y.json")
    with pytest.raises(
        ShardError, match="--split trian: there is no such file, and the json's own are train, validate, test"
    ):
        x = write(msrvtt / "x.json", {"video0.mp4": ["a"]})
        reading("msrvtt", folder, "--annotations", x, "--split", "trian")
    with pytest.raises(ShardError, match=r"video0: the captions must be a list of strings, not '\[1\]'"):
        reading("msrvtt", folder, "--annotations", write(msrvtt / "x.json", {"video0": [1]}))
    with pytest.raises(ShardError, match="no column video_id in its header"):
        reading("msrvtt", folder, "--split", write(msrvtt / "x.csv", "id\nvideo0\n"))


# ---- MSVD ----


@pytest.fixture
def msvd(tmp_path: Path) -> Path:
    videos(tmp_path / "videos", "-4wsuPCjDBc_5_15.avi", "_UqrvmOxnHE_9_19.avi", "0hyZ__3YhZc_598_603.avi")
    write(tmp_path / "train_list.txt", "-4wsuPCjDBc_5_15\n_UqrvmOxnHE_9_19\n\nWhnJ0Pyqa1k_1_2\nnoCaptions_1_2\n")
    return tmp_path


CAPTIONS = {
    "-4wsuPCjDBc_5_15": [["a", "squirrel", "eats"], ["it", "’s", "eating"]],
    "_UqrvmOxnHE_9_19": [["two", "men"]],
    "WhnJ0Pyqa1k_1_2": [["gone"]],
    "0hyZ__3YhZc_598_603": [["of", "another", "split"]],
}


@pytest.mark.parametrize("kind", ["python 3", "python 2", "latin-1", "json"])
def test_msvd(msvd: Path, kind: str) -> None:
    file = msvd / "raw-captions.pkl"
    data: object = CAPTIONS
    if kind == "python 3":
        file.write_bytes(pickle.dumps(data))
    elif kind == "json":
        file = write(msvd / "x.json", {f"{id}.avi": [" ".join(s) for s in said] for id, said in CAPTIONS.items()})
    else:
        file.write_bytes(_python2(CAPTIONS, "utf-8" if kind == "python 2" else "cp1252"))
    read = reading("msvd", msvd / "videos", "--annotations", file, "--split", msvd / "train_list.txt")
    first = texts(read)["-4wsuPCjDBc_5_15"]
    assert first == ["a squirrel eats", "it ’s eating" if kind != "latin-1" else "it \x92s eating"]
    assert list(texts(read)) == ["-4wsuPCjDBc_5_15", "_UqrvmOxnHE_9_19", "WhnJ0Pyqa1k_1_2", "noCaptions_1_2"]
    assert paths(read, msvd / "videos")[:2] == ["-4wsuPCjDBc_5_15.avi", "_UqrvmOxnHE_9_19.avi"]
    assert read.missing == Counts(2, 1) and read.published == Counts(1200, 48_774) and read.files == 3
    assert "1 video ('noCaptions_1_2') without a caption" in " ".join(read.warnings)


def _python2(captions: dict, encoding: str) -> bytes:
    """What Python 2 pickles of byte strings, protocol 2: SHORT_BINSTRING for each."""

    def string(text: str) -> bytes:
        data = text.encode(encoding)
        return b"U" + bytes([len(data)]) + data

    def array(parts: list[bytes]) -> bytes:
        return b"](" + b"".join(parts) + b"e"

    pairs = (string(id) + array([array([string(w) for w in s]) for s in said]) for id, said in captions.items())
    return b"\x80\x02}(" + b"".join(pairs) + b"u."


class Attack:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_is_not_executed(msvd: Path) -> None:
    file = msvd / "raw-captions.pkl"
    for protocol in (0, 2, 5):
        file.write_bytes(pickle.dumps({"a": [[Attack(msvd / "made")]]}, protocol))
        with pytest.raises(ShardError, match=r"is not a plain pickle of captions .*posix\.mkdir"):
            reading("msvd", msvd / "videos", "--annotations", file)
    assert not (msvd / "made").exists()
    for content, words in (
        (b"no pickle", "is not a plain pickle"),
        (b"", "is not a plain pickle"),
        (pickle.dumps([1]), "expected a dict of lists"),
        (pickle.dumps({"a": [[1]]}), "expected words, found int '1'"),
        (pickle.dumps({"a": "b"}), "expected lists of words"),
    ):
        file.write_bytes(content)
        with pytest.raises(ShardError, match=words):
            reading("msvd", msvd / "videos", "--annotations", file)


# ---- LSMDC ----


def test_lsmdc(tmp_path: Path) -> None:
    one, two = "1012_Unbreakable_00.05.16.065-00.05.21.941", "0001_American_Beauty_00.00.51.926-00.00.54.129"
    videos(tmp_path / "videos", f"1012_Unbreakable/{one}.avi", f"0001_American_Beauty/{two}.avi")
    times = "00.05.16.065\t00.05.21.941\t00.05.16.000\t00.05.22.000"
    lines = [
        f'{one}\t{times}\tSOMEONE "smiles, and\r',
        f"{two}\t{times}\tShe reads.",
        f"{one}\t{times}\tHe\u2028turns.",
        f"0003_GONE_00.00.01.000-00.00.02.000\t{times}\tLost.",
        f"{two}\t{times}\t",
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


# ---- HowTo100M ----


@pytest.fixture
def howto(tmp_path: Path) -> Path:
    videos(tmp_path / "videos", "nVbIUDjzWY4.mp4", "aa/JTMC9ypFtZ0.webm", "unlisted.mp4")
    write(
        tmp_path / "HowTo100M_v1.csv",
        "video_id,category_1,category_2,rank,task_id\n"
        "nVbIUDjzWY4,Cars & Other Vehicles,Motorcycles,27,52907\n"
        "JTMC9ypFtZ0,Food and Entertaining,Recipes,3,1\n"
        "deadlink000,Food and Entertaining,Recipes,4,1\n",
    )
    write(
        tmp_path / "caption.json",
        {
            "nVbIUDjzWY4": {"text": ["paint wheels"], "start": [9], "end": [12.5]},
            "unlisted": {"text": ["x"], "start": [0], "end": [1]},
            "JTMC9ypFtZ0": {"text": ["flour", "", None, "eggs", "oven"], "start": [0.08, 3, 3, 4.0, 60], "end": [3.5, 4, 4, 7.25, 61]},
            "deadlink000": {"text": ["gone", "too"], "start": [0, 5], "end": [5, 10]},
        },
    )  # fmt: skip
    return tmp_path


def test_howto100m_whole_videos(howto: Path) -> None:
    options = ("--annotations", howto / "caption.json", "--list", howto / "HowTo100M_v1.csv")
    read = reading("howto100m", howto / "videos", *options)
    assert [item.id for item in read.items] == ["nVbIUDjzWY4", "JTMC9ypFtZ0", "deadlink000"]
    assert read.items[0].captions == (Caption("paint wheels", 9.0, 12.5),)
    assert read.items[0].meta == {
        "category_1": "Cars & Other Vehicles", "category_2": "Motorcycles", "rank": "27", "task_id": "52907",
    }  # fmt: skip
    assert read.missing == Counts(1, 2) and read.items[1].start is None
    food = reading("howto100m", howto / "videos", *options, "--category", "Food and Entertaining")
    assert [item.id for item in food.items] == ["JTMC9ypFtZ0", "deadlink000"]
    everything = reading("howto100m", howto / "videos", *options[:2])
    assert [item.id for item in everything.items] == ["nVbIUDjzWY4", "unlisted", "JTMC9ypFtZ0", "deadlink000"]
    with pytest.raises(
        ShardError, match="no video has the category_1 'Food'; there are 'Food and Entertaining', 'Cars"
    ):
        reading("howto100m", howto / "videos", *options, "--category", "Food")
    with pytest.raises(ShardError, match="--category is looked up in --list"):
        reading("howto100m", howto / "videos", *options[:2], "--category", "Food")
    (howto / "caption.json").write_text((howto / "caption.json").read_text()[:100])
    with pytest.raises(ShardError, match=r"caption\.json is not a JSON object of videos"):
        reading("howto100m", howto / "videos", *options)


def test_howto100m_clips(howto: Path) -> None:
    options = ("--annotations", howto / "caption.json", "--list", howto / "HowTo100M_v1.csv", "--clips")
    read = reading("howto100m", howto / "videos", *options, "--min-duration", "4")
    assert [(i.id, i.start, i.end, i.captions) for i in read.items] == [
        ("nVbIUDjzWY4_8750_12750", 8.75, 12.75, (Caption("paint wheels", 9.0, 12.5),)),
        ("JTMC9ypFtZ0_80_7250", 0.08, 7.25, (Caption("flour eggs", 0.08, 7.25),)),
        ("JTMC9ypFtZ0_58500_62500", 58.5, 62.5, (Caption("oven", 60.0, 61.0),)),
        ("deadlink000", None, None, (Caption("gone", 0.0, 5.0), Caption("too", 5.0, 10.0))),
    ]
    assert read.items[1].meta["video"] == "JTMC9ypFtZ0" and read.missing == Counts(1, 2)


def test_clips_are_long_enough_and_lose_no_caption() -> None:
    said = tuple(Caption(f"w{n}", n * 1.7, n * 1.7 + 2.1) for n in range(50))
    cut = list(howto100m.clips(said, 6.0))
    assert " ".join(caption.text for _, _, caption in cut) == " ".join(c.text for c in said)
    assert all(end - start >= 6.0 - 1e-9 and start >= 0 for start, end, _ in cut)
    assert [start for start, _, _ in cut] == sorted({start for start, _, _ in cut})
    assert list(howto100m.clips((Caption("a", 1, 1), Caption("no times"), Caption("", 2, 9)), 6.0)) == [
        (0.0, 6.0, Caption("a", 1, 1))
    ]


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
    with pytest.raises(ShardError, match="the video_id 'video0' stands there twice, and differs"):
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


def test_howto100m_clips_name_what_they_leave_out(howto: Path) -> None:
    said = {
        "nVbIUDjzWY4": {"text": ["a", "", "b"], "start": [1, 1, 1], "end": [9, 9, 9]},
        "JTMC9ypFtZ0": {"text": ["no times"], "start": [None], "end": [None]},
    }
    file = write(howto / "caption.json", said)
    read = reading("howto100m", howto / "videos", "--annotations", file, "--clips")
    assert [(i.id, [c.text for c in i.captions]) for i in read.items] == [
        ("nVbIUDjzWY4_1000_9000", ["a b"]), ("JTMC9ypFtZ0", ["no times"]),
    ]  # fmt: skip
    assert [i.problem for i in read.items] == ["", "no caption has both text and times to cut at"]
    assert "2 videos ('nVbIUDjzWY4', 'JTMC9ypFtZ0') with captions left out by --clips" in read.warnings[0]

"""The readers of MSR-VTT and MSVD."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Counts
from tests.shards.annotations.reading import paths, texts, videos, write
from tests.shards.sets import reading

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

"""A teacher in a file: which rows a batch gets, and what is refused before a run learns anything wrong."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.nn.functional import normalize

from c4c.config import Config
from c4c.models.heads import HEADS
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.feature_file import (
    FORMAT,
    FeatureFile,
    FeatureHeader,
    SplitFeatures,
    is_feature_file,
    write_features,
)
from c4c.training.stored_teacher import StoredTeacher
from pipelines.config import ClipsConfig, DataConfig
from tests.c4c.pretend_split import PretendSplit

pytestmark = pytest.mark.slow  # imports open_clip

TEXTS = {"a": ["one", "two"], "b": ["three"], "c": ["four", "five", "six"]}
SPLIT = PretendSplit(TEXTS)
CPU = torch.device("cpu")
WIDTH = 4


def unit(rows: int, seed: int) -> np.ndarray:
    return normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()


def by_hand(path: Path, said: dict[str, list[str]] = TEXTS, *, about: dict | None = None, **others) -> str:
    """As docs/teachers.md has other programs write one; others: arrays in the place of these, None for none."""
    captions = [caption for of_video in said.values() for caption in of_video]
    arrays = {
        "ids": np.frombuffer(json.dumps(list(said)).encode(), np.uint8),
        "caption_counts": np.array([len(of_video) for of_video in said.values()]),
        "videos": unit(len(said), 1),
        "texts": unit(len(captions), 2),
        "caption_crc32": np.array([zlib.crc32(caption.encode()) for caption in captions], np.uint32),
    } | others
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_file(arrays, path, metadata={"format": FORMAT, "scale": "20"} | (about or {}))
    return str(path)


def teacher(path: str, split=SPLIT, **settings) -> StoredTeacher:
    clips = settings.pop("clips", ClipsConfig())
    return StoredTeacher(FeatureFile(path), split, Config(data=DataConfig(train="train", **settings), clips=clips), CPU)


def batch(pairs: list[tuple[int, ...]], rows: int) -> SimpleNamespace:
    """Videos, and captions of each; padding behind them."""
    numbers = np.full((rows, max(map(len, pairs)) - 1), -1)
    for row, (_, *captions) in enumerate(pairs):
        numbers[row, : len(captions)] = captions
    return SimpleNamespace(pairs=np.array([(pair[0], 0) for pair in pairs]), caption_numbers=numbers)


def test_scores_are_of_the_rows_of_a_batch(tmp_path):
    """Of a file with its videos in another order, and one more."""
    others = {"c": TEXTS["c"], "more": ["x", "y"], "a": TEXTS["a"], "b": TEXTS["b"]}
    path = by_hand(tmp_path / "f.safetensors", others)
    made, arrays = teacher(path), load_file(path)
    assert (
        is_feature_file(path) and "3 videos" not in made.about and "by another program (meanP, scale 20)" in made.about
    )
    rows = made.rows_of(batch([(1, 0), (0, 1), (2, 2)], 4))
    assert rows[:3].tolist() == [[3, 7], [2, 6], [0, 2]]  # video, caption: c has 0-2, more 3-4, a 5-6, b 7
    found = made.scores([], rows)
    wanted = 20 * arrays["texts"][[7, 6, 2]] @ arrays["videos"][[3, 2, 0]].T
    np.testing.assert_allclose(found.of_texts[:3, :3], wanted, rtol=1e-5)
    np.testing.assert_allclose(found.of_videos[:3, :3], wanted.T, rtol=1e-5)
    several = made.rows_of(batch([(2, 2, 0), (1, 0)], 2))
    assert several[0].tolist() == [0, 2, 0] and several[1, :2].tolist() == [3, 7]
    found = made.scores([], several).of_texts
    np.testing.assert_allclose(found[:3], 20 * arrays["texts"][[2, 0, 7]] @ arrays["videos"][[0, 3]].T, rtol=1e-5)


def written(
    path: Path, splits: list[PretendSplit], head: str = "meanP", paragraph: bool = False, half: bool = False
) -> str:
    """As c4c writes one."""
    texts = [caption for split in splits for of_video in split.texts.values() for caption in of_video]
    counts = [len(of_video) for split in splits for of_video in split.texts.values()]
    torch.manual_seed(3)
    made = HEADS[head](WIDTH)
    videos, captions = (torch.from_numpy(unit(n, n)) for n in (len(counts), len(texts)))
    if made.late:
        videos, captions = videos[:, None] * torch.tensor([1.0, 2.0, 0.0])[:, None], captions[:, None].repeat(1, 2, 1)
    header = FeatureHeader(
        ids=[name for split in splits for name in split.texts], counts=counts,
        captions=[zlib.crc32(text.encode()) for text in texts], scale=50.0, head=made, sizes={"width": WIDTH},
        about={"splits": [vars(SplitFeatures(split.digest, len(split), paragraph)) for split in splits], "checkpoint": "runs/t"},
    )  # fmt: skip
    write_features(path, header, videos, iter(captions.split(2)), np.float16 if half else np.float32)
    return str(path)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_what_is_written_is_a_file_of_safetensors(tmp_path, head, half):
    path = written(tmp_path / "f.safetensors", [SPLIT], head, half=half)
    arrays, file = load_file(path), FeatureFile(path)
    assert file.videos.dtype == arrays["texts"].dtype == (np.float16 if half else np.float32)
    for name in ("videos", "texts"):
        assert (
            np.array_equal(getattr(file, name), arrays[name]) and len(arrays[name]) == {"videos": 3, "texts": 6}[name]
        )
    assert json.loads(arrays["ids"].tobytes()) == file.ids == list(TEXTS)
    assert file.counts.tolist() == [2, 1, 3] and file.scale == 50 and file.head.name == head
    with safe_open(path, "np") as opened:
        assert opened.metadata()["checkpoint"] == file.checkpoint == "runs/t"
    rows = teacher(path).rows_of(batch([(0, 1), (2, 0)], 2))
    texts, videos = (
        torch.from_numpy(arrays[name][places].astype(np.float32))
        for name, places in (("texts", [1, 3]), ("videos", [0, 2]))
    )
    torch.manual_seed(3)
    wanted = 50 * HEADS[head](WIDTH).score(texts, videos)
    torch.testing.assert_close(teacher(path).scores([], rows).of_texts, wanted)


def test_splits_that_have_the_same_names_are_told_apart_by_their_digests(tmp_path):
    first, second = PretendSplit(TEXTS, "1"), PretendSplit({"b": ["x", "y"], "a": ["z"]}, "2", "other")
    path = written(tmp_path / "f.safetensors", [first, second])

    def rows(*splits) -> list:
        return teacher(path, SimpleNamespace(parts=splits))._rows.tolist()

    assert rows(first, second) == [0, 1, 2, 3, 4] and rows(second, first) == [3, 4, 0, 1, 2]
    with pytest.raises(ValueError, match="holds several videos called 'b', and other is none of the splits"):
        rows(PretendSplit(second.texts, "3", "other"))
    alone = written(tmp_path / "g.safetensors", [first])
    same = PretendSplit({"a": TEXTS["a"]}, "3", "other")
    with pytest.raises(
        ValueError, match=r"several splits of data\.train have a video called 'a', and the file holds one"
    ):
        teacher(alone, SimpleNamespace(parts=[first, same]))


UNLIKE = {
    "a video less": (
        {"texts": TEXTS | {"z": ["x"], "y": ["x"]}},
        r"has no features of the video 'z' and 1 other of train: write it with python -m c4c\.features --ckpt TEACHER --data train --out FILE",
    ),
    "a caption less": ({"texts": TEXTS | {"b": ["three", "x"]}}, "has 1 caption of the video 'b', and train has 2: write"),
    "another caption": ({"texts": TEXTS | {"c": ["four", "six", "five"]}}, r"another caption 1 of the video 'c' than train has \('six'\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_other_videos_and_captions_are_refused(name, tmp_path):
    settings, said = UNLIKE[name]
    path = by_hand(tmp_path / "f.safetensors")
    teacher(path)
    with pytest.raises(ValueError, match=f"train.teacher={path} .*{said}"):
        teacher(path, PretendSplit(**settings))


OTHER_VIEWS = {
    "parts": ({"clips": ClipsConfig(cut=True)}, r"clips\.cut=true shows parts of them: set clips\.cut=false"),
    "mirrors": (
        {"flip": 0.5, "colour": 0.1}, r"data\.flip and data\.colour changes those of the run: set data\.flip=0 data\.colour=0",
    ),
    "crops": ({"random_crop": 0.5}, r"set data\.random_crop=0"),
    "backwards": ({"frame_order": "reverse"}, r"in the order forward, and .* set data\.frame_order=forward"),
    "paragraphs": ({"paragraph": True}, r"holds each caption by itself, and data\.paragraph=true: set data\.paragraph=false"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VIEWS)
def test_settings_that_show_something_else_are_refused(name, tmp_path):
    settings, said = OTHER_VIEWS[name]
    path = written(tmp_path / "f.safetensors", [SPLIT])
    with pytest.raises(ValueError, match=said):
        teacher(path, **settings)


def test_the_order_of_frames_is_that_of_evaluation(tmp_path):
    """Which shuffles nothing, whatever data.frame_order of the teacher's run."""
    for order, own in (("reverse", "reverse"), ("random", "forward")):
        path = by_hand(tmp_path / f"{order}.safetensors", about={"data": json.dumps({"frame_order": order})})
        teacher(path, frame_order=own)
        with pytest.raises(ValueError, match=rf"in the order {own}, and .* with data\.frame_order=random: set"):
            teacher(path, frame_order="random")


def test_paragraphs_go_with_paragraphs(tmp_path):
    joined = {name: [" ".join(texts)] for name, texts in TEXTS.items()}
    path = written(tmp_path / "f.safetensors", [PretendSplit(joined, "1")], paragraph=True)
    assert teacher(path, paragraph=True).rows_of(batch([(2, 0)], 1)).tolist() == [[2, 2]]
    with pytest.raises(ValueError, match=r"one text of all captions .* set data\.paragraph=true"):
        teacher(path)
    own = by_hand(tmp_path / "g.safetensors", caption_crc32=None)
    assert "it has no caption_crc32, so that the order of captions is not checked" in teacher(own).about
    with pytest.raises(
        ValueError, match=r"has 2 captions of the video 'a', and train has 1 \(data\.paragraph joins them\)"
    ):
        teacher(own, paragraph=True)


def long(rows: np.ndarray) -> np.ndarray:
    return rows * np.array([1, 2, 1])[:, None].astype(np.float32)


def holed(rows: np.ndarray) -> np.ndarray:
    rows[2, 1] = np.nan
    return rows


SAID = '[{"digest": "1", "videos": 3, "paragraph": false}]'
WRONG = {
    "another format": ({"about": {"format": "c4c.features.9"}}, r"must be c4c\.features\.1, and is c4c\.features\.9"),
    "no scale": ({"about": {"scale": "none"}}, "the scale in its metadata must be a number above 0 that float32 holds, such as 100; it is none"),
    "an unknown head": ({"about": {"head": "mine"}}, "has head=mine; it must be one of "),
    "a head without weights": ({"about": {"head": "wti", "sizes": '{"width": 4}'}}, "do not fit the head wti"),
    "no ids": ({"ids": None}, "it has no ids"),
    "ids of another kind": ({"ids": np.arange(3)}, "ids must be the bytes of a list of strings in JSON"),
    "too few videos": ({"videos": unit(2, 1)}, "ids names 3 videos, videos has 2 rows, and caption_counts 3"),
    "counts in a table": ({"caption_counts": np.full((3, 2), 1)}, r"caption_counts must be \[3\], .*; it is \[3, 2\]"),
    "a transposed array": ({"videos": np.asfortranarray(unit(3, 1))}, r"of videos has length .*contiguous \(np\.ascontiguousarray\)"),
    "too few texts": ({"texts": unit(5, 1)}, "sum to the 5 rows of texts; it sums to 6"),
    "too few checksums": ({"caption_crc32": np.zeros(5, np.uint32)}, r"caption_crc32 must be uint32 \[6\]"),
    "another width": ({"texts": np.eye(6, dtype=np.float32)}, r"must be vectors \[n, D\] of one width D"),
    "whole numbers": ({"videos": np.eye(3, 4, dtype=np.int64)}, "videos must be float16 or float32"),
    "doubles": ({"videos": np.eye(3, 4)}, "videos is F64; write float16 or float32"),
    "no unit vectors": ({"videos": long(unit(3, 1))}, "row 1 of videos has length 2: rows must be unit vectors"),
    "no number": ({"texts": holed(unit(6, 1))}, "row 2 of texts holds NaN, or numbers too large for float32"),
    "a row that it has not": ({"about": {"unreadable": "[3]"}}, "damaged at unreadable: it must be a list of rows"),
    "no list of rows": ({"about": {"unreadable": "1"}}, "damaged at unreadable"),
    "an infinite scale": ({"about": {"scale": "1e39"}}, "must be a number above 0 that float32 holds, such as 100; it is 1e39"),
    "a scale of nothing": ({"about": {"scale": "1e-320"}}, "must be a number above 0"),
    "broken counts": ({"caption_counts": np.array([2.9, 1.2, 3.5], np.float32)}, "caption_counts must be integers; it is float32"),
    "heads that do not divide": (
        {"about": {"head": "tightTransf", "sizes": '{"width": 4, "attention_heads": 3}'}}, "do not fit the head tightTransf"
    ),
    "splits of half a video": ({"about": {"splits": SAID.replace("3", "3.0")}}, "damaged at splits"),
    "splits without names": ({"about": {"splits": SAID.replace('"1"', '["1"]')}}, "damaged at splits"),
    "wrong splits": ({"about": {"splits": '[{"digest": "1", "videos": 2, "paragraph": false}]'}}, "damaged at splits"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_a_teachers_is_refused(name, tmp_path):
    change, said = WRONG[name]
    path = by_hand(tmp_path / "f.safetensors", **change)
    assert is_feature_file(path)
    with pytest.raises(ValueError, match=f"^{path}: .*{said}"):
        FeatureFile(path)


@pytest.mark.parametrize("place", ["scale", "data", "head", "dtype", "shape", "data_offsets"])
def test_a_header_of_other_types_is_refused(place, tmp_path):
    """What safetensors does not write: a number or a list where text belongs, and text where numbers belong."""
    path = Path(by_hand(tmp_path / "f.safetensors"))
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for wrong in ({"a": 1}, [None, "x"], [0.5, 1.5]):
        header = json.loads(whole[8 : 8 + size])
        header["videos" if place in header["videos"] else "__metadata__"][place] = wrong
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(ValueError, match=f"^{path}: .*(is damaged at (videos|{place})|videos is )"):
            FeatureFile(str(path))


def test_features_are_not_taken_for_weights(tmp_path):
    path = by_hand(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=rf"^{path}: it holds features .*, and no weights: name it as train\.teacher"):
        open_checkpoint(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = Path(written(tmp_path / "f.safetensors", [SPLIT]))
    whole, other = path.read_bytes(), tmp_path / "other.safetensors"
    places = [whole.index(array.tobytes()) for array in load_file(path).values() if array.nbytes > 8]
    for place in places:
        flipped = bytearray(whole)
        flipped[place + 1] ^= 1
        other.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"does not match its checksum|must be|damaged"):
            FeatureFile(str(other))
    other.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="it is cut short"):
        FeatureFile(str(other))
    other.write_bytes(whole[:20])
    assert not is_feature_file(str(other)) and not is_feature_file(str(tmp_path)) and not is_feature_file("")


def test_features_that_are_no_numbers_are_not_written(tmp_path):
    path = written(tmp_path / "f.safetensors", [SPLIT])
    before = Path(path).read_bytes()
    header = FeatureHeader(
        ids=list(TEXTS), counts=[2, 1, 3], captions=[0] * 6, scale=50.0, head=HEADS["wti"](WIDTH), sizes={"width": WIDTH}, about={}
    )  # fmt: skip
    for wrong, dtype in ((torch.nan, np.float32), (1e5, np.float16)):
        videos, texts = torch.ones(3, 2, WIDTH), torch.ones(6, 2, WIDTH)
        texts[5, 1, 0] = wrong
        with pytest.raises(ValueError, match=rf"{path} is not written: row 5 of texts holds NaN, or numbers too large"):
            write_features(Path(path), header, videos, iter(texts.split(4)), dtype)
    assert Path(path).read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_digest_tells_all_that_scores_depend_on(tmp_path):
    first = teacher(by_hand(tmp_path / "f.safetensors"))
    again = teacher(by_hand(tmp_path / "g.safetensors"))
    assert again.digest == first.digest
    changes = (
        {"about": {"scale": "21"}}, {"about": {"unreadable": "[1]"}}, {"videos": unit(3, 9)}, {"texts": unit(6, 9)}, {"about": {"splits": SAID}},
    )  # fmt: skip
    others = [teacher(by_hand(tmp_path / "h.safetensors", **change)).digest for change in changes]
    assert len({first.digest, *others}) == 1 + len(changes)


def test_an_altered_scale_is_noticed(tmp_path):
    path = Path(written(tmp_path / "f.safetensors", [SPLIT]))
    whole = path.read_bytes()
    assert whole.count(b'"scale": "50.0"') == 1
    path.write_bytes(whole.replace(b'"scale": "50.0"', b'"scale": "40.0"'))
    with pytest.raises(ValueError, match="it is damaged: its metadata do not match their checksum"):
        FeatureFile(str(path))


def test_rows_that_mean_nothing_may_hold_anything(tmp_path):
    videos, wanted = unit(3, 1), teacher(by_hand(tmp_path / "f.safetensors", about={"unreadable": "[1]"}))
    videos[1] = np.nan
    made = teacher(by_hand(tmp_path / "g.safetensors", videos=videos, about={"unreadable": "[1]"}))
    rows = made.rows_of(batch([(0, 1), (1, 0), (2, 0)], 3))
    found, wanted = made.scores([], rows), wanted.scores([], rows)
    assert found.of_texts.isfinite().all() and torch.equal(found.of_texts, wanted.of_texts)
    path = by_hand(tmp_path / "h.safetensors", about={"unreadable": "[0, 1, 2]"})
    with pytest.raises(ValueError, match="has no features of any video of "):
        teacher(path)


def test_rows_that_mean_nothing_are_not_known(tmp_path):
    made = teacher(by_hand(tmp_path / "f.safetensors", about={"unreadable": "[1]"}))
    assert made.about.endswith("; of 1 video of this training it says nothing")
    rows = made.rows_of(batch([(0, 1), (1, 0), (2, 0)], 3))
    assert made.scores([], rows).known.tolist() == [True, False, True]
    others = teacher(str(tmp_path / "f.safetensors"), PretendSplit({name: TEXTS[name] for name in "ac"}))
    assert "it says nothing" not in others.about

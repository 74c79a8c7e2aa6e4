"""Published numbers stand beside a row only on their own test split and with their own settings."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from c4c.config import load
from c4c.retrieval.published import MSRVTT_1K
from c4c.study import published
from c4c.study.config import Recipe, Row
from tests.c4c.configs import SHIPPED

IDS = [f"video{7010 + i}" for i in range(1000)]


class Packed:
    """Of the fields of a split that are read."""

    def __init__(self, name: str, ids: list[str], texts: int):
        self.info = {"name": name}
        self._ids = ids
        self.caption_counts = np.array([texts - len(ids) + 1] + [1] * (len(ids) - 1))

    def __len__(self):
        return len(self._ids)

    def video(self, index: int):
        return SimpleNamespace(id=self._ids[index])


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Makes a test split of so many videos and texts; returns the words that name it."""

    def make(name: str, ids: list[str], texts: int, train_videos: int = 9000, *words: str) -> list[str]:
        for part, videos in (("train", train_videos), ("test", len(ids))):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / "dataset.json").write_text(json.dumps({"videos": videos}))
        published._test_split.cache_clear()
        monkeypatch.setattr(published, "Split", lambda path: Packed(name, ids, texts))
        return [f"data.train={tmp_path}/train", f"data.test={tmp_path}/test", *words]

    yield make
    published._test_split.cache_clear()


def of(words, kind="train", source=None, checkpoint="", values=None, baseline="", is_baseline=False) -> tuple:
    config = load("msrvtt.yaml", words, [SHIPPED])
    recipe = Recipe(kind, "msrvtt.yaml", (), source, checkpoint, config)
    return published.published_for(Row("row", values or {}, recipe, "", baseline), is_baseline)


def test_msrvtt_has_the_numbers_of_the_evaluation_report(packed):
    words = packed("msrvtt", IDS, 1000)
    first, second = of(words)
    assert (first.name, second.name) == ("CLIP4Clip meanP", "mmaction2, mean")
    assert [first.metrics[f"t2v_{k}"] for k in ("R1", "R5", "R10", "MdR", "MnR")] == list(MSRVTT_1K[0].t2v)
    assert first.metrics["v2t_R1"] == MSRVTT_1K[0].v2t[0]
    assert not [name for name in second.metrics if name.startswith("v2t")]
    (third,) = of([*words, "model.head=seqTransf"])
    assert third.metrics["t2v_R1"] == 44.5
    for one in (first, second, third):
        assert one.source
        assert one.differs


@pytest.mark.parametrize(
    "word",
    ["model.head=wti", "model.head=seqLSTM", "model.linear_patch=3d", "data.num_frames=6", "model.backbone=ViT-B-16", "train.lora=8", "train.prompts=4 train.freeze_layers=-1",
     "model.init_from=laion2b_s34b_b79k", "train.batch_size=64", "train.epochs=1", "train.max_steps=10", "train.freeze_layers=9",
     "data.sampling=head", "train.loss=sigmoid", "data.frame_order=reverse", "data.max_words=8", "data.flip=0.5", "train.ema=0.99",
     "train.label_smoothing=0.1", "train.teacher=runs/t", "train.lr_text=0", "data.image_size=128"],
)  # fmt: skip
def test_other_settings_have_none(packed, word):
    assert of([*packed("msrvtt", IDS, 1000), *word.split()]) == ()


@pytest.mark.parametrize(
    ("name", "ids", "texts"),
    [("demo", IDS, 1000), ("msrvtt", IDS[1:], 999), ("msrvtt", ["video1", *IDS[1:]], 1000), ("msrvtt", IDS, 20_000), ("lsmdc", IDS, 1001),
     ("msvd", IDS[:671], 27_000), ("msvd", IDS[:670], 670)],
)  # fmt: skip
def test_other_test_splits_have_none(packed, name, ids, texts):
    assert of(packed(name, ids, texts)) == ()


def test_another_rate_is_not_compared_unless_it_is_the_baseline(packed):
    words = packed("msrvtt", IDS, 1000)
    assert of(words, values={"train.lr": 1e-4}, baseline="1e-5") == ()
    assert of(words, values={"train.lr": 1e-5}, is_baseline=True) != ()
    assert of(words, values={"train.lr": 1e-5}) == ()  # of a table without a baseline
    assert of(words, values={"model.head": "meanP"}, baseline="wti") != ()


def test_another_number_of_training_videos_is_told(packed):
    first, _ = of(packed("msrvtt", IDS, 1000, 7010))
    assert first.differs.endswith("It was trained on 9000 videos, and this row on 7010.")


def test_other_data_sets(packed):
    (one,) = of(packed("msvd", IDS[:670], 27_763))
    assert (one.metrics["t2v_R1"], one.metrics["v2t_R1"], "t2v_MnR" in one.metrics) == (46.2, 56.6, False)
    long = ["data.num_frames=64", "data.paragraph=true"]
    (one,) = of(packed("didemo", IDS, 40_000, 8000, *long)[:2] + long) or (None,)
    assert one is None  # 1000 videos, not 1003 or 1004
    ids = [str(i) for i in range(1004)]
    (one,) = of(packed("didemo", ids, 4000, 8000, *long))
    assert one.metrics["t2v_R1"] == 43.4
    assert of(packed("didemo", ids, 4000, 8000)) == ()  # sentences one by one


def test_weights_that_are_only_evaluated(packed):
    words = packed("msrvtt", IDS, 1000)
    (one,) = of(words, "evaluate", checkpoint="openai:ViT-B-32")
    assert (one.name, one.metrics["t2v_R1"], one.metrics["v2t_R1"]) == ("CLIP, zero-shot", 31.2, 27.2)
    assert of(words, "evaluate", checkpoint="laion2b_s34b_b79k:ViT-B-32") == ()
    assert of(words, "evaluate", checkpoint="openai:ViT-L-14") == ()
    for word in ("data.num_frames=1", "data.frame_order=reverse", "data.sampling=tail"):
        assert of([*words, word], "evaluate", checkpoint="openai:ViT-B-32") == ()


def test_a_training_on_another_data_set_has_none(packed, tmp_path):
    words = packed("msvd", IDS[:670], 27_763)
    assert of(words) != ()
    (tmp_path / "train" / "dataset.json").write_text(json.dumps({"videos": 9000, "name": "MSRVTT"}))
    assert of(words) == ()


def test_post_pretraining(packed, tmp_path):
    words = packed("msrvtt", IDS, 1000)
    stage_one = load("msrvtt.yaml", [words[1], "data.train=data/narrated"], [SHIPPED])
    source = Recipe("train", "x.yaml", (), None, "", stage_one)
    (one,) = of(words, "evaluate", source)
    assert one.metrics == {"t2v_R1": 32.0, "t2v_R5": 57.0, "t2v_R10": 66.9, "t2v_MdR": 4.0}
    assert of(words, "train", source) == ()  # fine-tuned afterwards: nothing was published
    same = Recipe("train", "x.yaml", (), None, "", load("msrvtt.yaml", words, [SHIPPED]))
    assert of(words, "evaluate", same) == ()  # a fine-tuned run that is evaluated


def test_a_split_that_cannot_be_read_is_no_published_one(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "dataset.json").write_text("{")
    assert of([f"data.train={tmp_path}/train", f"data.test={tmp_path}/test"]) == ()
    assert of(["data.test=s3://bucket/test"]) == ()
    assert of([f"data.test={Path('/none')}"]) == ()

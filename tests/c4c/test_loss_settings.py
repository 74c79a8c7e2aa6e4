"""Settings of the loss and of captions that do not go together, and those that do."""

import re

import pytest

from c4c.config import load
from tests.c4c.configs import SHIPPED, refused


def refused_words(*words: str) -> str:
    return refused("demo.yaml", words, search=[SHIPPED])


@pytest.mark.parametrize(
    ("loss", "word", "why"),
    [
        ("sigmoid", "captions_per_video=2", "it judges pairs of one caption and one video"),
        ("sigmoid", "label_smoothing=0.1", "it judges each pair by itself"),
        ("mil_nce", "captions_per_video=2", r"its bags are the captions said around a clip \(clips\.bag\)"),
        ("mil_nce", "label_smoothing=0.1", "it has no target of its own"),
        ("mil_nce", "mask_equal_captions=true", "its bags are matched as a whole"),
        ("sigmoid", "teacher=runs/t", "a teacher's choices are among all candidates of a row"),
        ("mil_nce", "teacher=runs/t", "a teacher scores each of their captions"),
        ("mil_nce", "decorrelation=0.001", "some captions of a bag are expected not to fit"),
    ],
)
def test_what_a_loss_cannot_do_is_refused_with_a_reason(loss, word, why):
    message = refused_words(f"train.loss={loss}", f"train.{word}")
    assert message.lower().startswith(f"train.{word}".lower()) and re.search(why, message)
    assert f"train.loss={loss} cannot be used together" in message
    load("demo.yaml", [f"train.{word}"], [SHIPPED])


def test_what_losses_can_do_is_not_refused():
    words = [
        "train.label_smoothing=0.1",
        "train.captions_per_video=4",
        "train.mask_equal_captions=true",
        "train.decorrelation=0.001",
        "train.teacher=runs/t",
    ]
    assert load("demo.yaml", words, [SHIPPED]).train.row == "video"
    assert load("demo.yaml", ["train.loss=sigmoid", *words[2:4]], [SHIPPED]).train.row == "pair"
    assert "leaves nothing of the matches" in refused_words("train.label_smoothing=1")
    assert "must be above 0" in refused_words("train.teacher_temperature=0")


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("decorrelation_off_diagonal=0", "decorrelation=0.00011"),
        ("teacher_weight=0.5", "teacher=runs/t"),
        ("teacher_temperature=2", "teacher=runs/t"),
    ],
)
def test_a_setting_of_a_term_that_is_not_there_is_refused(word, other):
    name = other.partition("=")[0]
    message = refused_words(f"train.{word}")
    assert message.startswith(f"train.{word} has no effect without train.{name}: set train.{name} too, or leave")
    load("demo.yaml", [f"train.{word}", f"train.{other}"], [SHIPPED])


def test_captions_that_are_no_captions_of_a_whole_video_are_not_grouped():
    several, drop = "train.captions_per_video=2", "data.drop_duplicate_captions=true"
    assert "with data.paragraph a video's captions are one text" in refused_words(several, "data.paragraph=true")
    assert "with clips.cut each caption has a clip of its own" in refused_words(several, "clips.cut=true")
    assert "a paragraph has all captions of its video" in refused_words(drop, "data.paragraph=true")
    assert "equal words at other times are other clips" in refused_words(drop, "clips.cut=true")

"""What a file of weights keeps of a run's settings."""

from dataclasses import fields

import pytest

from c4c.models.pretrained import evaluation_settings
from c4c.study.bases import NOT_EVALUATED
from pipelines.config import DataConfig

pytestmark = pytest.mark.slow  # imports open_clip

# of these, evaluation's clips and captions do not depend: where data lie, how they are read, and what training alone does
OTHERS = {
    "train", "weights", "epoch_samples", "shuffle_block", "test", "local_dir", "local_gb", "ahead", "server_timeout_s",
    "random_crop", "flip", "colour", "pixels", "lane", "decode", "jpeg_crop", "hw_decoder_load", "threads", "prefetch",
    "read_timeout_s", "eval_batch_size", "max_bad_fraction", "drop_duplicate_captions",
}  # fmt: skip


def test_every_setting_that_evaluation_depends_on_is_kept():
    """A new setting goes into one of the two lists."""
    assert set(evaluation_settings(DataConfig())) | OTHERS == {field.name for field in fields(DataConfig)}
    assert not set(evaluation_settings(DataConfig())) & OTHERS


def test_a_study_takes_no_setting_that_evaluation_ignores():
    """Those that change how fast it is are taken."""
    speed = {
        "local_dir",
        "local_gb",
        "server_timeout_s",
        "lane",
        "jpeg_crop",
        "hw_decoder_load",
        "threads",
        "read_timeout_s",
        "eval_batch_size",
    }
    assert {key.removeprefix("data.") for key in NOT_EVALUATED} == OTHERS - speed


def test_they_are_kept_as_they_are():
    data = DataConfig(num_frames=5, frame_order="reverse", crop="end", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    plain = evaluation_settings(data)
    assert (plain["num_frames"], plain["frame_order"], plain["crop"]) == (5, "reverse", "end")
    assert plain["mean"] == [0.1, 0.2, 0.3]

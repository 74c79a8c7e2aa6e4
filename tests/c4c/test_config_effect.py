"""Settings that would do nothing beside the others are refused before a training."""

import re

import pytest

from c4c.config import ConfigError, load, require
from tests.c4c.configs import SHIPPED


def test_settings_of_lora_without_lora_are_refused_before_a_training_and_can_be_read():
    words = ["data.train=a", "data.test=b", "model.init_from=scratch"]
    for word in ("train.lora_on=all", "train.lora_alpha=32.0"):
        config = load("demo.yaml", [*words, word], [SHIPPED])
        with pytest.raises(ConfigError, match=f"{re.escape(word)} has no effect without train.lora, and all weights"):
            require(config)
        require(load("demo.yaml", [*words, word, "train.lora=4"], [SHIPPED]))


def test_what_would_do_nothing_is_refused_before_a_training(write):
    words = ["data.train=a", "data.test=b"]

    def refused_for(*more: str) -> str:
        with pytest.raises(ConfigError) as raised:
            require(load("demo.yaml", [*words, *more], [SHIPPED]))
        return str(raised.value)

    assert "train.patience=3 counts validations" in refused_for("train.patience=3", "train.eval_every=0")
    for start in ("scratch", write("model.safetensors", "")):
        message = refused_for(f"model.init_from={start}", "model.init_tag=best")
        assert message.startswith(
            f"model.init_tag=best chooses a checkpoint of a run folder, and model.init_from={start} is none"
        )
    assert "train.logit_bias=-7 is of train.loss=sigmoid, and train.loss=cross_entropy" in refused_for(
        "train.logit_bias=-7"
    )
    require(load("demo.yaml", [*words, "train.logit_bias=-7", "train.loss=sigmoid"], [SHIPPED]))
    require(
        load("demo.yaml", [*words, "train.patience=3", "train.eval_every=0", "train.eval_every_steps=9"], [SHIPPED])
    )

"""The learning rate's course, what decays, and how long a run is."""

import math

import pytest
import torch
from torch import nn

from c4c.models.clip4clip import build
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.lr_schedule import lr_factor
from c4c.training.param_groups import parameter_groups
from c4c.training.step import Learner


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    factor = [lr_factor(step, 100, 20, 0.05) for step in range(101)]
    assert factor[0] == 0.05
    assert factor[10] == pytest.approx(0.525)
    assert factor[20] == 1.0
    assert factor[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor[60] == pytest.approx(0.5)
    assert factor[100] == pytest.approx(0.0)
    assert factor[:21] == sorted(factor[:21])
    assert factor[20:] == sorted(factor[20:], reverse=True)


def test_the_learning_rate_at_the_edges():
    assert lr_factor(0, 10, 0, 0.05) == 1.0  # no warm-up
    assert lr_factor(11, 10, 2, 0.05) == pytest.approx(0.0)  # past the end it does not rise again
    assert lr_factor(3, 3, 5, 0.0) == pytest.approx(0.6)  # a run shorter than its warm-up
    assert lr_factor(5, 5, 5, 0.0) == 1.0


def test_total_steps():
    assert TrainConfig(epochs=3).total_steps(7) == 21
    assert TrainConfig(epochs=0.5).total_steps(7) == 4
    assert TrainConfig(epochs=0.01).total_steps(7) == 1
    assert TrainConfig(epochs=0, max_steps=3).total_steps(7) == 3
    assert TrainConfig(epochs=3, max_steps=4).total_steps(7) == 4
    assert TrainConfig(epochs=3, max_steps=40).total_steps(7) == 40


def test_a_warm_up_that_never_ends_is_told():
    said = TrainConfig(epochs=2, warmup_epochs=3).endless_warmup(7)
    assert said.startswith("train.warmup_epochs=3 is 21 steps, but the run has 14: the learning rate never reaches")
    assert not TrainConfig(epochs=4, warmup_epochs=3).endless_warmup(7)
    assert not TrainConfig(epochs=2, warmup_epochs=3, schedule="official").endless_warmup(7)


def test_matrices_decay_and_vectors_do_not():
    learner = Learner(build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 4))
    decayed, plain = parameter_groups(learner, TrainConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {p: name for name, p in learner.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in (decayed, plain))
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    assert "model.clip.logit_scale" in plain
    assert {name for name in names.values() if name.endswith("bias") or ".ln_" in name} <= plain
    for kept in (
        "text_projection",
        "token_embedding.weight",
        "visual.proj",
        "visual.conv1.weight",
        "positional_embedding",
    ):
        assert f"model.clip.{kept}" in decayed


def test_frozen_weights_and_empty_groups_are_left_out():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad = False
    (only,) = parameter_groups(layer, TrainConfig(weight_decay=0.3))
    assert only["params"] == [layer.weight]
    assert torch.equal(only["params"][0], layer.weight)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"lr": -1.0}, {"epochs": -1.0}, {"max_steps": -1}, {"weight_decay": -1.0}, {"eval_every": -1}, {"betas": (0.9,)},
     {"schedule": "linear"}, {"decay": "all"}, {"freeze_layers": -2}, {"micro_batch_size": -1},
     {"epochs": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"eps": float("nan")}, {"betas": (0.9, float("nan"))}],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"train\.{next(iter(wrong))}\b"):
        TrainConfig(**wrong)


def test_towers_and_head_learn_at_their_own_rates():
    model = Learner(build(ModelConfig(backbone="ViT-demo-16", head="seqTransf", init_from="scratch"), 4))
    groups = parameter_groups(model, TrainConfig(lr=1e-4, coef_lr=1e-3, weight_decay=0.2, decay="official"))
    assert [(round(g["lr"], 12), g["weight_decay"]) for g in groups] == [
        (1e-7, 0.2),
        (1e-7, 0.0),
        (1e-4, 0.2),
        (1e-4, 0.0),
    ]
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert ("bias" in names[parameter]) == (group["weight_decay"] == 0)
            assert names[parameter].startswith("model.clip.") == (group["lr"] < 1e-6)


def test_parts_of_the_model_have_rates_of_their_own():
    learner = Learner(build(ModelConfig(backbone="ViT-demo-16", head="seqTransf", init_from="scratch"), 4))
    names = {p: name for name, p in learner.named_parameters()}
    config = TrainConfig(lr=1e-2, coef_lr=0.1, lr_text=0.5, lr_video=2.0)
    groups = parameter_groups(learner, config)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        clip = name.removeprefix("model.clip.")
        expected = (
            1e-2 if clip == name else 1e-3 if clip == "logit_scale" else 2e-3 if clip.startswith("visual.") else 5e-4
        )
        assert rate == pytest.approx(expected), name
    assert {g["part"] for g in groups} == {"text", "video", "temperature", "head"}
    assert len({(g["part"], g["weight_decay"]) for g in groups}) == len(groups) == 7


def test_a_tower_is_frozen_until_its_epoch():
    config = TrainConfig(freeze_text_epochs=0.5, freeze_video_epochs=1)
    assert [config.frozen(epochs) for epochs in (0.0, 0.49, 0.5, 0.99, 1.0)] == [
        ("text", "video"), ("text", "video"), ("video",), ("video",), (),
    ]  # fmt: skip

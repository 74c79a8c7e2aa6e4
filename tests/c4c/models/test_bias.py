"""SigLIP's bias: which models have one, when it trains, what it says, and that it is kept."""

import math

import pytest
import torch

from c4c.export import export
from c4c.models import backbone
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.param_groups import choose_trained, decays, parameter_groups, part_of
from c4c.training.step import Learner
from tests import tiny_backbones

SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}
SIGLIP = SPEC | {"init_logit_bias": -7.5}


def test_a_model_has_one_where_its_towers_do():
    assert CLIP4Clip(SPEC).clip.logit_bias is None
    model = CLIP4Clip(SIGLIP)
    assert model.clip.logit_bias.shape == () and model.bias().item() == -7.5
    assert model.clip.logit_bias.requires_grad


@pytest.mark.parametrize("start", [None, -4.0])
def test_the_sigmoid_loss_gives_a_model_one_and_says_so(start):
    model = CLIP4Clip(SPEC)
    learner = Learner(model, "sigmoid", *([] if start is None else [start]))
    assert model.clip.logit_bias.item() == (start or -10.0) == model.spec["init_logit_bias"]
    assert "init_logit_bias" not in SPEC  # which other models share
    (note,) = learner.notes
    assert (
        note == f"the weights have no logit_bias: train.loss=sigmoid starts it at {start or -10:g} (train.logit_bias)"
    )
    assert "model.clip.logit_bias" in [name for name, p in learner.named_parameters() if p.requires_grad]


def test_weights_whose_temperature_does_not_suit_the_usual_start_are_pointed_out():
    for start, said in ((-10.0, True), (-25.0, False)):
        model = CLIP4Clip(SPEC)
        model.clip.logit_scale.data.fill_(math.log(100))
        (note,) = Learner(model, "sigmoid", start).notes
        assert ("beside a scale of 10; that of these weights is 100.0" in note) == said


def test_it_keeps_one_that_it_has():
    learner = Learner(CLIP4Clip(SIGLIP), "sigmoid", -4.0)
    assert learner.model.bias().tolist() == [-7.5] and learner.notes == []
    assert learner.model.clip.logit_bias.requires_grad


@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_siglips_own_towers_train_with_theirs(head):
    tiny_backbones.register()
    torch.manual_seed(0)
    spec = backbone.named("tiny-sigmoid")
    learner = Learner(CLIP4Clip(spec, head, segments=2), "sigmoid")
    assert learner.notes == [] and learner.model.bias().tolist() == [-10.0] == [learner.model.spec["init_logit_bias"]]
    side, tokens = learner.model.image_size, torch.randint(1, 50, (3, learner.model.context_length))
    inputs = (torch.randn(3, 2, 3, side, side), torch.ones(3, 2).bool(), tokens)
    text, video = learner(*inputs)
    logits = learner.model.scale() * learner.model.head.score(text, video) + learner.model.bias()
    loss = learner(*inputs, torch.ones(3).bool())
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid((2 * torch.eye(3) - 1) * logits).sum() / 3)
    loss.backward()
    assert [name for name, p in learner.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP's text tower", "a text tower of its own"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mil_nce"])
def test_another_loss_leaves_it_as_it_is(loss, custom):
    learner = Learner(CLIP4Clip(SIGLIP | {"custom_text": custom}), loss)
    assert not learner.model.clip.logit_bias.requires_grad and learner.model.bias().tolist() == [-7.5]
    assert learner.notes == []
    rows, tokens = torch.ones(2, 1).bool(), torch.tensor([[1, 999], [2, 999]])
    valid = rows if loss == "mil_nce" else rows[:, 0]
    tokens = tokens[:, None] if loss == "mil_nce" else tokens
    learner(torch.randn(2, 1, 3, 32, 32), rows, tokens, valid).backward()
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)
    assert Learner(CLIP4Clip(SPEC), loss).model.clip.logit_bias is None


def test_it_belongs_to_the_temperature():
    assert part_of("model.clip.logit_bias") == part_of("model.clip.logit_scale") == "temperature"
    bias = torch.nn.Parameter(torch.zeros(1))
    assert not decays("model.clip.logit_bias", bias, "official") and not decays("clip.logit_bias", bias, "mmaction2")
    model = CLIP4Clip(SIGLIP)
    choose_trained(model, TrainConfig(freeze_layers=1))
    learner = Learner(model, "sigmoid")
    assert model.clip.logit_bias.requires_grad
    train = TrainConfig(lr=1.0, coef_lr=0.5, lr_text=0.1)
    group = next(g for g in parameter_groups(learner, train) if any(p is model.clip.logit_bias for p in g["params"]))
    assert (group["part"], group["lr"], group["weight_decay"]) == ("temperature", 0.5, 0.0)
    model = CLIP4Clip(SPEC)
    model.clip.logit_scale.requires_grad_(False)
    Learner(model, "sigmoid")
    assert not model.clip.logit_bias.requires_grad  # it follows the temperature


def test_only_a_model_without_one_has_its_temperature_bounded():
    hot = math.log(112.3)  # as of published SigLIP weights
    for spec, scale in ((SPEC, 100.0), (SIGLIP, 112.3)):
        model = CLIP4Clip(spec)
        model.clip.logit_scale.data.fill_(hot)
        assert model.scale().item() == pytest.approx(scale)
        assert model.bounded == (scale == 100)


@torch.no_grad()
def test_probabilities():
    torch.manual_seed(0)
    model = CLIP4Clip(SIGLIP).eval()
    text = model.encode_text(torch.tensor([[1, 2, 999], [3, 4, 999], [5, 6, 999]]))
    video, mask = model.encode_video(torch.randn(2, 1, 3, 32, 32), torch.ones(2, 1).bool()), torch.ones(2, 1).bool()
    found, scores = model.match_probability(text, video, mask), model.similarity(text, video, mask)
    cosine = torch.nn.functional.cosine_similarity(text[:, None], video[None, :, 0], dim=-1)
    expected = 1 / (1 + (-(cosine / 0.07 - 7.5)).exp())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores, cosine / 0.07, rtol=1e-4, atol=1e-4)  # which the bias does not enter
    with pytest.raises(ValueError, match=r"this model has no logit_bias.*train\.loss=sigmoid"):
        CLIP4Clip(SPEC).match_probability(text, video, mask)


def trained(start: float) -> CLIP4Clip:
    """As a checkpoint gives it, of a model that began without a bias."""
    model = Learner(CLIP4Clip(SPEC), "sigmoid", start).model.eval()
    for name in ("logit_scale", "logit_bias"):
        setattr(model.clip, name, torch.nn.Parameter(getattr(model.clip, name).detach().reshape(())))
    return model


@pytest.mark.parametrize("format", ["c4c", "open_clip"])
def test_an_export_keeps_it(format, tmp_path):
    model = trained(-4.0)
    model.clip.logit_bias.data.fill_(-4.25)
    path = tmp_path / ("a.safetensors" if format == "c4c" else "folder")
    assert not [note for note in export(model, path, format) if "logit_bias" in note]
    again = CLIP4Clip.from_checkpoint(path)
    assert again.bias().item() == -4.25 and again.spec["init_logit_bias"] == -4.0 and not again.bounded


@pytest.mark.parametrize("format", ["official", "transformers"])
def test_a_layout_that_knows_none_leaves_it_out_and_says_so(format, tmp_path):
    path = tmp_path / ("a.bin" if format == "official" else "folder")
    (note,) = [note for note in export(trained(-4.0), path, format) if "logit_bias" in note]
    assert "left out: scores rank the same" in note
    again = CLIP4Clip.from_checkpoint(path)
    assert again.clip.logit_bias is None
    assert not [note for note in export(again, tmp_path / "b.bin", "official") if "logit_bias" in note]


def test_weights_bring_it_to_a_backbone_that_has_none(tmp_path):
    plain = ModelConfig(backbone="ViT-demo-16", init_from="scratch")
    model = build(plain, 2)
    model.add_bias(-3.0)
    export(model, tmp_path / "a.safetensors")
    again = build(ModelConfig(backbone="ViT-demo-16", init_from=str(tmp_path / "a.safetensors")), 2)
    assert again.bias().item() == -3.0
    learner = Learner(again, "sigmoid")
    assert learner.notes == [] and again.bias().tolist() == [-3.0]
    assert build(plain, 2).clip.logit_bias is None

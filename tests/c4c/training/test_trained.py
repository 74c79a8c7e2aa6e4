"""Which weights are trained, by the words of train.freeze, and the learning rate of each by its place in its tower."""

import pytest
import torch

from c4c.models.clip4clip import CLIP4Clip
from c4c.settings import TrainConfig
from c4c.training.param_groups import choose_trained, parameter_groups, part_of
from c4c.training.step import Learner
from tests.c4c.models.small import FAMILIES, SPEC, tiny

pytestmark = pytest.mark.slow  # imports open_clip


def frozen(model: CLIP4Clip, **settings) -> set[str]:
    choose_trained(model, TrainConfig(**settings))
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def named(model: CLIP4Clip, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def test_parts():
    model = tiny("seqTransf")
    assert frozen(model, freeze="text") == {n for n, _ in model.named_parameters() if part_of(n) == "text"}
    assert frozen(tiny(), freeze=["video"]) == named(model, "clip.visual.")
    assert frozen(tiny(), freeze=("temperature",)) == {"clip.logit_scale"}
    assert frozen(tiny("seqTransf"), freeze=("head", "video")) == named(model, "head.", "clip.visual.")


def test_embeddings_blocks_and_patterns():
    model = tiny()
    text = {"clip.token_embedding.weight", "clip.positional_embedding"}
    assert frozen(tiny(), freeze="text.embeddings") == text
    assert frozen(tiny(), freeze="video.blocks.1") == named(model, "clip.visual.transformer.resblocks.1.")
    assert frozen(tiny(), freeze="text.blocks.0-1") == named(model, "clip.transformer.resblocks.")
    assert frozen(tiny(), freeze=("LN_1.*", "clip.visual.proj")) == {
        n for n, _ in model.named_parameters() if ".ln_1." in n
    } | {"clip.visual.proj"}


@pytest.mark.parametrize(
    ("word", "said"),
    [("vidoe", "takes text, video, head, temperature, text.embeddings, video.blocks.0-5, and patterns of names, such as video"),
     ("clip.visual.ln_pots.weight", "such as clip.visual.ln_post.weight"),
     ("head", "this model's head has no weights: leave head out"),
     ("text.blocks.1-2", "the text tower has 2 blocks, 0 to 1"), ("video.blocks.2", "has 2 blocks, 0 to 1")],
)  # fmt: skip
def test_a_word_that_names_nothing_is_refused(word, said):
    with pytest.raises(ValueError, match=r"train\.freeze") as caught:
        frozen(tiny(), freeze=("text", word))
    assert f"train.freeze={word}: " in str(caught.value) and said in str(caught.value)


def test_with_everything_frozen_there_is_nothing_to_train():
    with pytest.raises(ValueError, match=r"train\.freeze=\[text,video,temperature\] freezes every weight"):
        frozen(tiny(), freeze=("text", "video", "temperature"))


@pytest.mark.parametrize("family", [*FAMILIES, "3d"])
def test_freeze_layers_on_every_kind_of_tower(family):
    model = tiny(patch="3d") if family == "3d" else tiny(spec=FAMILIES[family])
    names = frozen(model, freeze_layers=1)
    kept = {n for n, _ in model.named_parameters()} - names
    first = {"ResNet": "clip.visual.layer1.0.", "ConvNeXt": "clip.visual.trunk.stages.0.blocks.0."}.get(
        family, "clip.visual.transformer.resblocks.0."
    )
    assert named(model, first) <= names and any("token_embedding" in n for n in names)
    assert (
        named(model, "clip.logit_scale", "clip.visual.proj", "clip.visual.ln_post", "clip.visual.head", "clip.ln_final")
        <= kept
    )
    assert ("clip.visual.conv2.weight" in kept) == (family == "3d")
    assert not frozen(tiny(), freeze_layers=-1)


def rates(model: CLIP4Clip, **settings) -> tuple[dict[str, float], list[dict]]:
    learner = Learner(model)
    groups = parameter_groups(learner, TrainConfig(**settings))
    names = {p: name.removeprefix("model.") for name, p in learner.named_parameters()}
    return {names[p]: group["lr"] for group in groups for p in group["params"]}, groups


def test_learning_rates_by_layer():
    found, groups = rates(tiny("seqTransf"), lr=1.0, coef_lr=0.1, layer_decay=0.5)
    assert found.keys() == {name for name, _ in tiny("seqTransf").named_parameters()}
    for name, rate in found.items():
        rest = name.removeprefix("clip.visual.").removeprefix("clip.")
        if rest.startswith("head."):
            expected = 1.0
        elif rest.startswith("transformer.resblocks."):
            expected = 0.1 * 0.5 ** (2 - int(rest.split(".")[2]))
        else:
            expected = 0.1 * (1.0 if rest.startswith(("ln_post", "ln_final", "proj", "text_proj", "logit")) else 0.5**3)
        assert rate == pytest.approx(expected), name
    assert len(groups) == len({(g["lr"], g["weight_decay"]) for g in groups}) == 10  # both towers share them


def test_towers_of_other_depths_and_parts_apart():
    found, _ = rates(tiny(spec=FAMILIES["ResNet"]), lr=1.0, layer_decay=0.9, lr_text=0.5)
    assert found["clip.visual.layer4.0.conv1.weight"] == pytest.approx(0.9)
    assert found["clip.visual.layer1.0.conv1.weight"] == pytest.approx(0.9**4)
    assert found["clip.visual.conv1.weight"] == pytest.approx(0.9**5)
    assert found["clip.transformer.resblocks.0.ln_1.weight"] == pytest.approx(0.5 * 0.9**2)
    assert found["clip.visual.attnpool.positional_embedding"] == 1.0


@pytest.mark.parametrize("cheap", [{"lora": 4, "lora_on": "all"}, {"prompts": 2}])
def test_a_3d_patch_kernel_is_trained_beside_what_freezes_the_towers(cheap):
    """It starts as the 2d one: frozen, the model would stay a 2d one at the cost of a 3d one."""
    assert "clip.visual.conv2.weight" not in frozen(tiny(patch="3d"), **cheap)
    assert "clip.visual.conv1.weight" in frozen(tiny(), **cheap)
    if "lora" in cheap:
        assert "clip.visual.conv2.weight" in frozen(tiny(patch="3d"), **cheap, freeze="clip.visual.conv2.weight")


def test_the_rates_of_loras_matrices_are_those_of_their_blocks():
    model = tiny()
    choose_trained(model, TrainConfig(lora=4))
    found, _ = rates(model, lr=1.0, layer_decay=0.5, lora=4)
    assert (
        found["clip.visual.transformer.resblocks.0.attn.lora_b"]
        == found["clip.transformer.resblocks.0.attn.out_proj.lora_a"]
        == 0.25
    )
    assert found["clip.transformer.resblocks.1.attn.lora_a"] == 0.5


def test_a_tower_that_is_no_row_of_blocks():
    model = tiny()
    model.clip.visual = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for settings in ({"freeze_layers": 1}, {"freeze": "video.blocks.0"}):
        with pytest.raises(
            ValueError, match=r"the video tower \(Sequential\) is no row of blocks that could be counted"
        ):
            frozen(model, **settings)
    with pytest.raises(ValueError, match=r"train\.layer_decay: the video tower"):
        parameter_groups(model, TrainConfig(layer_decay=0.5))
    assert frozen(model, freeze="clip.visual.0.*") == {"clip.visual.0.weight", "clip.visual.0.bias"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"layer_decay": 0.0}, "train.layer_decay=0"), ({"layer_decay": 1.5}, "train.layer_decay=1.5"), ({"lora": -1}, "train.lora=-1"),
     ({"lora_on": "heads"}, "train.lora_on must be one of attention, mlp, all"), ({"lora_alpha": 0.0}, "train.lora_alpha=0"),
     ({"lora_also": "*.ln_*"}, "set train.lora to a rank")],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=r"train\.") as caught:
        TrainConfig(**wrong)
    assert said in str(caught.value)


def test_the_spec_is_small():
    assert SPEC["vision_cfg"]["layers"] == SPEC["text_cfg"]["layers"] == 2  # which the numbers above count on

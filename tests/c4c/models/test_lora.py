"""LoRA on every kind of tower: at first nothing changes, then it learns, and merged it is a plain model of the same scores."""

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.depth import towers_in
from c4c.models.lora import LoraConv1x1, merged
from c4c.settings import TrainConfig
from c4c.training.param_groups import choose_trained
from tests.c4c.models.small import FAMILIES, SPEC, clips, scores, timm, tiny

pytestmark = pytest.mark.slow  # imports open_clip

_ROBERTA = RobertaConfig(
    vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
HUGGING_FACE = FAMILIES["ViT"] | {
    "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base", "hf_proj_type": "mlp",
                 "hf_pooler_type": "mean_pooler", "context_length": 16},
    "custom_text": True, "hf_config": _ROBERTA.to_dict(),
}  # fmt: skip
# a family, its towers, and the matrices that its image tower has
TOWERS: dict[str, tuple[dict, str]] = {
    **{name: (spec, {"ConvNeXt": "mlp", "ResNet": "all"}.get(name, "attention")) for name, spec in FAMILIES.items()},
    "ViT of timm": (timm("vit_tiny_patch16_224", 32), "attention"),
    "EVA": (timm("eva02_tiny_patch14_224", 28), "attention"),  # whose attention reads the weight of a layer that it does not call
    "Hugging Face": (HUGGING_FACE, "attention"),
}  # fmt: skip


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def with_lora(model: CLIP4Clip, moved: bool = True, **settings) -> CLIP4Clip:
    """moved: as after training, B is not 0."""
    choose_trained(model, TrainConfig(**{"lora": 4} | settings))
    for name, weight in model.named_parameters() if moved else ():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.2)
    return model


def gradients(model: CLIP4Clip) -> dict[str, Tensor]:
    text, video = model(*clips(model))
    (text.square().sum() + (text.mean(0) * video).sum() * 3 + video.pow(3).sum()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", TOWERS)
def test_every_kind_of_tower(family):
    spec, on = TOWERS[family]
    model, plain = tiny(spec=spec), tiny(spec=spec)
    before = scores(model)
    with_lora(model, moved=False, lora_on=on)
    torch.testing.assert_close(scores(model), before, rtol=0, atol=1e-4)
    assert {name.rpartition(".")[2] for name in trained(model)} <= {"lora_a", "lora_b", "logit_scale"}
    for part in ("clip.visual.", ""):
        assert any(name.startswith(part) and "lora_b" in name for name in trained(model)), part
    for weight in model.parameters():
        if weight.requires_grad and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    found = gradients(model)
    assert found.keys() | {"clip.logit_scale"} == trained(model)
    assert all(grad.abs().sum() > 0 for grad in found.values()), "a matrix that the tower does not use"
    state = model.state_dict()
    assert plain.state_dict().keys() < state.keys()  # the weights keep their names
    plain.load_state_dict(merged(state, 16.0))
    assert not torch.allclose(scores(model), before, rtol=0, atol=1e-2)
    torch.testing.assert_close(scores(plain), scores(model), rtol=0, atol=2e-4)


def test_the_gradient_is_that_of_the_matrices():
    """d loss / dB = s (d loss / dW) A^T, and d loss / dA = s B^T d loss / dW."""
    model, plain = with_lora(tiny(), lora_on="all", lora_alpha=2.0), tiny()
    state = model.state_dict()
    plain.load_state_dict(merged(state, 2.0))
    found, whole = gradients(model), gradients(plain)
    for module, weight in (("clip.visual.transformer.resblocks.1.attn.", "in_proj_weight"), ("clip.transformer.resblocks.0.mlp.c_fc.", "weight"),
                           ("clip.visual.transformer.resblocks.0.attn.out_proj.", "weight")):  # fmt: skip
        grad = whole[module + weight] * 0.5
        torch.testing.assert_close(found[module + "lora_b"], grad @ state[module + "lora_a"].T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[module + "lora_a"], state[module + "lora_b"].T @ grad, rtol=1e-3, atol=1e-5)


def test_outputs_of_attention_whose_other_matrix_is_frozen():
    model, plain = with_lora(tiny(), freeze=("*.in_proj_weight",)), tiny()
    names = {name for name in trained(model) if "lora" in name}
    assert len(names) == 2 * 4 and all(".out_proj.lora_" in name for name in names)
    assert trained(model) - {"clip.logit_scale"} == gradients(model).keys()
    plain.load_state_dict(merged(model.state_dict(), 16.0))
    assert not torch.allclose(scores(model), scores(tiny()), rtol=0, atol=1e-2)
    torch.testing.assert_close(scores(plain), scores(model), rtol=0, atol=2e-4)


def test_a_convolution_of_pixels_with_strides():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(20, 24, 1, stride=2)
    layer.lora_a, layer.lora_b = torch.nn.Parameter(torch.randn(3, 20)), torch.nn.Parameter(torch.randn(24, 3))
    layer.lora_scale, picture = 0.7, torch.randn(2, 20, 5, 5)
    added = layer.weight + 0.7 * (layer.lora_b @ layer.lora_a)[..., None, None]
    expected = torch.nn.functional.conv2d(picture, added, layer.bias, stride=2)
    layer.__class__ = LoraConv1x1
    torch.testing.assert_close(layer(picture), expected, rtol=1e-4, atol=1e-4)


def test_which_matrices():
    names = {on: trained(with_lora(tiny(), lora_on=on)) for on in ("attention", "mlp", "all")}
    assert names["attention"] | names["mlp"] == names["all"]
    assert not any("mlp" in name for name in names["attention"]) and not any("attn" in name for name in names["mlp"])
    blocks = len(SPEC["text_cfg"]) and 2 * 2
    assert len(names["all"]) == blocks * 4 * 2 + 1  # four matrices a block, A and B of each, and the temperature
    beside = trained(with_lora(tiny(), lora_also=("*.LN_*", "clip.visual.proj")))
    more = beside - names["attention"]
    assert (
        "clip.visual.proj" in more and all(".ln_" in name for name in more - {"clip.visual.proj"}) and len(more) == 23
    )
    assert trained(with_lora(tiny(), freeze="video")) == {n for n in names["attention"] if "visual" not in n}
    assert trained(with_lora(tiny(), freeze_layers=1)) == {n for n in names["attention"] if ".0." not in n}
    assert "clip.logit_scale" not in trained(with_lora(tiny(), freeze="temperature"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"lora": 65}, "train.lora=65 is more than the smaller side of clip.transformer.resblocks.0.attn.in_proj_weight, a matrix of 192 x 64"),
     ({"freeze": ("text", "video")}, "every matrix of train.lora_on=attention is frozen"),
     ({"freeze": ("video.blocks.0-1", "text.blocks.0-1")}, "leave some out")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=r"train\.lora") as caught:
        with_lora(tiny(), **settings)
    assert said in str(caught.value)


def test_a_tower_without_such_matrices_is_named():
    with pytest.raises(
        ValueError,
        match=r"the video tower has no matrices of that kind .*: set train\.lora_on=mlp, or train\.freeze=\[video\]",
    ):
        with_lora(tiny(spec=FAMILIES["ConvNeXt"]))
    names = trained(with_lora(tiny(spec=FAMILIES["ConvNeXt"]), freeze="video"))
    assert names and not any("visual" in name for name in names)


@pytest.mark.parametrize("family", TOWERS)
def test_where_a_weight_is(family):
    spec, _ = TOWERS[family]
    towers = towers_in(tiny(spec=spec))
    blocks = {"ResNet": 4, "ConvNeXt": 12, "ViT of timm": 12, "EVA": 12}.get(family, spec["vision_cfg"].get("layers"))
    assert (towers["text"].blocks, towers["video"].blocks) == (2, blocks)
    for tower in towers.values():
        first, last = ([n for n, place in tower.places.items() if place == end] for end in (0, tower.blocks + 1))
        assert first and last and set(tower.places.values()) == set(range(tower.blocks + 2))
        assert all(
            any(w in n for w in ("embed", "conv", "bn", "stem", "ln_pre", "cls", "class", "position")) for n in first
        ), first
        assert not any(w in n for n in last for w in ("blocks", "layer.0", "token_embedding", "patch", "stages")), last

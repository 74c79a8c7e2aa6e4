"""Prompt vectors in both towers: the formula, what learns, and what a run, a file and other layouts make of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from safetensors import safe_open
from torch import Tensor

from c4c.export import export
from c4c.merging import Merging
from c4c.models.averaging import CheckpointChoice, average
from c4c.models.backbone import named
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.prompts import PROMPTS, PromptedBlock, add_prompts, prompts_of
from c4c.models.towers import on_meta
from c4c.settings import TrainConfig
from c4c.training.param_groups import choose_trained, parameter_groups
from tests.c4c.models.partial_runs import config_of, trained, write_weights
from tests.c4c.models.small import FAMILIES, SPEC, clips, scores, timm, tiny
from tests.c4c.models.test_lora import HUGGING_FACE, gradients
from tests.c4c.models.test_lora import trained as names_trained

pytestmark = pytest.mark.slow  # imports open_clip
NUMBER = 3


def prompted(model: CLIP4Clip, std: float = 1.0, **settings) -> CLIP4Clip:
    """std: of the vectors, as after training."""
    choose_trained(model, TrainConfig(**{"prompts": NUMBER} | settings))
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if name.endswith(PROMPTS):
            torch.nn.init.normal_(weight, std=std)
    return model


class WholeSequence(ResidualAttentionBlock):
    """The definition: prompts are tokens before the others, under an extended causal mask; their outputs are dropped."""

    def forward(self, q_x: Tensor, k_x=None, v_x=None, attn_mask: Tensor | None = None) -> Tensor:
        count, length = len(self.prompts), q_x.shape[1]
        whole = torch.cat([self.prompts.repeat(len(q_x), 1, 1), q_x], dim=1)
        mask = None
        if attn_mask is not None:
            mask = torch.full((count + length, count + length), -math.inf).triu(1)  # of prompts: causal
            mask = mask.expand(*attn_mask.shape[:-2], -1, -1).clone()
            mask[..., count:, count:] = attn_mask
        return super().forward(whole, attn_mask=mask)[:, count:]


@pytest.mark.parametrize("family", ["ViT", "custom text", "CoCa"])
@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_prompts_are_tokens_before_the_others(family, head):
    model = prompted(tiny(head, spec=FAMILIES[family]))
    found = scores(model)
    assert not torch.allclose(found, scores(tiny(head, spec=FAMILIES[family])), rtol=0, atol=1e-2)
    blocks = [block for block in model.modules() if isinstance(block, PromptedBlock)]
    assert len(blocks) == len(list(model.clip.visual.transformer.resblocks)) + 2
    for block in blocks:
        block.__class__ = WholeSequence
    torch.testing.assert_close(scores(model), found, rtol=1e-4, atol=1e-4)


def by_hand(block: PromptedBlock, x: Tensor, causal: bool) -> Tensor:
    """A block of one attention head, [N, L, D] -> [N, L, D]."""
    w = dict(block.named_parameters())
    norm = lambda y, k: torch.nn.functional.layer_norm(y, y.shape[-1:], w[f"ln_{k}.weight"], w[f"ln_{k}.bias"])  # noqa: E731
    seen = norm(torch.cat([w["prompts"].expand(len(x), -1, -1), x], dim=1), 1)
    q, k, v = (
        seen @ m.T + b for m, b in zip(w["attn.in_proj_weight"].chunk(3), w["attn.in_proj_bias"].chunk(3), strict=True)
    )
    score = q[:, NUMBER:] @ k.transpose(1, 2) / math.sqrt(x.shape[-1])
    if causal:
        later = torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None]
        score[:, :, NUMBER:] = score[:, :, NUMBER:].masked_fill(later, -math.inf)
    x = x + score.softmax(-1) @ v @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
    hidden = norm(x, 2) @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
    return x + (hidden * torch.sigmoid(1.702 * hidden)) @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]


@torch.no_grad()
def test_the_formula_by_hand():
    model = prompted(tiny())
    frames, mask, tokens = clips(model)
    clip = model.clip
    x = clip.visual._embeds(frames.flatten(0, 1))
    for block in clip.visual.transformer.resblocks:
        x = by_hand(block, x, causal=False)
    video = (clip.visual.ln_post(x[:, 0]) @ clip.visual.proj).unflatten(0, mask.shape)
    torch.testing.assert_close(model.encode_video(frames, mask), video, rtol=1e-4, atol=1e-4)
    x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
    for block in clip.transformer.resblocks:
        x = by_hand(block, x, causal=True)
    text = clip.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(1)] @ clip.text_projection
    torch.testing.assert_close(model.encode_text(tokens), text, rtol=1e-4, atol=1e-4)


def test_without_prompts_nothing_changes():
    model, plain = tiny(), tiny()
    choose_trained(model, TrainConfig())
    assert add_prompts(model.clip, 0) == []
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(block, PromptedBlock) for block in model.modules()) and prompts_of(model) == 0
    assert torch.equal(scores(model), scores(plain)) and names_trained(model) == names_trained(plain)


@pytest.mark.parametrize("head", ["meanP", "seqTransf"])
def test_only_prompts_the_head_and_the_temperature_learn(head):
    model = prompted(tiny(head))
    expected = {f"clip.{tower}transformer.resblocks.{k}.prompts" for tower in ("", "visual.") for k in range(2)}
    own = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert names_trained(model) == expected | own | {"clip.logit_scale"}
    found = gradients(model)
    assert expected <= found.keys() <= names_trained(model)
    assert all(found[name].abs().sum() > 0 for name in expected)
    groups = parameter_groups(model, TrainConfig(prompts=NUMBER, layer_decay=0.5, lr=1.0))
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    weights = dict(model.named_parameters())
    assert [rates[id(weights[f"clip.transformer.resblocks.{k}.prompts"])] for k in range(2)] == [0.25, 0.5]


def test_beside_lora_and_with_shorter_ways():
    model = prompted(tiny("wti"), lora=4, lora_on="all")
    names = names_trained(model)
    assert {name.rpartition(".")[2] for name in names if not name.startswith("head.")} == {
        "prompts",
        "lora_a",
        "lora_b",
        "logit_scale",
    }
    assert gradients(model).keys() <= names
    alone = prompted(tiny("wti"))
    torch.testing.assert_close(scores(model), scores(alone), rtol=1e-4, atol=1e-4)  # B is 0
    for patch in ("2d", "3d"):
        one, other = (prompted(tiny(patch=patch)).train() for _ in range(2))
        other.clip.set_grad_checkpointing()
        other.use_shortcuts(fold_pixels=False, trim_captions=True, share_captions=True)
        first, second = gradients(one), gradients(other)
        for name, grad in first.items():
            torch.testing.assert_close(second[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_vit_b_32_learns_less_than_a_megabyte():
    with on_meta():
        model = CLIP4Clip(named("ViT-B-32"))
    choose_trained(model, TrainConfig(prompts=4))
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert count == 12 * 4 * (768 + 512) + 1 and count * 4 < 1e6
    assert (
        "4 prompt vectors in each block of both towers, 61,440 numbers (0.25 MB in fp32), learn in place of the towers"
        in model.notes
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [(FAMILIES["ResNet"], "the image tower (ModifiedResNet) is none of open_clip's own transformers"),
     (FAMILIES["ConvNeXt"], "the image tower (timm's ConvNeXt)"), (timm("vit_tiny_patch16_224", 32), "(timm's VisionTransformer)"),
     (HUGGING_FACE, "the text tower (WordEncoder) is none of"),
     (SPEC | {"vision_cfg": SPEC["vision_cfg"] | {"block_type": "custom"}}, "the image tower has blocks of another kind (Custom")],
    ids=["ResNet", "ConvNeXt", "timm", "Hugging Face", "custom blocks"],
)  # fmt: skip
def test_other_towers_are_refused(spec, said):
    model = tiny(spec=spec)
    with pytest.raises(ValueError, match=r"train\.prompts=3: ") as caught:
        prompted(model)
    assert said in str(caught.value) and "set train.prompts=0" in str(caught.value)
    assert not any(name.endswith(PROMPTS) for name in model.state_dict())


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r"freeze_layers is 2: set train.freeze_layers=-1"):
        TrainConfig(prompts=2, freeze_layers=2)
    with pytest.raises(ValueError, match=r"train.prompts=-1"):
        TrainConfig(prompts=-1)
    with pytest.raises(ValueError, match=r"leave what is of the text tower out of train.freeze=\[text\]"):
        prompted(tiny(), freeze="text")
    assert "clip.logit_scale" not in names_trained(prompted(tiny(), freeze="temperature"))
    merging = CLIP4Clip(SPEC, segments=4, merging=Merging(tokens=1, joins=()))
    with pytest.raises(ValueError, match=r"the image tower merges tokens"):
        prompted(merging)


# ---- runs and files ----


def same_scores(found: CLIP4Clip, expected: CLIP4Clip) -> None:
    torch.testing.assert_close(scores(found), scores(expected), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """(folder, model)"""
    folder = tmp_path_factory.mktemp("runs") / "prompted"
    return folder, trained(folder, config_of(base, prompts=2), 1)


def test_a_run_stores_its_prompts_and_gives_them_back(run):
    folder, model = run
    with safe_open(folder / "checkpoints" / "step00000001" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name for name in names if "positional" not in name} == names_trained(model) == {
        name for name in model.state_dict() if name.endswith((PROMPTS, "logit_scale"))
    }  # fmt: skip
    again = CLIP4Clip.from_checkpoint(folder)
    assert prompts_of(again) == 2
    same_scores(again, model)


def test_c4cs_own_file_carries_them(run, tmp_path):
    folder, model = run
    path = tmp_path / "model.safetensors"
    export(CLIP4Clip.from_checkpoint(folder), path)
    assert json.loads(path.with_suffix(".json").read_text())["prompts"] == 2
    same_scores(CLIP4Clip.from_checkpoint(path), model)
    again = build(config_of(path).model, 4)
    choose_trained(again, TrainConfig(prompts=2))
    same_scores(again.eval(), model)
    for prompts in (0, 5):
        with pytest.raises(ValueError, match=r"set train\.prompts=2, or start from other weights"):
            choose_trained(build(config_of(path).model, 4), TrainConfig(prompts=prompts))
    heads = replace(config_of(path).model, head="seqTransf")
    assert prompts_of(build(heads, 4)) == 2  # a head that starts as the text tower's blocks, without their prompts


@pytest.mark.parametrize("format", ["official", "open_clip", "transformers"])
def test_layouts_that_cannot_say_it_refuse(run, tmp_path, format):
    path = tmp_path / ("model.bin" if format == "official" else "folder")
    with pytest.raises(ValueError, match=r"no place for the 2 prompt vectors .* use --format c4c or onnx"):
        export(CLIP4Clip.from_checkpoint(run[0]), path, format)
    assert not path.exists()


@pytest.mark.nightly
def test_onnx_carries_them(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = run[1]
    export(model, tmp_path / "graphs", "onnx")
    tokens = clips(model)[2]
    session = onnxruntime.InferenceSession(str(tmp_path / "graphs" / "text.onnx"))
    (found,) = session.run(None, {"tokens": tokens.numpy()})
    with torch.no_grad():
        expected = model.head.text(model.encode_text(tokens))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def test_averages_are_of_prompts_too(run, base, tmp_path):
    folder, model = run
    other = trained(tmp_path / "other", config_of(base, prompts=2), 2)
    average(CheckpointChoice((str(folder), str(tmp_path / "other"))), None, tmp_path / "out")
    average(CheckpointChoice((str(folder), str(tmp_path / "other"))), None, tmp_path / "out.safetensors")
    name = "clip.visual.transformer.resblocks.0.prompts"
    for path in (tmp_path / "out", tmp_path / "out.safetensors"):
        found = CLIP4Clip.from_checkpoint(path)
        torch.testing.assert_close(found.state_dict()[name], (model.state_dict()[name] + other.state_dict()[name]) / 2)
    trained(tmp_path / "plain", config_of(base, freeze="text"), 2)
    with pytest.raises(ValueError, match="prompts"):
        average(CheckpointChoice((str(folder), str(tmp_path / "plain"))), None, tmp_path / "none")

"""Token merging against a direct, slow evaluation of its formulas, and on every path through the image tower."""

import json

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from c4c.export import export
from c4c.merging import NO_MERGING, Merging
from c4c.models import backbone, flops
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.export.towers_only import without_merging
from c4c.models.pretrained import open_checkpoint
from c4c.models.token_merging import MergingViT, merge
from c4c.retrieval.encoder import digest
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.param_groups import choose_trained
from pipelines.config import DataConfig
from tests.c4c.models.small import FAMILIES, SPEC, timm, tiny

pytestmark = pytest.mark.slow  # imports open_clip

VISION = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 4, "head_width": 32}
DEEP = SPEC | {"vision_cfg": VISION}
AVERAGED = SPEC | {"vision_cfg": VISION | {"pool_type": "avg"}}
LN_LAST = SPEC | {"vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True}}
FRAMEWISE = Merging(tokens=3)
WAYS = [
    FRAMEWISE,
    Merging(tokens=7),
    Merging(tokens=2, joins=(1,)),
    Merging(tokens=3, joins=(0, 2)),
    Merging(tokens=9, joins=(1, 3)),
]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def merging_model(merging: Merging, spec: dict = DEEP) -> CLIP4Clip:
    """With the weights of `tiny` of the same spec, in float64."""
    model = CLIP4Clip(spec, blocks=2, segments=4, merging=merging).eval()
    model.load_state_dict(tiny(spec=spec).state_dict())
    return model.double()


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(*MASK.shape, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the formulas, a token at a time


def slow_video(model: CLIP4Clip, frames: Tensor, seen: list[bool]) -> list[Tensor]:
    """Features of the frames [F, 3, H, W] of one video. A token is (vector, size)."""
    visual, merging = model.clip.visual, model.merging
    plain = [
        list(zip(tokens, [float(one)] * len(tokens), strict=True))
        for tokens, one in zip(visual._embeds(frames), seen, strict=True)
    ]
    found: list = [(tokens[:1], tokens[1:]) for tokens in plain]  # class tokens, patches
    for number, block in enumerate(visual.transformer.resblocks):
        if number in merging.joins:
            if len(found) % 2:
                nothing = [(torch.zeros(64, dtype=torch.float64), 0.0)]
                found.append((nothing * len(found[0][0]), nothing * len(found[0][1])))
            found = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(found[::2], found[1::2], strict=True)]
        found = [slow_block(block, first, patches, merging.tokens) for first, patches in found]
    if visual.pool_type == "avg":
        norm = visual.ln_post
        before, after = (lambda x: x, norm) if visual.final_ln_after_pool else (norm, lambda x: x)
        means = [sum(before(x) * s for x, s in patches) / sum(s for _, s in patches) for _, patches in found]
        return [after(mean) @ visual.proj for mean in means]
    return [visual.ln_post(x) @ visual.proj for first, _ in found for x, _ in first][: len(frames)]


def slow_block(block, first: list, patches: list, each: int) -> tuple[list, list]:
    tokens = first + patches
    if not any(size for _, size in tokens):  # of padding alone: its features mean nothing
        return first, patches[: len(patches) - min(each * len(first), len(patches) // 2)]
    weight, bias, heads = block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.num_heads
    q, k, v = torch.stack([weight @ block.ln_1(x) + bias for x, _ in tokens]).chunk(3, dim=-1)
    sizes = torch.tensor([size for _, size in tokens], dtype=torch.float64)
    mixed = []
    for head in range(heads):
        part = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
        scores = (q[:, part] @ k[:, part].T / (q.shape[1] / heads) ** 0.5).exp() * sizes
        mixed.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
    added = torch.cat(mixed, dim=1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    tokens = [(x + y, size) for (x, size), y in zip(tokens, added, strict=True)]
    keys = k.unflatten(1, (heads, -1)).mean(dim=1)[len(first) :]
    first, patches = tokens[: len(first)], tokens[len(first) :]
    patches = slow_merge(patches, keys, min(each * len(first), len(patches) // 2))
    first, patches = ([(x + block.mlp(block.ln_2(x)), size) for x, size in part] for part in (first, patches))
    return first, patches


def slow_merge(patches: list, keys: Tensor, merged: int) -> list:
    a, b = list(range(0, len(patches), 2)), list(range(1, len(patches), 2))
    edges = {}
    for i in a:
        similar = [float(torch.cosine_similarity(keys[i], keys[j], dim=0)) if patches[j][1] else -2.0 for j in b]
        best = max(similar)
        edges[i] = (best if patches[i][1] else 2.0, b[similar.index(best)])
    gone = sorted(a, key=lambda i: -edges[i][0])[:merged]
    kept = [patches[i] for i in a if i not in gone]
    for j in b:
        group = [patches[j], *(patches[i] for i in gone if edges[i][1] == j)]
        size = sum(s for _, s in group)
        kept.append((sum(x * s for x, s in group) / max(size, 1), size))
    return kept


@pytest.mark.parametrize("merging", WAYS)
@torch.no_grad()
def test_the_formulas(merging):
    model, frames = merging_model(merging), pictures()
    found = model.encode_video(frames, MASK)
    for video, seen in enumerate(MASK):
        expected = slow_video(model, frames[video], seen.tolist() if merging.joins else [True] * len(seen))
        for frame in range(int(seen.sum())):
            torch.testing.assert_close(found[video, frame], expected[frame], rtol=1e-9, atol=1e-9)
    plain = tiny(spec=DEEP).double().encode_video(frames, MASK)
    assert (found - plain)[MASK].abs().max() > 1e-3  # it does something


@pytest.mark.parametrize("spec", [AVERAGED, LN_LAST])
@torch.no_grad()
def test_a_mean_of_patches_counts_each_as_often_as_patches_are_in_it(spec):
    model, frames = merging_model(FRAMEWISE, spec), pictures()[:1, :2]
    expected = torch.stack(slow_video(model, frames[0], [True, True]))
    torch.testing.assert_close(model.encode_video(frames, MASK[:1, :2])[0], expected, rtol=1e-9, atol=1e-9)


def test_merging_keeps_the_sum_of_sizes_and_of_weighted_tokens():
    draw = torch.Generator().manual_seed(0)
    x, size, keys = (
        torch.randn(2, 12, 8, generator=draw),
        torch.randint(1, 5, (2, 12), generator=draw).float(),
        torch.randn(2, 12, 4, generator=draw),
    )
    y, sizes = merge(x, size, keys, 1, 5)
    assert y.shape == (2, 7, 8)
    assert torch.equal(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((y * sizes[..., None]).sum(dim=1), (x * size[..., None]).sum(dim=1))
    assert torch.equal(y[:, 0], x[:, 0])


# ---- padding


@pytest.mark.parametrize("merging", WAYS)
@torch.no_grad()
def test_padding_changes_nothing(merging):
    model, frames = merging_model(merging), pictures()
    before, gradients = model.encode_video(frames, MASK), []
    other = torch.where(MASK[..., None, None, None], frames, 9 * pictures(1))
    assert torch.equal(model.encode_video(other, MASK)[MASK], before[MASK])
    longer = torch.cat([frames, pictures(2)], dim=1)
    more = torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    torch.testing.assert_close(model.encode_video(longer, more)[more], before[MASK], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model._encode_kept(frames, MASK)[MASK], before[MASK], rtol=1e-9, atol=1e-9)
    with torch.enable_grad():
        frames.requires_grad_()
        model.encode_video(frames, MASK)[MASK].sum().backward()
        gradients.append(frames.grad)
    assert (gradients[0][~MASK] == 0).all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_frames_meet_only_where_clips_are_joined():
    frames = pictures()
    other = frames.clone()
    other[0, 1] = pictures(3)[0, 1]
    for merging, reach in ((FRAMEWISE, 1), (Merging(tokens=2, joins=(1,)), 2), (Merging(tokens=2, joins=(1, 2)), 4)):
        model = merging_model(merging)
        moved = (model.encode_video(frames, MASK) - model.encode_video(other, MASK))[0].abs().amax(dim=-1) > 1e-9
        assert int(moved.sum()) == reach
        assert moved[:reach].all() or reach == 1


# ---- without it


def test_off_is_the_plain_tower_bit_for_bit():
    plain, off = tiny(spec=DEEP), CLIP4Clip(DEEP, blocks=2, segments=4, merging=NO_MERGING).eval()
    off.load_state_dict(plain.state_dict())
    assert type(off.clip.visual) is type(plain.clip.visual) is not MergingViT
    frames = pictures().float()
    assert torch.equal(plain.encode_video(frames, MASK), off.encode_video(frames, MASK))
    data = DataConfig(train="a", test="b")
    assert digest(plain, data) == digest(off, data) != digest(merging_model(FRAMEWISE).float(), data)
    assert off.state_dict().keys() == merging_model(FRAMEWISE).state_dict().keys()


@pytest.mark.parametrize(
    ("spec", "merging", "reason"),
    [(FAMILIES["ResNet"], FRAMEWISE, "ModifiedResNet"), (timm("vit_tiny_patch16_224", 32), FRAMEWISE, "timm's VisionTransformer"),
     (FAMILIES["CoCa"], FRAMEWISE, "by attention"), (AVERAGED, Merging(tokens=1, joins=(1,)), "mean of its patches"),
     (DEEP, Merging(tokens=1, joins=(4,)), "blocks 0 to 3"), (SPEC | {"vision_cfg": VISION | {"qk_norm": True}}, FRAMEWISE, "of their own kind")],
)  # fmt: skip
def test_towers_that_cannot_are_refused_by_name(spec, merging, reason):
    with pytest.raises(ValueError, match=reason):
        CLIP4Clip(spec, merging=merging)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"merge_frames": (1,)}, "set model.merge above 0"), ({"merge": 2, "merge_frames": (2, 1)}, "rising order"),
     ({"merge": 2, "merge_frames": (-1,)}, "rising order"), ({"merge": -1}, "model.merge"), ({"merge": 1, "linear_patch": "3d"}, "linear_patch=2d")],
)  # fmt: skip
def test_settings_that_do_not_go_together(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**settings)


def test_joins_need_frames():
    model = CLIP4Clip(DEEP, merging=Merging(tokens=1, joins=(1, 2)))
    data = DataConfig(train="a", test="b", image_size=64)
    with pytest.raises(ValueError, match="joins clips 2 times"):
        model.check_data(DataConfig(**{"train": "a", "test": "b", "image_size": 64, "num_frames": 2}), "it")
    model.check_data(data, "it")


# ---- training


@pytest.mark.parametrize("merging", [FRAMEWISE, Merging(tokens=2, joins=(1, 2))])
def test_checkpointing_lora_and_bf16(merging):
    def gradients(model: CLIP4Clip) -> list[Tensor]:
        model.zero_grad()
        model.train().encode_video(pictures(), MASK)[MASK].pow(3).sum().backward()
        return [weight.grad.clone() for weight in model.clip.visual.parameters() if weight.grad is not None]

    model = merging_model(merging)
    plain = gradients(model)
    model.clip.set_grad_checkpointing()
    for one, other in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    model.eval()
    before = model.encode_video(pictures(), MASK).detach()
    choose_trained(model, TrainConfig(lora=4, lora_on="all"))
    torch.testing.assert_close(model.encode_video(pictures(), MASK)[MASK], before[MASK], rtol=1e-9, atol=1e-9)
    assert len(gradients(model)) == 4 * 4 * 2  # two matrices beside each of a block's four
    half = merging_model(merging).bfloat16()
    assert half.encode_video(pictures(), MASK).isfinite().all()


@pytest.mark.parametrize("merging", [FRAMEWISE, Merging(tokens=2, joins=(1, 2))])
@torch.no_grad()
def test_one_graph_for_the_compiler(merging):
    model, frames = merging_model(merging).float(), pictures().float()
    given = (frames, MASK) if merging.joins else (frames.flatten(0, 1),)
    expected = model.clip.visual(*given)
    torch._dynamo.reset()
    compiled = torch.compile(model.clip.visual, backend="eager", fullgraph=True)  # an error where dynamo would break it
    torch.testing.assert_close(compiled(*given), expected)


# ---- what it costs


@pytest.mark.parametrize("merging", [NO_MERGING, *WAYS])
@torch.no_grad()
def test_operations_as_torch_counts_them(merging):
    model = CLIP4Clip(DEEP, merging=merging).train()
    with FlopCounterMode(display=False) as counter:
        model.encode_video(torch.zeros(2, 5, 3, 64, 64), torch.ones(2, 5).bool())
    projections = 0.02 * counter.get_total_flops()  # which the formula leaves out, as it does without merging
    assert 2 * flops.of_video(DEEP, 5, merging) == pytest.approx(counter.get_total_flops(), abs=projections)
    assert flops.per_pair(DEEP, 5, 20, merging=merging) > flops.of_video(DEEP, 5, merging)


def test_what_the_documentation_says_it_costs():
    spec = backbone.named("ViT-B-32")
    ways = {NO_MERGING: 106, Merging(tokens=2): 80, Merging(tokens=4): 55, Merging(tokens=4, joins=(6, 8)): 55}
    assert {one: round(flops.of_video(spec, 12, one) / 1e9) for one in ways} == ways


def test_a_custom_text_tower_beside_it_is_counted():
    spec = FAMILIES["custom text"]
    less, plain = (flops.per_pair(spec, 5, 16, merging=one) for one in (Merging(tokens=2), NO_MERGING))
    assert less < plain


# ---- checkpoints


def test_exported_it_keeps_its_setting_unless_told_otherwise(tmp_path):
    merging = Merging(tokens=2, joins=(1, 2))
    model, data = merging_model(merging).float(), DataConfig(train="a", test="b", image_size=64)
    export(model, tmp_path / "m.safetensors", "c4c", data)
    again, _ = open_checkpoint(str(tmp_path / "m.safetensors"))
    assert again.merging == merging
    frames = pictures().float()
    assert torch.equal(again.encode_video(frames, MASK), model.encode_video(frames, MASK))
    plain, _ = open_checkpoint(str(tmp_path / "m.safetensors"), merging=NO_MERGING)
    assert torch.equal(plain.encode_video(frames, MASK), tiny(spec=DEEP).encode_video(frames, MASK))
    assert json.loads((tmp_path / "m.json").read_text())["merging"] == {"tokens": 2, "joins": [1, 2]}
    (note,) = without_merging(model)
    assert note in export(model, tmp_path / "open_clip", "open_clip", data)
    with pytest.raises(ValueError, match="--format onnx cannot"):
        export(model, tmp_path / "onnx", "onnx", data)
    with pytest.warns(UserWarning, match="was trained with token merging"):
        config = ModelConfig(backbone="ViT-demo-16", init_from=_renamed(tmp_path))
        assert build(config, 4).merging == NO_MERGING


def _renamed(folder) -> str:
    """Weights of the demo's own backbone, exported with merging."""
    model = CLIP4Clip(build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 4).spec, merging=FRAMEWISE)
    export(model, folder / "demo.safetensors", "c4c")
    return str(folder / "demo.safetensors")

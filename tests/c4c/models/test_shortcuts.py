"""engine.fold_pixels, engine.trim_captions and engine.share_captions: the same features, losses and gradients by a shorter way."""

import copy

import pytest
import torch
from torch import Tensor, nn

from c4c.models import caption_rows, compiled
from c4c.models.caption_rows import plan
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.compiled import compile_towers
from c4c.objective import LossOptions
from c4c.training import step
from c4c.training.step import Learner
from pipelines.config import DataConfig
from tests.c4c.models.plain_engine import Engine
from tests.c4c.models.small import FAMILIES, SPEC, spec, timm, tiny

pytestmark = pytest.mark.slow  # imports open_clip

ALL = {"fold_pixels": True, "trim_captions": True, "share_captions": True}
NONE = dict.fromkeys(ALL, False)
ODD = DataConfig(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.5)).filled()
ROWS, WORDS = 20, 31
MASK = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4] * 4)[:, None]
TIMM, EVA = timm("vit_tiny_patch16_224", 32), timm("eva02_tiny_patch14_224", 28)
EOS = spec(custom_text=True, text_cfg=SPEC["text_cfg"] | {"pool_type": "eos", "eos_id": 4})


def inputs(side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, mask and captions: 7 different ones, of 12 tokens at most."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (ROWS, 4, side, side, 3), dtype=torch.uint8, generator=random)
    different = torch.zeros(7, WORDS, dtype=torch.int64)
    for row, length in enumerate((12, 3, 5, 9, 2, 7, 12)):
        different[row, : length - 1] = torch.randint(5, 990, (length - 1,), generator=random)
        different[row, length - 1] = 999
    return frames, MASK, different[torch.randint(0, 7, (ROWS,), generator=random)]


def pair(head: str = "meanP", patch: str = "2d", towers: dict = SPEC, **on: bool) -> tuple[CLIP4Clip, CLIP4Clip]:
    """A model by the plain way, and the same by the shorter one."""
    plain = tiny(head, patch, spec=towers).train()
    plain.set_pixels(ODD)
    short = copy.deepcopy(plain)
    assert short.use_shortcuts(**(NONE | on if on else ALL)) == []
    return plain, short


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(short: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert short.keys() == plain.keys()
    for name, wanted in plain.items():
        # a bias in front of a softmax has no gradient but rounding, hence the floor
        atol = max(tolerance * float(wanted.abs().max()), 1e-7)
        torch.testing.assert_close(short[name], wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_features_and_gradients_are_the_plain_ones(head, patch):
    found = []
    for model in pair(head, patch):
        text, video = model(*inputs())
        random = torch.Generator().manual_seed(1)
        pulled = [(x * torch.randn(x.shape, generator=random)).sum() for x in (text, video)]
        sum(pulled).backward()
        found.append(({"text": text.detach(), "video": video.detach()}, gradients(model)))
    (plain, plain_gradients), (short, short_gradients) = found
    assert_same(short, plain)
    assert_same(short_gradients, plain_gradients)


@pytest.mark.parametrize("towers", [SPEC, TIMM, EVA], ids=["ViT", "timm's ViT", "timm's EVA"])
def test_bytes_go_into_the_towers_that_begin_with_patches(towers):
    plain, short = pair(towers=towers, fold_pixels=True)
    seen = []
    short.clip.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    frames, mask, _ = inputs(plain.image_size)
    with torch.no_grad():
        assert_same(*({"video": model.encode_video(frames, mask)} for model in (short, plain)), 2e-5)
    assert seen == [torch.uint8] and short.state_dict().keys() == plain.state_dict().keys()


def test_frames_that_the_loader_normalised_are_taken_as_they_are():
    plain, short = pair(fold_pixels=True)
    frames, mask, _ = inputs()
    numbers = plain.pixels(frames, torch.float32)
    with torch.no_grad():
        assert torch.equal(short.encode_video(numbers, mask), plain.encode_video(numbers, mask))


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_in_bf16_folding_is_as_near_to_the_exact_result_as_the_plain_way(patch):
    exact, _ = pair(patch=patch)
    plain, short = (model.bfloat16() for model in pair(patch=patch, fold_pixels=True))
    frames, mask, _ = inputs()
    with torch.no_grad():
        wanted = exact.double().encode_video(exact.pixels(frames, torch.float64), mask)
        errors = [
            float((model.encode_video(frames, mask).double() - wanted)[mask].square().mean().sqrt())
            for model in (plain, short)
        ]
    assert 0 < errors[1] < 1.25 * errors[0], "root mean squares"


@pytest.mark.parametrize("family", ["ResNet", "ConvNeXt"])
def test_other_towers_normalise_as_before_and_say_so(family):
    model = tiny(spec=FAMILIES[family])
    (note,) = model.use_shortcuts(**NONE | {"fold_pixels": True})
    assert note == "engine.fold_pixels has no effect: its image tower does not begin with plain patches"
    frames, mask, _ = inputs(model.image_size)
    with torch.no_grad():
        numbers = model.pixels(frames, torch.float32)
        assert torch.equal(model.encode_video(frames, mask), model.encode_video(numbers, mask))


@pytest.mark.parametrize("change", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_captions_of_towers_that_see_the_padding_are_not_cut(change):
    model = tiny(spec=spec(custom_text=True, text_cfg=SPEC["text_cfg"] | change))
    (note,) = model.use_shortcuts(**NONE | {"trim_captions": True})
    assert note == "engine.trim_captions has no effect: features of its text tower depend on the padding"
    assert not model.trims_captions


@pytest.mark.parametrize("towers", [SPEC, EOS], ids=["highest id", "end token by its id"])
@pytest.mark.parametrize(("head", "on"), [("meanP", {"trim_captions": True}), ("wti", {"share_captions": True})])
def test_the_text_tower_sees_fewer_or_shorter_rows(head, on, towers):
    plain, short = pair(head, towers=towers, **on)
    shapes: list[tuple[int, ...]] = []
    encode = short.encode_text
    short.encode_text = lambda tokens: shapes.append(tuple(tokens.shape)) or encode(tokens)
    frames, mask, tokens = inputs()
    tokens = tokens.where(tokens != 999, towers["text_cfg"].get("eos_id", 999))
    text, _ = short(frames, mask, tokens)
    assert shapes == [(ROWS, 16) if "trim_captions" in on else (8, WORDS)]
    assert_same({"text": text.detach()}, {"text": plain(frames, mask, tokens)[0].detach()})
    short.eval()
    short(frames, mask, tokens)
    assert shapes[1] == (ROWS, WORDS), "evaluation encodes what it is given"


def test_a_batch_without_anything_to_gain_is_the_plain_step_bit_for_bit():
    plain, short = pair("wti", trim_captions=True, share_captions=True)
    frames, mask, _ = inputs()
    tokens = torch.randint(5, 990, (ROWS, WORDS), generator=torch.Generator().manual_seed(3))
    tokens[:, -1] = 999
    for found, wanted in zip(short(frames, mask, tokens), plain(frames, mask, tokens), strict=True):
        assert torch.equal(found, wanted)


def test_rows_and_lengths_come_in_multiples():
    tokens = inputs()[2]
    rows = plan(tokens, SPEC, trim=True, share=True, words=False)
    assert rows.length == 16 and rows.first is not None and rows.place is not None
    assert len(rows.first) == caption_rows.MULTIPLE == 8
    assert torch.equal(rows.take(tokens)[rows.place], tokens[:, :16])


@pytest.mark.parametrize("way", ["plain", "cached", "accumulated"])
@pytest.mark.parametrize("captions", [1, 2])
def test_steps_of_every_kind(way, captions, monkeypatch):
    monkeypatch.setattr(caption_rows, "MULTIPLE", 2)  # so that parts of a batch have something to gain as well
    frames, mask, tokens = inputs()
    valid = torch.ones(ROWS, dtype=torch.bool)
    if captions == 2:
        tokens = torch.stack([tokens, tokens.roll(1, 0)], dim=1)
        valid = valid[:, None].expand(-1, 2).clone()
        valid[3, 1] = False
    found = []
    for model in pair("wti"):
        learner = Learner(model, options=LossOptions(mask_equal_captions=True))
        given, engine = (frames, mask, tokens, valid), Engine(learner)
        if way == "cached":
            loss = step._cached_step(engine, given, 8, tokens)
        elif way == "accumulated":
            loss = step._accumulated_step(engine, given, 2, tokens)
        else:
            loss = learner(*given, None, tokens)
            loss.backward()
        found.append((float(loss), gradients(learner)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert_same(found[1][1], found[0][1], 2e-5)


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_compiled_towers_stay_one_graph(patch, monkeypatch):
    monkeypatch.setattr(compiled, "or_as_it_is", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(compiled, "_cannot_compile", lambda device: "")
    torch._dynamo.reset()
    plain, short = pair(patch=patch)
    with torch._dynamo.config.patch(suppress_errors=True):
        towers = compile_towers(short, 1)
        assert towers is not None
        for found, wanted in zip(short(*inputs()), plain(*inputs()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        short(*inputs())
        assert towers.graphs == {"video": 1, "text": 1} and towers.problem == ""
    torch._dynamo.reset()

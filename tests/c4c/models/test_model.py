"""CLIP4Clip over open_clip's towers, its head, and where weights come from."""

import math
from dataclasses import replace

import open_clip
import pytest
import torch
from torch import nn

from c4c.models.clip4clip import CLIP4Clip, build, load_strictly
from c4c.models.heads import HEADS
from c4c.models.heads.mean import MeanPooling
from c4c.models.pretrained import open_checkpoint
from c4c.settings import ModelConfig
from tests import tiny_backbones
from tests.c4c.retrieval import encoders

CONFIG = ModelConfig(backbone="ViT-demo-16", init_from="scratch")
START, END = 49406, 49407


@pytest.fixture(scope="module")
def model() -> CLIP4Clip:
    torch.manual_seed(0)
    return build(CONFIG, 4).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Captions of 1 to 4 words, [4, 12]."""
    rows = torch.zeros(4, 12, dtype=torch.int64)
    for row, words in zip(rows, ([320], [320, 1929], [736, 2368, 320], [518, 320, 1929, 2368]), strict=True):
        row[: len(words) + 2] = torch.tensor([START, *words, END])
    return rows


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randn(3, 4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()


# ---- text ----


def test_text_features_are_open_clips(model, tokens):
    padded = torch.cat([tokens, tokens.new_zeros(4, 77 - 12)], dim=1)
    torch.testing.assert_close(model.encode_text(padded), model.clip.encode_text(padded))


def test_a_short_context_equals_the_full_one(model, tokens):
    padded = torch.cat([tokens, tokens.new_zeros(4, 77 - 12)], dim=1)
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(padded), rtol=1e-5, atol=1e-5)


def test_the_feature_is_taken_at_the_end_of_the_text(model, tokens):
    before = model.encode_text(tokens)
    after_end = tokens.clone()
    after_end[0, 4:] = 5  # no token before the end can see these
    torch.testing.assert_close(model.encode_text(after_end), before, rtol=1e-5, atol=1e-5)
    before_end = tokens.clone()
    before_end[0, 1] = 5
    assert (model.encode_text(before_end) - before)[0].abs().max() > 1e-2


# ---- video ----


def test_frame_features_are_open_clips(model, frames):
    features = model.encode_video(frames, MASK)
    assert features.shape == (3, 4, 128)
    for video in range(3):
        for slot in range(4):
            expected = model.clip.encode_image(frames[video, slot][None])[0]
            torch.testing.assert_close(features[video, slot], expected, rtol=1e-5, atol=1e-5)


def test_masked_frames_change_neither_result_nor_gradient(model, frames, tokens):
    def run(frames):
        model.zero_grad()
        text, video = model(frames, MASK, tokens[:3])
        model.similarity(text, model.encode_video(frames, MASK), MASK).square().sum().backward()
        gradients = [p.grad.clone() for p in model.clip.visual.parameters()]
        return text.detach(), video.detach(), gradients

    text, video, gradients = run(frames)
    other = frames.clone()
    other[~MASK] = 1e4
    other_text, other_video, other_gradients = run(other)
    assert torch.equal(video, other_video)
    assert torch.equal(text, other_text)
    assert all(g.abs().max() > 0 for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


@pytest.mark.parametrize("empty", [[1], [0, 1, 2]], ids=["one video", "all videos"])
def test_a_video_without_frames_gives_zeros_and_no_nan(empty, model, frames, tokens):
    mask = MASK.clone()
    mask[empty] = False
    model.zero_grad()
    text, video = model(frames, mask, tokens[:3])
    (text @ video.T).square().sum().backward()
    for row in range(3):
        assert video[row].norm().item() == pytest.approx(0.0 if row in empty else 1.0)
    assert all(p.grad.isfinite().all() for p in model.clip.visual.parameters())


# ---- head and temperature ----


def test_mean_pooling_normalises_each_frame_first():
    frames = torch.tensor([[[10.0, 0.0], [0.0, 1.0], [7.0, 7.0]], [[3.0, 4.0], [9.0, 0.0], [9.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.6, 0.8]])
    torch.testing.assert_close(MeanPooling(2).video(frames, mask), expected)


def test_scores_are_cosines():
    text, video = torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.6, 0.0], [math.sqrt(0.5), 1.4 * math.sqrt(0.5), 0.0]])
    head = MeanPooling(2)
    torch.testing.assert_close(head.score(head.text(text), video), expected)


def test_similarity_is_the_scaled_score(model, frames, tokens):
    features = model.encode_video(frames, MASK)
    text = model.encode_text(tokens)
    got = model.similarity(text, features, MASK)
    assert got.shape == (4, 3)
    head = MeanPooling(2)
    torch.testing.assert_close(got, model.scale() * head.score(head.text(text), head.video(features, MASK)))


@pytest.mark.parametrize(
    ("logarithm", "scale"), [(math.log(1 / 0.07), 1 / 0.07), (4.6, math.exp(4.6)), (4.7, 100.0), (50.0, 100.0)]
)
def test_the_scale_stops_at_100(logarithm, scale):
    model = build(CONFIG, 4)
    model.clip.logit_scale.data.fill_(logarithm)
    assert model.scale().item() == pytest.approx(scale, rel=1e-5)


def test_features_are_float32_whatever_the_weights_are(frames, tokens):
    half = build(CONFIG, 4).bfloat16()
    text, video = half(frames, MASK, tokens[:3])
    assert text.dtype == video.dtype == half.scale().dtype == torch.float32
    assert text.isfinite().all()
    assert video.isfinite().all()


def test_sizes(model):
    assert (model.image_size, model.context_length) == (64, 77)
    adapters = {"TransformerAdapter", "SimpleMeanAdapter"}
    assert set(HEADS) == {"meanP", "seqLSTM", "seqTransf", "seqWTI", "tightTransf", "wti"} | adapters


# ---- weights ----


def refused(**settings) -> str:
    with pytest.raises(ValueError) as caught:
        build(ModelConfig(**{"backbone": "ViT-demo-16"} | settings), 4)
    return str(caught.value)


def test_scratch_is_random_and_seeded():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(build(CONFIG, 4).clip.text_projection)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_there_is_not_is_refused_by_name():
    assert refused(backbone="ViT-B-33").startswith("model.backbone=ViT-B-33: open_clip knows no such model")
    assert refused(backbone="RN50", linear_patch="3d", init_from="scratch").startswith(
        "model.linear_patch=3d is made for open_clip's own ViTs"
    )
    assert refused(head="maxP").startswith("model.head must be one of ")
    assert refused(linear_patch="4d") == "model.linear_patch must be 2d or 3d; got '4d'"


def test_random_weights_must_be_asked_for():
    message = refused(init_from="")
    assert message.startswith("model.init_from is not set")
    assert "scratch" in message


def test_an_unknown_tag_lists_the_tags():
    assert "its tags are openai, laion400m_e31" in refused(backbone="ViT-B-32", init_from="opnai")
    assert "its tags are none: use scratch, or a file" in refused(init_from="openai")


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    message = refused(backbone="ViT-B-32", init_from="openai")
    assert message.startswith(
        "model.init_from=openai: the weights of ViT-B-32 are not here and could not be fetched (OSError)."
    )
    assert (
        "hf download timm/vit_base_patch32_clip_224.openai." in message and "model.init_from=local-dir:DIR" in message
    )
    assert "\n" not in message
    with pytest.raises(ValueError) as caught:  # as commands name them, which have no such settings
        open_checkpoint("openai:ViT-B-32")
    message = str(caught.value)
    assert message.startswith(
        "openai:ViT-B-32: the weights of ViT-B-32 are not here and could not be fetched (OSError)."
    )
    assert "keep openai:ViT-B-32; or copy" in message and ", and name instead local-dir:DIR. " in message
    assert "model.init_from" not in message


def test_a_checkpoint_by_a_name_that_is_none():
    for name, words in (
        ("openai:ViT-B-99", "openai:ViT-B-99: open_clip knows no such model. Did you mean ViT-B-"),
        ("opnai:ViT-B-32", "opnai:ViT-B-32: no such file, folder, or open_clip tag of ViT-B-32; its tags are openai"),
        ("local-dir:/nowhere", "local-dir:/nowhere: there is no /nowhere/open_clip_config.json"),
    ):
        with pytest.raises(ValueError) as caught:
            open_checkpoint(name)
        assert str(caught.value).startswith(words) and "model.backbone" not in str(caught.value)


def test_a_weights_file(model, tmp_path):
    torch.save(model.clip.state_dict(), tmp_path / "clip.pt")
    loaded = build(ModelConfig(backbone="ViT-demo-16", init_from=str(tmp_path / "clip.pt")), 4).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("backbone", tiny_backbones.NAMES)
def test_training_starts_from_a_file_of_every_kind_of_towers(backbone, tmp_path):
    path = encoders.write(tmp_path / "model.safetensors", backbone=backbone)
    started = build(ModelConfig(backbone=backbone, init_from=str(path)), encoders.FRAMES).state_dict()
    saved = open_checkpoint(str(path))[0].state_dict()
    assert started.keys() == saved.keys() and all(torch.equal(started[name], saved[name]) for name in saved)


def test_a_3d_kernel_that_is_left_out_is_told(tmp_path):
    path = encoders.write(tmp_path / "model.safetensors", patch="3d")
    config = ModelConfig(backbone="tiny-vit", init_from=str(path))
    with pytest.warns(
        UserWarning, match="trained with 3d patches, and their kernel is left out: set model.linear_patch=3d"
    ):
        flat = build(config, encoders.FRAMES)
    assert not hasattr(flat.clip.visual, "conv2")
    kept = build(replace(config, linear_patch="3d"), encoders.FRAMES).clip.visual.conv2.weight
    assert torch.equal(kept, open_checkpoint(str(path))[0].clip.visual.conv2.weight)


def test_a_file_that_is_no_weights(model, tmp_path):
    path = tmp_path / "clip.pt"
    path.write_text("hello")
    assert refused(init_from=str(path)).startswith(f"{path} is no file of weights")
    state = model.clip.state_dict()
    del state["ln_final.bias"]
    torch.save(state, path)
    assert "missing clip.ln_final.bias" in refused(init_from=str(path))


def test_a_folder_that_is_no_run(tmp_path):
    assert "is not a run folder" in refused(init_from=str(tmp_path))


def test_weights_must_fit_to_the_last_one():
    layer = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(layer, good, "there")
    assert torch.equal(layer.weight, good["weight"])

    wrong = {"weight": torch.zeros(2, 3), "scale": torch.zeros(1)}
    with pytest.raises(ValueError, match="the weights in there do not fit the model") as caught:
        load_strictly(layer, wrong, "there")
    for reason in ("missing bias", "unexpected scale", "weight has shape [2, 3], the model [3, 2]"):
        assert reason in str(caught.value)
    assert torch.equal(layer.weight, good["weight"])

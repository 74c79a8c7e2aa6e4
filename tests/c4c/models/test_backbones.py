"""Any backbone that open_clip builds: the same features as there, and what each brings along."""

import io
import json
import logging

import open_clip
import pytest
import torch
from PIL import Image

from c4c import backbones
from c4c.models import backbone, flops, towers
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.retrieval.evaluate import evaluate
from c4c.retrieval.work import EvalWork
from c4c.settings import ModelConfig
from pipelines.config import DataConfig
from pipelines.frame_sampling import choose
from pipelines.tokens import Tokenizer
from tests import tiny_backbones
from tests.pipelines.conftest import pack_videos
from tests.pipelines.test_lanes import textured
from tests.videos import encode_pictures

pytestmark = pytest.mark.slow
# with their real configs, the smallest of each family; the others are made small
REAL = ("PE-Core-T-16-384", "MobileCLIP2-S0", "ViTamin-S", "ViT-S-32-alt")
SHORTER = 9  # tokens of a caption


@pytest.fixture(scope="module", autouse=True)
def _registered():
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    tiny_backbones.register()
    yield
    logging.disable(logging.NOTSET)


def both(name: str, head: str = "meanP") -> tuple[torch.nn.Module, CLIP4Clip]:
    """open_clip's model with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, pretrained_text=False).eval()
    ours = CLIP4Clip(backbone.named(name), head).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("text_decoder.")}
    assert ours.clip.state_dict().keys() == state.keys()
    ours.clip.load_state_dict(state)
    return theirs, ours


def captions(length: int) -> torch.Tensor:
    """int64 [3, length]: start, words, CLIP's end token, padding."""
    tokens = torch.randint(1, 49000, (3, length), generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, (4, SHORTER - 1, 2), strict=True):
        row[end], row[end + 1 :] = 49407, 0
    return tokens


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", [*REAL, *tiny_backbones.NAMES])
def test_features_are_open_clips_own(name):
    theirs, ours = both(name)
    size, length = ours.image_size, ours.context_length
    frames = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    tokens = captions(length)
    with torch.no_grad():
        image, text = theirs.encode_image(frames), theirs.encode_text(tokens)
        video = ours.encode_video(frames[:, None], torch.ones(2, 1, dtype=torch.bool))[:, 0]
        caption = ours.encode_text(tokens)
    # CoCa's are of length one whether asked or not
    torch.testing.assert_close(unit(video), unit(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(unit(caption), unit(text), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two textured clips in intra shards, wide and tall."""
    sizes = {"wide": (322, 182), "tall": (146, 234)}
    files = {f"{n}.mkv": encode_pictures(textured(13, s), 12, s, "ffv1", "matroska", {}) for n, s in sizes.items()}
    return pack_videos(tmp_path_factory.mktemp("textured") / "intra", files, "intra", captions=2, short_side=112)


@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "MobileCLIP2-S0", "ViT-S-32-alt"])
def test_features_of_shards_are_those_of_open_clips_own_preprocessing(name, split):
    """Through our shards, lanes and tokens, beside open_clip's transform, tokenizer and towers on the same stored frames."""
    theirs, ours = both(name)
    about = ours.spec["preprocess_cfg"]
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**about), is_train=False)
    data = DataConfig(num_frames=2, eval_batch_size=2, sampling="segment").filled(backbone.preprocess_of(ours.spec))
    work, tokenizer = EvalWork(torch.device("cpu")), Tokenizer(ours.spec["tokenizer"])
    made = evaluate(ours, ours, split, data, work, tokenizer=tokenizer)
    captions = [caption["text"] for v in range(2) for caption in split.captions(v)]
    with torch.no_grad():
        wanted = unit(theirs.encode_text(open_clip.get_tokenizer(name)(captions)))
        torch.testing.assert_close(made.text_features, wanted, rtol=0, atol=1e-5)
        for v in range(2):
            video = split.video(v)
            frames = choose(video, "segment", 2, 1)
            stored = [split.read(video, int(video.frames.offset[p]), int(video.frames.size[p])) for p in frames]
            pictures = torch.stack([transform(Image.open(io.BytesIO(jpeg))) for jpeg in stored])
            mean = unit(unit(theirs.encode_image(pictures)).mean(dim=0))
            assert made.video_features[v] @ mean > 0.999  # the pixels differ by 54 dB: tests/pipelines/test_geometry.py
    assert made.video_of_text.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", tiny_backbones.NAMES)
def test_shorter_captions_give_the_same_features_where_the_tower_allows_them(name):
    _, ours = both(name)
    tokens = captions(ours.context_length)
    with torch.no_grad():
        same = torch.allclose(ours.encode_text(tokens), ours.encode_text(tokens[:, :SHORTER]), atol=1e-5)
    assert same is not ours.spec["tokenizer"]["fixed_length"]


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("name", tiny_backbones.NAMES)
def test_every_head_on_every_family_learns(name, head):
    """A step's gradient reaches every weight that is trained, and a batch's other clips change no features."""
    torch.manual_seed(0)
    model = CLIP4Clip(backbone.named(name), head, segments=2).train()
    model.start_head()
    tokens = captions(model.context_length)
    frames = torch.randn(3, 2, 3, tiny_backbones.SIZE, tiny_backbones.SIZE)
    mask = torch.ones(3, 2, dtype=torch.bool)
    text, video = model(frames, mask, tokens)
    scores = model.scale() * model.head.score(text, video)
    assert scores.shape == (3, 3)
    scores.log_softmax(dim=1).diagonal().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert set(without) <= {"clip.logit_scale", "clip.logit_bias"}
    alone, _ = model(frames[:1], mask[:1], tokens[:1])
    torch.testing.assert_close(alone, text[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(frames[:1], mask[:1], tokens[:1])[1], video[:1], rtol=1e-4, atol=1e-5)


def test_heads_start_from_text_towers_that_have_what_they_need():
    for name, starts in (("tiny-vit", True), ("tiny-pe", True), ("tiny-roberta", False)):
        model = CLIP4Clip(backbone.named(name), "seqTransf")
        model.start_head()
        assert any("starts at random" in note for note in model.notes) is not starts
    assert model.notes == [
        "the head seqTransf starts at random: its text tower is a Hugging Face model, whose blocks are not CLIP's"
    ]
    pe = CLIP4Clip(backbone.named("tiny-pe"), "seqTransf")
    pe.start_head()
    table = pe.head.frame_position_embeddings.weight
    assert pe.head.most_frames == 77  # though captions have 32 tokens at most
    assert torch.equal(table[:32], pe.clip.text.positional_embedding)


@pytest.mark.parametrize("name", tiny_backbones.NAMES)
def test_words_are_those_of_the_caption(name):
    _, ours = both(name, "wti")
    tokens = captions(ours.context_length)
    with torch.no_grad():
        words = ours.encode_text(tokens)
    assert (words != 0).any(dim=-1).sum(dim=1).tolist() == [5, SHORTER, 3]


@pytest.mark.parametrize(
    "name", ["tiny-vit", "tiny-resnet", "tiny-pe", "tiny-eva02", "tiny-sigmoid", "tiny-convnext", "tiny-vitamin"]
)
def test_pictures_of_another_size(name):
    """Towers that take twice the size are described by their spec: built again from it, they give the same features."""
    _, ours = both(name)
    assert ours.image_size == tiny_backbones.SIZE
    ours.resize_pictures(64)
    assert ours.image_size == 64 and ours.spec["preprocess_cfg"]["size"] == 64
    again = CLIP4Clip(ours.spec).eval()
    again.load_state_dict(ours.state_dict())
    frames = torch.randn(1, 1, 3, 64, 64)
    with torch.no_grad():
        mask = torch.ones(1, 1, dtype=torch.bool)
        assert torch.equal(again.encode_video(frames, mask), ours.encode_video(frames, mask))


def test_positions_are_interpolated_as_open_clip_does(tmp_path):
    theirs, ours = both("tiny-vit")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    larger = open_clip.create_model("tiny-vit", pretrained=str(tmp_path / "weights.pt"), force_image_size=80).eval()
    ours.resize_pictures(80)
    frames = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        found = ours.encode_video(frames[:, None], torch.ones(2, 1, dtype=torch.bool))[:, 0]
        torch.testing.assert_close(found, larger.encode_image(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [("tiny-vit", 40), ("tiny-resnet", 48), ("tiny-convnext", 48), ("tiny-pe", 40)]
)
def test_sizes_that_towers_cannot_take(name, size):
    with pytest.raises(ValueError, match=str(size)):
        CLIP4Clip(backbone.named(name)).resize_pictures(size)


def test_what_backbones_bring():
    pe, siglip = backbone.named("PE-Core-B-16", "meta"), backbone.named("ViT-B-16-SigLIP2", "webli")
    assert backbone.preprocess_of(pe).resize_mode == "squash" and backbone.preprocess_of(pe).max_words == 32
    assert backbone.preprocess_of(siglip).mean == (0.5, 0.5, 0.5) and siglip["tokenizer"]["kind"] == "hf"
    # of one backbone, weights by several authors
    laion = backbone.preprocess_of(backbone.named("ViT-L-14", "laion2b_s32b_b82k"))
    assert (
        laion.mean == (0.5, 0.5, 0.5)
        and backbone.preprocess_of(backbone.named("ViT-L-14", "openai")).mean[0] == 0.48145466
    )
    others = backbone.other_tags("ViT-L-14")
    assert list(others) == ["openai", "laion2b_s32b_b82k", "metaclip_400m", "metaclip_fullcc", "dfn2b"]
    assert backbone.way(others["laion2b_s32b_b82k"]).startswith("GELU, pixels of mean [0.5, 0.5, 0.5]")
    assert backbone.way(others["openai"]).startswith("QuickGELU, pixels of mean [0.4815,")
    assert backbone.preprocess_of(backbone.named("ViT-H-14-quickgelu", "dfn5b")).resize_mode == "squash"
    assert (
        backbone.named("ViT-B-32", "openai")["quick_gelu"]
        and not backbone.named("ViT-B-32", "laion2b_s34b_b79k")["quick_gelu"]
    )
    # a description from before there was such a thing
    old = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": {"image_size": 64}, "text_cfg": {}}
    assert backbone.preprocess_of(old).interpolation == "bicubic" and backbone.preprocess_of(old).image_size == 64


def test_a_config_that_says_quickgelu_is_believed(monkeypatch):
    """open_clip's entry of the weights may say nothing of it (roberta-ViT-B-32)."""
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"mean": (0.5, 0.5, 0.5)})
    assert backbone.named("tiny-vit", "somebody")["quick_gelu"]
    assert not backbone.named("tiny-pe", "somebody")["quick_gelu"]


def test_a_name_with_a_slash_is_not_half_understood():
    with pytest.raises(
        ValueError, match=r"model\.backbone=PE-Core-B/16: open_clip knows no such model\. Did you mean PE-Core-B-16"
    ):
        backbone.named("PE-Core-B/16")
    with pytest.raises(ValueError, match="Did you mean PE-Core-B-16"):
        ModelConfig(backbone="PE-Core-B/16")


def test_blank_settings_are_the_models_own():
    spec = backbone.named("tiny-pe")
    spec["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    model = CLIP4Clip(spec)
    model.check_data(DataConfig(num_frames=2), "it")  # 32 pixels and 32 words, not CLIP's
    model.set_pixels(DataConfig(num_frames=2))
    assert model.pixels.scale[0] == pytest.approx(1 / (255 * 0.25))


def test_what_changed_of_towers_is_named():
    spec = backbone.named("tiny-vit")
    assert backbone.other_towers(spec, spec | {"preprocess_cfg": {}}) == []  # which the settings hold
    assert backbone.other_towers(spec | {"quick_gelu": False}, spec) == ["quick_gelu"]


def test_operations_are_counted_where_no_formula_holds():
    spec = backbone.named("tiny-vit")
    counted = flops.counted(json.dumps(spec), 20)
    formula = flops.per_pair(spec, 1, 20)
    assert sum(counted) == pytest.approx(formula, rel=0.02)
    assert flops.per_pair(backbone.named("tiny-pe"), 2, 20) > flops.per_pair(backbone.named("tiny-pe"), 1, 20) > 0


def test_batch_norms_keep_their_statistics():
    model = CLIP4Clip(backbone.named("tiny-resnet")).train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(2, 1, 3, 32, 32), torch.ones(2, 1, dtype=torch.bool), captions(77)[:2])
    assert before and all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert any("batch norms" in note for note in model.notes)
    assert not towers.has_batch_norms(CLIP4Clip(backbone.named("tiny-vit")).clip)


LARGE = {"PE-Core-bigG-14-448", "ViTamin-XL-384", "EVA02-E-14-plus", "RN50x64", "coca_ViT-L-14", "ViT-H-14-worldwide"}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_no_name_of_open_clip_ends_in_a_traceback(monkeypatch):
    """Every fourth and some large ones, on the meta device: each can be used, or the reason is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = [name for name in open_clip.list_models() if not name.startswith("tiny-")]
    assert len(names) > 140
    rows = [backbones.describe(name) for name in sorted({*names[::4], *LARGE})]
    for row in rows:
        if row.reason:
            assert "Hugging Face's" in row.reason and "could not be fetched" in row.reason, row
        else:
            assert row.image_size >= 32 and row.words >= 16 and row.weights > 100_000 and row.gflop > 0
    usable = {row.name for row in rows if not row.reason}
    assert usable >= LARGE


def test_the_list(capsys):
    assert backbones.main(["tiny-pe", "tiny-vit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("tiny-pe ") and "32 shortest" in lines[1] and "yes" in lines[1]
    assert backbones.main(["--json", "tiny-sigmoid"]) == 0
    assert '"words": 20' in capsys.readouterr().out
    assert backbones.main(["nonsense"]) == 1
    assert capsys.readouterr().err.startswith("error: nonsense: open_clip knows no backbone")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"vision_cfg": {"colours": 4}}, r"its vision_cfg has colours, which open_clip .* does not know"),
        ({"vision_cfg": {"image_size": [32, 64], "patch_size": 16}}, "pictures of 64x32, and c4c makes square ones"),
        (
            {"vision_cfg": {"timm_model_name": "vit_nobody", "image_size": 32}},
            "its image tower is vit_nobody, which timm",
        ),
        ({}, "describes no towers"),
    ],
)
def test_what_cannot_be_supported_says_why(config, reason, tmp_path):
    whole = {"embed_dim": 8, "text_cfg": {"context_length": 8}} | config
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": whole if config else {}}))
    for name in (f"local-dir:{tmp_path}", str(tmp_path)):
        with pytest.raises(ValueError, match=reason):
            backbone.named(name)
    with pytest.raises(ValueError, match=r"there is no .*open_clip_config\.json"):
        backbone.named(f"local-dir:{tmp_path}/nowhere")

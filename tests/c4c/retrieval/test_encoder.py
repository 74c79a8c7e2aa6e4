"""A text encoder without its run says what the whole model says; a vector depends on its own text or frame alone."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from c4c.config import Config, dump
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS
from c4c.models.pretrained import open_checkpoint
from c4c.retrieval.encoder import Encoder, Identity, TextEncoder
from c4c.settings import ModelConfig
from c4c.training.run_folder import save_description
from c4c.zero import checkpoint
from pipelines.config import DataConfig
from tests import tiny_backbones
from tests.c4c.retrieval.encoders import FRAMES, SENTENCES, encoder, pixels, write

pytestmark = pytest.mark.slow  # imports open_clip
HEAD_NAMES = sorted(HEADS)


@pytest.mark.parametrize("backbone", tiny_backbones.NAMES)
def test_the_text_side_alone_says_the_same(backbone, tmp_path):
    whole = encoder(
        tmp_path / "model.safetensors", "wti" if backbone in ("tiny-vit", "tiny-roberta") else "meanP", backbone
    )
    (tmp_path / "index").mkdir()
    whole.save(tmp_path / "index" / "text")
    for file in tmp_path.iterdir():  # neither the weights nor the vocabulary are needed any more
        if file.name != "index":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    text = TextEncoder.load(tmp_path / "index" / "text")
    assert torch.equal(text.texts(SENTENCES), whole.texts(SENTENCES))
    assert text.identity == whole.identity and text.late == whole.late and text.max_words == whole.max_words


def test_loading_the_text_side_makes_no_weight_of_the_image_tower(tmp_path, monkeypatch):
    encoder(tmp_path / "model.safetensors").save(tmp_path / "text")
    made: list[str] = []
    build = CLIP4Clip.__init__

    def watched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        made.extend(name for name, weight in self.named_parameters() if ".visual." in name and not weight.is_meta)

    monkeypatch.setattr(CLIP4Clip, "__init__", watched)
    text = TextEncoder.load(tmp_path / "text")
    assert made == []
    assert not [name for name, _ in text.model.named_parameters() if "visual" in name]
    assert not [
        name for name, tensor in (*text.model.named_parameters(), *text.model.named_buffers()) if tensor.is_meta
    ]


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_what_is_encoded_together_changes_nothing(head, tmp_path):
    model = encoder(tmp_path / "model.safetensors", head)
    texts = model.texts(SENTENCES)
    for i in (0, 3, 2):
        assert torch.equal(model.texts([SENTENCES[i]])[0], texts[i])
    many = pixels(model.block + 5)
    features = model.frames(many)
    assert torch.equal(model.frames(many[3:4])[0], features[3])
    assert torch.equal(model.frames(many[5:]), features[5:])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    clips = pixels(3, FRAMES)
    videos = model.videos(model.clips(clips, mask), mask)
    alone = model.videos(model.clips(clips[1:2], mask[1:2]), mask[1:2])
    assert torch.equal(videos[1], alone[0])
    assert torch.equal(model.video_vectors(videos)[1], model.video_vectors(alone)[0])
    assert torch.equal(model.vectors(texts)[2], model.vectors(texts[2:3])[0])


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_scores_are_the_models(head, patch, tmp_path):
    path = write(tmp_path / "model.safetensors", head, patch=patch)
    ours = Encoder.load(str(path), device="cpu")
    assert ours.framewise == (patch == "2d")
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)
    clips = pixels(3, FRAMES)
    texts, videos = ours.texts(SENTENCES), ours.videos(ours.clips(clips, mask), mask)

    model, data = open_checkpoint(str(path))
    model.set_pixels(data)
    with torch.no_grad():
        text, video = model(torch.from_numpy(clips), torch.from_numpy(mask), ours.tokenizer(SENTENCES, data.max_words))
        expected = model.head.score(text, video)
    torch.testing.assert_close(ours.score(texts, videos), expected, atol=2e-5, rtol=1e-4)
    vectors = ours.vectors(texts), ours.video_vectors(videos)
    for part, number in zip(vectors, (len(SENTENCES), 3), strict=True):
        assert part.shape == (number, 32) and torch.allclose(part.norm(dim=-1), torch.ones(number), atol=1e-5)
    if not ours.late:
        torch.testing.assert_close(vectors[0] @ vectors[1].T, expected, atol=2e-5, rtol=1e-4)


def test_nothing_to_encode_is_no_error(tmp_path):
    for head in ("meanP", "wti"):
        model = encoder(tmp_path / f"{head}.safetensors", head)
        assert model.vectors(model.texts([])).shape == (0, 32)
        assert model.frames(pixels(0)).shape == (0, 32)
        features = model.clips(pixels(0, FRAMES), np.zeros((0, FRAMES), bool))
        videos = model.videos(features, np.zeros((0, FRAMES), bool))
        assert features.shape == (0, FRAMES, 32) and model.video_vectors(videos).shape == (0, 32)


# ---- which weights a vector is of ----


def as_run(path, run, backbone="tiny-vit") -> None:
    """The model of a file as a run whose checkpoint holds it."""
    model, data = open_checkpoint(str(path))
    config = Config(
        model=ModelConfig(backbone=backbone, init_from="scratch", head=model.head.name, head_layers=1),
        data=replace(data, train="somewhere", threads=3, eval_batch_size=5),
    )
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {"random.0.cpu": torch.zeros(1)}}
    checkpoint.write(run, 7, tensors, {"step": 7, "updates": 7, "loss_scaler": {}})
    save_description(run, dump(config), {key: value for key, value in model.spec.items() if key != "preprocess_cfg"})


def test_a_run_and_what_was_exported_of_it_are_the_same_model(tmp_path):
    path, run = write(tmp_path / "model.safetensors"), tmp_path / "run"
    as_run(path, run)
    of_file, of_run = encoder(path).identity, Encoder.load(str(run), device="cpu").identity
    assert of_file.digest == of_run.digest and len(of_file.digest) == 64
    assert (of_run.checkpoint, of_run.tag) == (str(run), "step00000007")
    assert Encoder.load(str(path), device="cpu", runtime="torch-bf16").identity == of_file
    assert Identity.from_dict(json.loads(json.dumps(of_file.to_dict()))) == of_file


def test_whatever_changes_vectors_changes_the_digest(tmp_path):
    path = write(tmp_path / "model.safetensors")
    digests = [
        encoder(path).identity.digest,
        encoder(path, overrides=["data.num_frames=3"]).identity.digest,
        encoder(path, overrides=["data.interpolation=bilinear"]).identity.digest,
        encoder(write(tmp_path / "other.safetensors", seed=1)).identity.digest,
        encoder(tmp_path / "head.safetensors", "SimpleMeanAdapter").identity.digest,
        encoder(write(tmp_path / "activation.safetensors", quick_gelu=False)).identity.digest,
    ]
    assert len(set(digests)) == len(digests)


def test_a_new_setting_changes_no_digest(tmp_path, monkeypatch):
    """A later version of c4c keeps one more setting of the data: indexes from before go on."""
    path = write(tmp_path / "model.safetensors")
    before = encoder(path).identity
    monkeypatch.setattr("c4c.models.pretrained.EVALUATION_SETTINGS", (*before.settings, "frame_order"))
    now = encoder(path).identity
    assert "frame_order" in now.settings and now.digest == before.digest
    assert encoder(path, overrides=["data.frame_order=reverse"]).identity.digest != before.digest


def test_settings_are_checked(tmp_path):
    path = write(tmp_path / "model.safetensors", "TransformerAdapter")
    with pytest.raises(ValueError, match="more than the 4 frames"):
        encoder(path, overrides=["data.num_frames=5"])
    with pytest.raises(ValueError, match="longer than the 77 tokens"):
        encoder(path, overrides=["data.max_words=78"])
    with pytest.raises(ValueError, match="--runtime must be one of torch"):
        encoder(path, runtime="tensorflow")
    for device, words in (("gpu", "must be cpu, cuda or cuda:N"), ("cuda:99", "this machine has")):
        with pytest.raises(ValueError, match=words):
            Encoder.load(str(path), device=device)
    with pytest.raises(ValueError, match="no such file"):
        Encoder.load(str(tmp_path / "none.safetensors"))
    assert encoder(path, overrides=["data.num_frames=3"]).data.num_frames == 3


# ---- damaged folders ----


def damage_json(folder):
    (folder / "encoder.json").write_text('{"format": 1, "spec": {}}')


def damage_weights(folder):
    (folder / "text.safetensors").write_bytes((folder / "text.safetensors").read_bytes()[:1000])


def other_format(folder):
    (folder / "encoder.json").write_text('{"format": 99}')


def no_weights(folder):
    (folder / "text.safetensors").unlink()


def nothing(folder):
    (folder / "encoder.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(damage_json, "damaged"), (damage_weights, "damaged"), (no_weights, "damaged"), (other_format, "format 99"), (nothing, "holds no text encoder")],
)  # fmt: skip
def test_a_damaged_folder_is_refused(damage, words, tmp_path):
    encoder(tmp_path / "model.safetensors").save(tmp_path / "text")
    damage(tmp_path / "text")
    with pytest.raises(ValueError, match=words) as refused:
        TextEncoder.load(tmp_path / "text")
    assert "\n" not in str(refused.value) and str(tmp_path / "text") in str(refused.value)


# ---- runtimes ----


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a model, and a cache of graphs that stays from test to test."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("runtimes")
    write(folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def test_auto_measures_and_takes_one_that_agrees(kept, monkeypatch, capsys):
    monkeypatch.setattr("c4c.retrieval.runtimes._MEASURED_S", 0.02)
    monkeypatch.setattr("c4c.retrieval.runtimes.AGREE", 0.999999)
    model = encoder(kept / "model.safetensors", runtime="auto")
    began, *lines = capsys.readouterr().err.splitlines()
    assert began.startswith("writing the image tower's graph")
    assert [line.split()[0] for line in lines] == ["runtime", "torch", "onnx", "torch-bf16"]
    assert model.runtime in ("torch", "onnx"), "bf16 is not exact enough for this bound"
    assert [line.split()[0] for line in lines if line.endswith("<- taken")] == [model.runtime]
    encoder(kept / "model.safetensors", runtime="auto")
    assert "writing" not in capsys.readouterr().err, "the graph is kept"


def test_auto_looks_at_what_tells_pictures_apart(tmp_path, monkeypatch, capsys):
    """All features of this tower have nearly one direction: rounded ones agree to 5 digits, and know nothing any more."""
    monkeypatch.setattr("c4c.retrieval.runtimes._MEASURED_S", 0.02)
    monkeypatch.setattr("c4c.models.export.onnx.PACKAGES", ("no_such_package",))
    model = encoder(tmp_path / "model.safetensors", "meanP", "tiny-pe", runtime="auto")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["runtime", "torch", "torch-bf16"]
    assert lines[-1].endswith("not exact enough") and float(lines[-1].split()[2]) > 0.999
    assert model.runtime == "torch"


def test_every_runtime_gives_the_features_of_torch(kept):
    path = kept / "model.safetensors"
    exact, sample = encoder(path), pixels(21)
    expected = exact.frames(sample)
    for runtime, cosine in (("onnx", 0.99999), ("onnx-int8", 0.98), ("torch-bf16", 0.995), ("onnx", 0.99999)):
        other = encoder(path, runtime=runtime)
        features = other.frames(sample)
        assert other.runtime == runtime and features.dtype == torch.float32 and features.shape == expected.shape
        assert torch.cosine_similarity(features, expected).min() > cosine
        assert torch.equal(features, expected) == (runtime == "torch"), "it is another arithmetic"
        assert torch.equal(other.frames(sample[2:3])[0], features[2])
        assert 0.5 < other.loss(sample) <= 1 and (other.loss(sample) > 0.99 or runtime != "onnx")
        assert torch.equal(other.texts(SENTENCES), exact.texts(SENTENCES)), "the text tower is always torch's"
    graphs = sorted(file.parent.name.removeprefix(exact.identity.digest)[:5] for file in kept.rglob("tower.onnx"))
    assert graphs == ["", "-int8"], "made once each"
    assert exact.loss(sample) == 1.0
    with pytest.raises(ValueError, match="too few"):
        exact.loss(sample[:2])


def test_frames_that_meet_in_the_tower_need_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "model.safetensors", patch="3d")
    with pytest.raises(ValueError, match="linear_patch=3d"):
        encoder(path, runtime="onnx")
    exact, rounded = encoder(path), encoder(path, runtime="torch-bf16")
    assert encoder(path, runtime="auto").runtime == "torch"
    with pytest.raises(ValueError, match="frames meet"):
        exact.frames(pixels(1))
    mask = np.array([[1, 1, 1, 0]], bool)
    a, b = (model.clips(pixels(1, FRAMES), mask) for model in (exact, rounded))
    assert torch.cosine_similarity(a[0, :3], b[0, :3]).min() > 0.99
    assert not a[0, 3].any() and not torch.equal(a, b)


def test_a_runtime_of_the_cpu_is_refused_on_a_gpu(tmp_path):
    from c4c.retrieval import runtimes

    model = encoder(tmp_path / "model.safetensors").model
    with pytest.raises(ValueError, match="runs on a CPU"):
        runtimes.start("onnx", model, torch.device("cuda"), "0")


def test_data_settings_of_the_file_are_the_encoders(tmp_path):
    model = encoder(tmp_path / "model.safetensors")
    assert isinstance(model.data, DataConfig)
    assert (model.data.num_frames, model.data.image_size) == (FRAMES, tiny_backbones.SIZE)
    assert model.identity.settings["num_frames"] == FRAMES and model.identity.width == 32


# ---- what is part of a model beside its plain towers goes along ----


def test_prompts_are_part_of_the_text_side(tmp_path):
    path = write(tmp_path / "model.safetensors", prompts=3)
    whole, plain = Encoder.load(str(path), device="cpu"), encoder(tmp_path / "plain.safetensors")
    whole.save(tmp_path / "text")
    text = TextEncoder.load(tmp_path / "text")
    assert torch.equal(text.texts(SENTENCES), whole.texts(SENTENCES))
    assert not torch.allclose(text.texts(SENTENCES), plain.texts(SENTENCES), atol=1e-2)
    about = json.loads((tmp_path / "text" / "encoder.json").read_text())
    del about["prompts"]  # as older folders are
    (tmp_path / "text" / "encoder.json").write_text(json.dumps(about))
    assert torch.equal(TextEncoder.load(tmp_path / "text").texts(SENTENCES), whole.texts(SENTENCES))


def test_a_bias_that_training_added_is_part_of_the_text_side(tmp_path):
    whole = Encoder.load(str(write(tmp_path / "model.safetensors", bias=-7.5)), device="cpu")
    whole.save(tmp_path / "text")
    text = TextEncoder.load(tmp_path / "text")
    assert text.model.clip.logit_bias.item() == -7.5
    assert torch.equal(text.texts(SENTENCES), whole.texts(SENTENCES))


def test_weights_without_a_place_are_refused(tmp_path):
    """Left out in silence, they would make another tower of it."""
    encoder(tmp_path / "model.safetensors").save(tmp_path / "text")
    file = tmp_path / "text" / "text.safetensors"
    save_file(load_file(file) | {"clip.transformer.resblocks.0.adapter": torch.zeros(2)}, file)
    with pytest.raises(
        ValueError, match=r"1 weights with no place in the model, as clip\.transformer\.resblocks\.0\.adapter"
    ):
        TextEncoder.load(tmp_path / "text")

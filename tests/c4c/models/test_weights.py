"""Weights in every layout that users have: recognised, sized by their shapes, never executed, and written back."""

import collections
import json
import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from c4c.config import Config
from c4c.export import export
from c4c.models import backbone, towers
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.weights import read, read_backbone
from c4c.models.weights.openclip import how_to_fetch
from c4c.settings import ModelConfig
from c4c.training.run_folder import is_run
from pipelines.preprocess import CLIP
from tests.c4c.models.small import SPEC, clip_state, register, scores, tiny

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("name", ["meanP", "seqLSTM", "seqTransf", "tightTransf", "meanP_3d"])
def test_official_checkpoints(name, tmp_path):
    state = load_file(GOLDEN / f"{name}.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin.4")
    weights = read(tmp_path / "pytorch_model.bin.4")
    head, _, patch = name.partition("_")
    assert (weights.kind, weights.head, weights.linear_patch) == ("official", head, patch or "2d")
    assert weights.spec["vision_cfg"]["layers"] == 2 and weights.spec["text_cfg"]["vocab_size"] == 1000
    assert CLIP4Clip.from_checkpoint(tmp_path / "pytorch_model.bin.4").image_size == 64


def test_checkpoints_of_drl(tmp_path):
    """Which has CLIP4Clip's names and wti's. What its --agg_module seqLSTM would add to wti is no head here, and is refused."""
    model, other = tiny("seqWTI"), tiny("seqLSTM")
    official = {name.removeprefix("head."): weight for name, weight in model.state_dict().items()}
    torch.save(official, tmp_path / "pytorch_model.bin.4")
    weights = read(tmp_path / "pytorch_model.bin.4")
    assert (weights.kind, weights.head, weights.blocks) == ("official", "seqWTI", 2)
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "pytorch_model.bin.4")), scores(model))
    kept = {name: weight for name, weight in official.items() if not name.startswith(("transformerClip.", "frame_"))}
    torch.save(kept, tmp_path / "wti.bin")
    assert read(tmp_path / "wti.bin").head == "wti"
    torch.save(kept | other.head.state_dict(), tmp_path / "lstm.bin")
    with pytest.raises(ValueError, match=r"unexpected head\.text_weight_fc\.0\.bias"):
        CLIP4Clip.from_checkpoint(tmp_path / "lstm.bin")


def test_mmaction2_checkpoints(tmp_path):
    model = tiny("TransformerAdapter")
    state = {f"clip.{k}": v for k, v in model.clip.state_dict().items()}
    adapter = {f"adapter.{k}": v for k, v in model.head.state_dict().items()}
    extra = {"data_preprocessor.mean": torch.zeros(3)}
    torch.save({"meta": {"epoch": 5}, "state_dict": state | adapter | extra}, tmp_path / "a.pth")
    torch.save({"meta": {"epoch": 5}, "state_dict": state}, tmp_path / "b.pth")
    weights = read(tmp_path / "a.pth")
    assert (weights.kind, weights.head, weights.segments, weights.blocks) == ("mmaction2", "TransformerAdapter", 4, 2)
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "a.pth")), scores(model))
    assert CLIP4Clip.from_checkpoint(tmp_path / "b.pth").head.name == "SimpleMeanAdapter"


def test_openai_archive_is_read_without_running_it(tmp_path):
    """A real TorchScript archive with OpenAI's names and half-precision weights."""
    clip = tiny().clip.half()

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in clip.named_children():
                self.add_module(
                    name, child if name != "token_embedding" else torch.nn.Embedding.from_pretrained(child.weight)
                )
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, torch.nn.Parameter(getattr(clip, name)))
            for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 1000)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, image):
            return self.visual.conv1(image) * self.logit_scale

    traced = torch.jit.trace(Archive(), torch.zeros(1, 3, 32, 32, dtype=torch.float16), check_trace=False)
    torch.jit.save(traced, tmp_path / "ViT.pt")
    weights = read(tmp_path / "ViT.pt")
    assert (weights.kind, weights.spec["quick_gelu"]) == ("OpenAI", True)
    for name, value in clip.state_dict().items():
        assert torch.equal(weights.state[f"clip.{name}"], value.float()), name
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "ViT.pt")), scores(_with(clip.float())))


def _with(clip) -> CLIP4Clip:
    model = tiny()
    model.clip.load_state_dict(clip.state_dict())
    return model


def test_an_openai_state_dict(tmp_path):
    """The sizes of the model among the weights tell that OpenAI wrote them."""
    extras = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(1000),
    }
    torch.save(clip_state() | extras, tmp_path / "openai.pt")
    weights = read(tmp_path / "openai.pt")
    assert (weights.kind, weights.spec["quick_gelu"]) == ("OpenAI", True)
    assert torch.equal(scores(CLIP4Clip.from_weights(weights, "")), scores(tiny()))


def test_what_does_not_fit_is_listed(tmp_path):
    state = load_file(GOLDEN / "seqTransf.safetensors")
    del state["transformerClip.resblocks.0.ln_1.bias"]
    state["transformerClip.resblocks.1.ln_1.bias"] = torch.zeros(3)
    state["stranger"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(ValueError) as error:
        CLIP4Clip.from_checkpoint(tmp_path / "w.bin")
    for part in (
        "missing head.transformerClip.resblocks.0.ln_1.bias",
        "unexpected head.stranger",
        "has shape [3]",
        "w.bin",
    ):
        assert part in str(error.value)
    del state["transformerClip.resblocks.1.ln_1.bias"]
    torch.save(state, tmp_path / "w.bin")
    CLIP4Clip.from_checkpoint(tmp_path / "w.bin", allow=("head.stranger", "head.transformerClip.*.ln_1.bias"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(number, tmp_path):
    """As of a run that diverged: every score would be no number, and each rank the last."""
    state = load_file(GOLDEN / "meanP.safetensors")
    state["clip.text_projection"][0, 0] = number
    torch.save(state, tmp_path / "pytorch_model.bin.0")
    with pytest.raises(ValueError, match=r"clip\.text_projection holds numbers that are not finite"):
        CLIP4Clip.from_checkpoint(tmp_path / "pytorch_model.bin.0")


def test_nothing_in_a_file_is_run(tmp_path):
    """Old pickles are refused; from torch's archives the tensors are taken, and what else a pickle asks for is passed over."""

    class Evil:
        def __init__(self, call, *args):
            self._call = call, args

        def __reduce__(self):
            return self._call

    ran = tmp_path / "ran"
    evils = [Evil(Path.touch, ran), Evil(os.system, f"touch {ran}"), Evil(eval, f"open({str(ran)!r}, 'w')")]
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"clip.logit_scale": evils}))
    with pytest.raises(ValueError, match="refused"):
        CLIP4Clip.from_checkpoint(tmp_path / "evil.bin")
    torch.save({"clip.logit_scale": evils}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"not the weights of a CLIP ViT|neither"):
        CLIP4Clip.from_checkpoint(tmp_path / "evil.pt")
    state = {f"clip.{k}": v for k, v in clip_state().items()}
    torch.save({"state_dict": state, "message_hub": evils}, tmp_path / "mixed.pth")
    read(tmp_path / "mixed.pth")
    assert not ran.exists()


def test_an_mmengine_checkpoint_loads(tmp_path, monkeypatch):
    """Beside the weights it holds objects of a package that is not installed here: a HistoryBuffer of numpy arrays."""
    package = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.arange(3.0), np.ones(3, dtype=np.int64)
            self._statistics_methods = {"mean": len}

    class MessageHub(collections.OrderedDict):
        pass

    for kind in (HistoryBuffer, MessageHub):
        kind.__module__, kind.__qualname__ = package.__name__, kind.__name__
        setattr(package, kind.__name__, kind)
    for name in ("mmengine", "mmengine.logging", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    model = tiny("TransformerAdapter")
    state = collections.OrderedDict((f"clip.{k}", v) for k, v in model.clip.state_dict().items())
    state |= {f"adapter.{k}": v for k, v in model.head.state_dict().items()}
    state["clip.logit_scale"] = torch.nn.Parameter(state["clip.logit_scale"])
    state._metadata = {"": {"version": 1}}  # as module.state_dict() has it
    hub = MessageHub(loss=HistoryBuffer(), lr=[HistoryBuffer(), {HistoryBuffer()}])
    saved = {"meta": {"epoch": 5, "numpy": np.float64(2)}, "state_dict": state, "message_hub": hub}
    torch.save(saved, tmp_path / "epoch_5.pth")
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "epoch_5.pth", weights_only=True)
    weights = read(tmp_path / "epoch_5.pth")
    assert (weights.kind, weights.head) == ("mmaction2", "TransformerAdapter")
    for name, value in model.state_dict().items():
        assert torch.equal(weights.state[name], value), name
    assert torch.equal(scores(CLIP4Clip.from_checkpoint(tmp_path / "epoch_5.pth")), scores(model))


def test_other_files_are_named(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.safetensors").write_text("no")
    for name, words in (
        ("other.pt", "neither"),
        ("text.safetensors", "is no file of weights"),
        ("gone.pt", "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            CLIP4Clip.from_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        CLIP4Clip.from_checkpoint(tmp_path)


def test_what_is_no_file_of_weights_is_called_so(tmp_path):
    contents = {
        "passwd": b"root:x:0:0:root:/root:/bin/bash\n",
        "metrics.jsonl": b'{"step": 1}\n',
        "empty.pt": b"",
        "text.safetensors": b"no",
        "cut.pt": b"PK\3\4",
        "pickle.bin": pickle.dumps({"clip.logit_scale": Path()}),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        tar.add(tmp_path / "passwd")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "passwd")
    np.savez(tmp_path / "a.npz", a=np.zeros(1))
    for path in (*tmp_path.iterdir(), Path("/dev/null")):
        with pytest.raises(
            ValueError, match=r"is no file of weights.* Read are run folders, \.safetensors files"
        ) as caught:
            read(path)
        assert str(caught.value).startswith(str(path)) and "weights_only" not in str(caught.value)
        assert not is_run(str(path))
    save_file({"clip.logit_scale": torch.zeros(1)}, tmp_path / "odd.safetensors", {"c4c": "{"})
    with pytest.raises(ValueError, match=r"odd\.safetensors: the file is damaged: what it says of its model"):
        read(tmp_path / "odd.safetensors")


def test_a_folder_inside_a_run_names_the_run_and_the_checkpoint(tmp_path, monkeypatch):
    inner = tmp_path / "checkpoints" / "step00000005"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        with pytest.raises(ValueError, match=r"has no config\.yaml\. A run folder is what"):
            read(folder)
    (tmp_path / "config.yaml").write_text("{}")
    for folder, tag in ((inner, inner.name), (inner.parent, "step…")):
        with pytest.raises(
            ValueError, match=rf"Use --ckpt {tmp_path} --tag {tag}, in training model\.init_from={tmp_path} "
        ):
            read(folder)
    monkeypatch.chdir(inner.parent)
    with pytest.raises(ValueError, match=rf"Use --ckpt {tmp_path} --tag step00000005, "):
        read(inner.name)


def test_heads_start_from_the_weights_towers(tmp_path, monkeypatch):
    """model.init_from with bare CLIP weights: the head is new and copies blocks; with a whole model, all is taken."""
    register(monkeypatch, "tiny", SPEC)
    torch.save(clip_state(), tmp_path / "clip.pt")
    config = ModelConfig(backbone="tiny", head="seqTransf", head_layers=2, init_from=str(tmp_path / "clip.pt"))
    model = build(config, 4)
    assert torch.equal(model.head.frame_position_embeddings.weight, model.clip.positional_embedding)
    trained = tiny("seqTransf", seed=3)
    export(trained, tmp_path / "m.safetensors")
    again = build(
        ModelConfig(backbone="tiny", head="seqTransf", head_layers=2, init_from=str(tmp_path / "m.safetensors")), 4
    )
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.warns(UserWarning, match="starts from its towers instead"):
        other = build(ModelConfig(backbone="tiny", head="meanP", init_from=str(tmp_path / "m.safetensors")), 4)
    assert torch.equal(other.clip.text_projection, trained.clip.text_projection)


def test_patches_3d_from_2d_weights(tmp_path, monkeypatch):
    register(monkeypatch, "tiny", SPEC)
    torch.save(clip_state(), tmp_path / "clip.pt")
    flat = build(ModelConfig(backbone="tiny", init_from=str(tmp_path / "clip.pt")), 4).eval()
    deep = build(ModelConfig(backbone="tiny", linear_patch="3d", init_from=str(tmp_path / "clip.pt")), 4).eval()
    torch.testing.assert_close(scores(deep), scores(flat), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        deep.clip.visual.conv2.weight[:, :, 0] += 0.1 * torch.randn(64, 3, 16, 16)
    assert not torch.allclose(scores(deep), scores(flat), atol=1e-3)


def test_weights_that_are_not_there_name_the_file_to_fetch():
    with pytest.raises(ValueError, match=r"tags are .*openai"):
        build(ModelConfig(backbone="ViT-B-32", init_from="nonsense"), 4)
    with pytest.raises(ValueError, match="scratch"):
        build(ModelConfig(backbone="ViT-B-32"), 4)
    said = how_to_fetch("ViT-H-14-quickgelu", "dfn5b")
    assert "hf download apple/DFN5B-CLIP-ViT-H-14." in said and "model.init_from=local-dir:DIR" in said
    assert "QuickGELU, pixels of mean" in said and "squash, bicubic" in said


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-B-32-quickgelu", "ViT-H-14"])
def test_backbones_by_name(name):
    spec = backbone.named(name)
    assert spec["quick_gelu"] == name.endswith("quickgelu")
    assert spec["vision_cfg"]["layers"] >= 12


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda spec: spec.pop("vision_cfg"), "KeyError: 'vision_cfg'"),
        (lambda spec: spec.pop("embed_dim"), "KeyError: 'embed_dim'"),
        (lambda spec: spec.pop("quick_gelu"), "KeyError: 'quick_gelu'"),
        (lambda spec: spec["text_cfg"].update(colour=3), "TypeError: .*colour"),
        (lambda spec: spec.update(text_cfg=7), "TypeError"),
    ],
    ids=["no vision", "no width", "no activation", "an unknown key", "no keys"],
)
def test_a_damaged_description_of_towers_is_named(damage, reason, tmp_path):
    spec = json.loads(json.dumps(SPEC))
    assert towers.sizes(spec)["feature size"] == SPEC["embed_dim"]
    damage(spec)
    with pytest.raises(ValueError, match=rf"^the description of the towers is damaged \({reason}"):
        towers.sizes(spec)
    path = tmp_path / "model.safetensors"
    about = {"spec": spec, "head": "meanP", "linear_patch": "2d", "blocks": 4, "segments": 12}
    save_file({"clip.logit_scale": torch.zeros(1)}, path, {"c4c": json.dumps(about)})
    with pytest.raises(ValueError, match=rf"^model\.init_from={path}: the description of the towers is damaged"):
        build(ModelConfig(backbone="ViT-demo-16", init_from=str(path)), 4)


def test_a_checkpoint_out_of_its_run_is_refused_with_a_backbone_too(tmp_path, monkeypatch):
    register(monkeypatch, "tiny", SPEC)
    state = tiny("seqTransf").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for file in sorted(tmp_path.iterdir()):
        for opened in (
            lambda path: read(path),
            lambda path: read(path, "tiny"),
            lambda path: read_backbone("tiny", str(path)),
        ):
            with pytest.raises(ValueError, match="taken out of its run folder"):
                opened(file)


def test_starting_from_a_run_takes_the_pixels_that_it_was_trained_with(tmp_path):
    text = "data: {mean: [0.5, 0.5, 0.5], resize_mode: squash, interpolation: bilinear, fill: 9}\n"
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "towers.json").write_text(json.dumps(SPEC))
    data = backbone.settled(Config(model=ModelConfig(init_from=str(tmp_path)))).data
    assert (data.mean, data.resize_mode, data.interpolation, data.fill) == ((0.5,) * 3, "squash", "bilinear", 9)
    assert data.std == CLIP.std and data.image_size == 32

"""The ONNX graphs give onnxruntime what the model itself gives, for numbers of clips, frames and words that no graph was made with."""

import json

import numpy as np
import pytest
import torch

from c4c.export import export, main
from c4c.models import backbone
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.onnx import _check, _graph
from c4c.models.heads import HEADS
from pipelines.config import DataConfig
from tests import tiny_backbones
from tests.c4c.models.small import clips, spec, tiny
from tests.often import ways

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

SMALL = spec(embed_dim=32, vision_cfg={"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
             text_cfg={"context_length": 16, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 1})  # fmt: skip
# each head and most kinds of towers once: an export takes seconds
PAIRS = {
    "meanP": "tiny-pe", "SimpleMeanAdapter": "tiny-resnet", "seqLSTM": "tiny-convnext", "seqTransf": "tiny-vit", "wti": "tiny-sigmoid",
    "seqWTI": "tiny-vit", "tightTransf": "tiny-coca", "TransformerAdapter": "tiny-vit of 3d patches",
}  # fmt: skip
OFTEN = {"seqTransf", "wti"}


class Graphs:
    """The graphs of a folder."""

    def __init__(self, folder):
        self.about = json.loads((folder / "c4c.json").read_text())
        self._sessions = {p.stem: onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"])
                          for p in folder.glob("*.onnx")}  # fmt: skip

    def __call__(self, name: str, **inputs: torch.Tensor | np.ndarray) -> np.ndarray:
        return self._sessions[name].run(None, {k: np.asarray(v) for k, v in inputs.items()})[0]

    def axes(self, name: str) -> dict[str, list]:
        return {i.name: i.shape for i in self._sessions[name].get_inputs()}

    def scores(self, frames, mask, tokens) -> np.ndarray:
        """As c4c.json says."""
        text, video = self("text", tokens=tokens), self("video", frames=frames, mask=mask)
        product = self("score", text=text, video=video) if "score" in self._sessions else text @ video.T
        return self.about["scale"] * product


def written(model: CLIP4Clip, folder, half: bool = False) -> Graphs:
    export(model, folder, "onnx", half=half)
    return Graphs(folder)


def compare(model: CLIP4Clip, graphs: Graphs, atol: float) -> None:
    """Every encoder's output and the scores, of all clips, of one, and of other numbers of frames."""
    frames, mask, tokens = clips(model)
    for videos, length in ((3, 4), (1, 4), (2, 1), (3, 2)):
        f, m = frames[:videos, :length], mask[:videos, :length]
        with torch.no_grad():
            text, video = model.head.text(model.encode_text(tokens)).float(), model(f, m, tokens)[1]
            scores = model.scale() * model.head.score(text, video)
        bound = atol * max(1.0, float(video.abs().max()))
        np.testing.assert_allclose(graphs("video", frames=f, mask=m), video, rtol=0, atol=bound)
        np.testing.assert_allclose(
            graphs("text", tokens=tokens), text, rtol=0, atol=atol * max(1.0, float(text.abs().max()))
        )
        expected = scores.numpy()
        assert expected.shape == (3, videos) and expected.std() > 1e-3
        np.testing.assert_allclose(
            graphs.scores(f, m, tokens), expected, rtol=0, atol=atol * max(1.0, graphs.about["scale"]) * 5
        )


@pytest.mark.parametrize("head", ways(PAIRS, OFTEN))
def test_every_head_and_every_kind_of_tower(head, tmp_path):
    tiny_backbones.register()
    name, _, patches = PAIRS[head].partition(" of ")
    model = tiny(head, "3d" if patches else "2d", spec=backbone.named(name))
    graphs = written(model, tmp_path / "out")
    compare(model, graphs, 1e-5)
    size = model.image_size
    assert graphs.axes("video") == {"frames": ["videos", "frames", 3, size, size], "mask": ["videos", "frames"]}
    assert graphs.axes("text") == {"tokens": ["texts", 20 if name in ("tiny-sigmoid", "tiny-coca") else "words"]}
    assert (graphs.about["most_frames"], graphs.about["head"]) == (model.head.most_frames, head)
    bias = model.clip.logit_bias
    assert graphs.about["logit_bias"] == (None if bias is None else pytest.approx(bias.item()))


def test_no_head_is_left_out():
    assert PAIRS.keys() == HEADS.keys()


def test_half_precision_and_what_the_files_say(tmp_path, monkeypatch):
    # weights in a file of their own, as of models above 1 GB
    monkeypatch.setattr("c4c.models.export.onnx._ONE_FILE", 0)
    model = tiny("seqTransf", spec=SMALL)
    data = DataConfig(num_frames=5, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, max_words=9)
    notes = export(model, tmp_path / "out", "onnx", data, half=True)
    assert notes == ["opset 18, towers in fp16"] and next(model.parameters()).dtype == torch.float32
    compare(model, Graphs(tmp_path / "out"), 1e-3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "c4c.json", "text.onnx", "text.onnx.data", "video.onnx", "video.onnx.data"]  # fmt: skip
    for name in ("text.onnx", "video.onnx"):
        graph = onnx.load(tmp_path / "out" / name)
        onnx.checker.check_model(tmp_path / "out" / name)
        assert [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")] == [18]
        assert {p.key: p.value for p in graph.metadata_props}["opset"] == "18"
        of_towers = {t.data_type for t in graph.graph.initializer if ".clip." in t.name}
        assert of_towers == {onnx.TensorProto.FLOAT16}
    about = json.loads((tmp_path / "out" / "c4c.json").read_text())
    assert (about["opset"], about["precision"], about["score"]) == (18, "fp16", "scale * text @ video.T")
    assert (
        about["data"]["mean"] == [0.5] * 3 and about["data"]["num_frames"] == 5 and about["tokenizer"]["kind"] == "clip"
    )
    assert about["scale"] == pytest.approx(model.scale().item())


def test_graphs_of_an_earlier_export_do_not_stay(tmp_path):
    """A reader would score by the earlier head."""
    written(tiny("wti", spec=SMALL), tmp_path / "out")
    assert (tmp_path / "out" / "score.onnx").is_file()
    model = tiny("meanP", spec=SMALL, seed=1)
    compare(model, written(model, tmp_path / "out"), 1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c4c.json", "text.onnx", "video.onnx"]


def test_a_graph_that_gives_something_else_is_refused(tmp_path):
    """As one would be that holds on to the sizes it was made with."""
    module, inputs = torch.nn.Linear(4, 4), {"text": torch.randn(2, 4)}
    _graph(module, inputs, "out", {"text": 1}, tmp_path / "a.onnx")
    _check(module, {"text": torch.randn(5, 4)}, tmp_path / "a.onnx", False)
    with torch.no_grad():
        module.bias += 0.01
    said = r"the graph a\.onnx does not do in onnxruntime what the model does \({}"
    with pytest.raises(ValueError, match=said.format("it is off by")):
        _check(module, inputs, tmp_path / "a.onnx", False)
    with pytest.raises(ValueError, match=said.format(".*invalid dimensions")):
        _check(torch.nn.Linear(3, 4), {"text": torch.randn(5, 3)}, tmp_path / "a.onnx", False)


def test_a_missing_package_is_named_before_weights_are_read(tmp_path, monkeypatch, capsys):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("c4c.models.pretrained.open_checkpoint", read)
    monkeypatch.setattr("c4c.models.export.onnx.find_spec", lambda name: None)
    words = ["--ckpt", "openai:ViT-B-32", "--to", str(tmp_path / "out"), "--format", "onnx"]
    monkeypatch.setattr("sys.argv", ["export", *words])
    assert main() == 1
    err = "error: --format onnx needs onnx, onnxruntime, onnxscript: pip install onnx onnxruntime onnxscript\n"
    assert capsys.readouterr().err == err

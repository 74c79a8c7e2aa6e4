"""ONNX graphs of the two encoders, for onnxruntime and TensorRT, and c4c.json, which says how to feed them.

video.onnx  frames [M, F, 3, H, W] and mask bool [M, F] -> what stands for each video
text.onnx   tokens int64 [N, L] -> what stands for each text
score.onnx  both -> scores [N, M], for heads whose score is more than a product of the two; without the temperature
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from c4c.models.backbone import preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.folder import drop_earlier, save_json, written
from c4c.models.heads.mean import Cosine
from c4c.models.pretrained import evaluation_settings
from pipelines.config import DataConfig
from pipelines.tokens import CLIPS
from shards import first_line

OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
VIDEO, TEXT, SCORE, ABOUT = "video.onnx", "text.onnx", "score.onnx", "c4c.json"
_ONE_FILE = 1 << 30  # bytes of weights; larger graphs keep them in a file beside, as protobuf ends at 2 GB
_WORDS = 8  # of the example that a graph is made by


def require_packages(option: str = "--format onnx") -> None:
    """Raise ValueError if what writes and checks ONNX is not installed. option: what needs it, for the message."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f"{option} needs {', '.join(missing)}: pip install {' '.join(missing)}")


class _Video(nn.Module):
    def __init__(self, model: CLIP4Clip):
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        features = self.model.encode_video(frames, mask) * mask.unsqueeze(-1)
        return self.model.head.video(features, mask).float()


class _Text(nn.Module):
    def __init__(self, model: CLIP4Clip):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.head.text(self.model.encode_text(tokens)).float()


class _Score(nn.Module):
    def __init__(self, model: CLIP4Clip):
        super().__init__()
        self.head = model.head

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        return self.head.score_at_once(text, video)


@torch.no_grad()
def write(model: CLIP4Clip, data: DataConfig | None, folder: Path, half: bool = False) -> list[str]:
    """half: the towers' weights and arithmetic in fp16; the head, inputs and outputs stay fp32.

    Returns notes for people. Raises ValueError, OSError.
    """
    if model.merging:
        raise ValueError(
            f"--format onnx cannot write the sorting by which the image tower merges tokens (model.merge={model.merging.tokens}): use "
            "--format c4c"
        )
    require_packages()
    data = (data or DataConfig(num_frames=model.segments)).filled(preprocess_of(model.spec))
    dot, about = isinstance(model.head, Cosine), _about(model, data, half)
    if half:
        model = deepcopy(model)
        model.clip.half()  # the head's weights are few, and long sums over frames lose much in fp16
    video, text, score = (kind(model).eval() for kind in (_Video, _Text, _Score))
    free = 1 if about["words_fixed"] else 2
    with written(folder) as beside:
        clips, words = _clips(model, 2, 3), _words(model, 2)
        _graph(video, clips, "video", {"frames": 2, "mask": 2}, beside / VIDEO)
        _graph(text, words, "text", {"tokens": free}, beside / TEXT)
        if not dot:
            pair = {"text": text(**words), "video": video(**clips)}
            _graph(score, pair, "scores", {name: value.dim() - 1 for name, value in pair.items()}, beside / SCORE)
        clips, words = _clips(model, 3, 2), _words(model, 3)
        _check(video, clips, beside / VIDEO, half)
        _check(text, words, beside / TEXT, half)
        if not dot:
            _check(score, {"text": text(**words), "video": video(**clips)}, beside / SCORE, half)
        save_json(about, beside / ABOUT)
        drop_earlier(folder, beside, (SCORE, *(f"{name}.data" for name in (VIDEO, TEXT, SCORE))))
    return [f"opset {OPSET}, {'towers in fp16' if half else 'fp32'}"]


class _Picture(nn.Module):
    def __init__(self, model: CLIP4Clip):
        super().__init__()
        self.visual = model.clip.visual

    def forward(self, pictures: Tensor) -> Tensor:
        return self.visual(pictures)


@torch.no_grad()
def write_image_tower(model: CLIP4Clip, path: Path) -> None:
    """The image tower alone: normalised pictures float32 [P, 3, H, W] -> features [P, D]. Raises ValueError, OSError.

    model: on the CPU, in fp32, of 2d patches.
    """
    require_packages()
    tower = _Picture(model).eval()
    _graph(tower, _pictures(model, 2), "features", {"pictures": 1}, path)
    _check(tower, _pictures(model, 3), path, half=False)


def round_to_int8(graph: Path, path: Path) -> None:
    """Write a graph whose matrix products are of 8-bit integers: weights are rounded once for each column, activations as they come
    (onnxruntime's dynamic quantization). Raises ValueError, OSError.

    Weights take 7 of the 8 bits: sums of products of 8 bits do not fit the 16-bit registers of x86 processors without VNNI, which
    cut them off, so that features would be worse there, and others than elsewhere.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8, reduce_range=True,
            use_external_data_format=any(graph.parent.glob(f"{graph.name}.data*")), extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _pictures(model: CLIP4Clip, number: int) -> dict[str, Tensor]:
    """An example."""
    return {"pictures": _clips(model, number, 1)["frames"].flatten(0, 1)}


def _clips(model: CLIP4Clip, videos: int, frames: int) -> dict[str, Tensor]:
    """An example."""
    frames = min(frames, model.head.most_frames or frames)
    pictures = torch.randn(
        videos, frames, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0)
    )
    return {"frames": pictures, "mask": torch.ones(videos, frames, dtype=torch.bool)}


def _words(model: CLIP4Clip, captions: int) -> dict[str, Tensor]:
    """Captions that every text tower can take: different rows, without padding, of other lengths for other numbers."""
    length = model.context_length if _fixed_length(model.spec) else min(_WORDS + captions, model.context_length)
    return {"tokens": torch.arange(captions * length).reshape(captions, length) % 7 + 3}


@torch.no_grad()
def _check(module: nn.Module, inputs: dict[str, Tensor], path: Path, half: bool) -> None:
    """Raise ValueError if a graph does not give what the module gives, for sizes that it was not made with.

    The exporter goes on with fixed sizes, without a word, where a module's code makes a number of a free one.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    expected = module(*inputs.values())
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
        worst = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        reason = f"it is off by {worst:.1e}" if not worst <= (1e-2 if half else 1e-4) else ""
    except Exception as error:  # onnxruntime's own kinds are plain Exceptions
        reason = first_line(error)
    if reason:
        raise ValueError(
            f"the graph {path.name} does not do in onnxruntime what the model does ({reason}), and is not kept"
        )


def _fixed_length(spec: dict) -> bool:
    return bool((CLIPS | spec.get("tokenizer", {}))["fixed_length"])


def _about(model: CLIP4Clip, data: DataConfig, half: bool) -> dict:
    """c4c.json."""
    dot = isinstance(model.head, Cosine)
    bias = getattr(model.clip, "logit_bias", None)
    texts = "[N, D]" if not model.head.tokens else "[N, L, D]"
    return {
        "opset": OPSET, "precision": "fp16" if half else "fp32", "head": model.head.name,
        "inputs": {
            "frames": f"float32 [M, F, 3, {model.image_size}, {model.image_size}], normalised with mean and std",
            "mask": "bool [M, F], false for padding", "tokens": "int64 [N, L]",
        },
        "outputs": {"video": "[M, D]" if dot else "[M, F, D]", "text": texts},
        "score": "scale * text @ video.T" if dot else f"scale * {SCORE}(text, video)",
        "scale": float(model.scale()), "logit_bias": None if bias is None else float(bias),
        "most_frames": model.head.most_frames, "most_words": model.context_length,
        "words_fixed": _fixed_length(model.spec), "data": evaluation_settings(data), "tokenizer": CLIPS | model.spec.get("tokenizer", {}),
    }  # fmt: skip


def _graph(module: nn.Module, inputs: dict[str, Tensor], output: str, dynamic: dict[str, int], path: Path) -> None:
    """Write a module's graph. dynamic: how many of an input's first axes may have any size."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    shapes = tuple(dict.fromkeys(range(dynamic[name]), Dim.DYNAMIC) for name in inputs)
    with _quiet():
        torch.onnx.export(
            module, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=[output],
            dynamic_shapes=shapes, dynamo=True, opset_version=OPSET, external_data=size > _ONE_FILE, verbose=False,
        )  # fmt: skip
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    _name_axes(graph, dynamic)
    onnx.helper.set_model_props(graph, {"made by": "c4c.export", "opset": str(OPSET)})
    onnx.save(graph, str(path))


def _name_axes(graph: Any, dynamic: dict[str, int]) -> None:
    """Give free axes names for people, the same in all graphs."""
    names = {"frames": "MF", "mask": "MF", "tokens": "NL", "text": "NL", "video": "MF", "pictures": "P"}
    renamed = {}
    for value in graph.graph.input:
        for axis, name in zip(range(dynamic[value.name]), names[value.name], strict=False):
            renamed[value.type.tensor_type.shape.dim[axis].dim_param] = {"M": "videos", "F": "frames", "N": "texts",
                                                                         "L": "words", "P": "pictures"}[name]  # fmt: skip
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's reports of its own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

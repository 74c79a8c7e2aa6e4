"""What runs the image tower.

torch       fp32, as in evaluation
torch-bf16  half the memory; quicker where the processor has bf16 arithmetic
onnx        onnxruntime, fp32, on a CPU; the graph is kept in the user's cache
onnx-int8   the same with weights and activations of matrix products rounded to 8 bits: quicker, and a little worse (`loss`)
auto        the quickest on this machine of those whose features are as good as torch's fp32
"""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export import onnx
from c4c.models.towers import match_statistics
from shards import first_line
from shards.user_cache import user_cache

NAMES = ("torch", "torch-bf16", "onnx", "onnx-int8", "auto")
# cosine with torch's fp32 on every picture of the measured block, below which `auto` does not take a runtime; and the same of what
# tells the pictures apart, the features without their mean: all features of some towers have nearly one direction
AGREE, AGREE_APART = 0.999, 0.99
_BLOCK = {"cpu": 16, "cuda": 128}  # pictures that a tower is given at once
_GRAPH = "tower.onnx"
_LARGEST = 2 << 30  # bytes of weights, above which `auto` makes no graph
_MEASURED_S = 1.0  # for each runtime
_NEIGHBOURS, _FEWEST = 10, 3


def check(name: str) -> None:
    """Raise ValueError for a runtime that does not exist, or that this machine has not the packages for."""
    if name not in NAMES:
        raise ValueError(f"--runtime must be one of {', '.join(NAMES)}; got {name!r}")
    if name.startswith("onnx"):
        onnx.require_packages(f"--runtime {name}")


class TorchRuntime:
    """An image tower on a device, by torch. Calling it encodes pictures, uint8 [n, S, S, 3] -> float32 [n, D]. With n = `block`
    always, a picture's features do not depend on the others'.

    dtype: of its arithmetic; for another than the model's it has a copy of the weights, and the model stays as it is.
    """

    def __init__(self, name: str, model: CLIP4Clip, device: torch.device, dtype: torch.dtype = torch.float32):
        self.name, self.device, self.block = name, device, _BLOCK.get(device.type, _BLOCK["cpu"])
        self._pixels, self._dtype, self._visual = model.pixels, dtype, model.clip.visual
        self._joins = bool(model.merging.joins)
        if dtype != torch.float32:
            self._visual = deepcopy(self._visual).to(dtype)
            match_statistics(self._visual)

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] -> float32 [n, D]."""
        return self._visual(self._pixels(pictures.to(self.device), self._dtype)).float()

    def clip(self, pictures: Tensor, mask: Tensor) -> Tensor:
        """uint8 [F, S, S, 3], bool [F] -> float32 [F, D]: a clip whose frames meet in the tower; those outside the mask are empty."""
        frames = self._pixels(pictures.to(self.device), self._dtype)
        if self._joins:
            return self._visual(frames[None], mask.to(self.device)[None]).float()
        frames = frames * mask.to(self.device)[:, None, None, None].to(self._dtype)
        return self._visual(frames[None]).float()


class OnnxRuntime(TorchRuntime):
    """The same by onnxruntime, on the CPU."""

    def __init__(self, name: str, model: CLIP4Clip, path: Path):
        super().__init__(name, model, torch.device("cpu"))
        if name == "onnx-int8":  # what is encoded together is rounded together, and would change each other's features
            self.block = 1
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] -> float32 [n, D]."""
        numbers = self._pixels(pictures.cpu(), torch.float32).contiguous().numpy()
        return torch.from_numpy(self._session.run(None, {"pictures": numbers})[0])


@dataclass(frozen=True)
class Measured:
    """How a runtime does on a block of random pictures: pictures a second, and the least cosine with torch's fp32, of features and
    of features without their mean."""

    name: str
    pictures_per_s: float
    cosine: float
    cosine_apart: float

    @property
    def agrees(self) -> bool:
        """Whether its features may stand for torch's."""
        return self.cosine >= AGREE and self.cosine_apart >= AGREE_APART


def start(
    name: str, model: CLIP4Clip, device: torch.device, digest: str, tell: Callable[[str], None] | None = None
) -> TorchRuntime:
    """The image tower of a model that is in fp32, in eval mode and on `device`.

    digest: of the model, by which graphs are kept. tell: what `auto` measured, a line at a time; None: to standard error.
    Raises ValueError for a runtime that does not suit the device or the model.
    """
    check(name)
    if name == "auto":
        name = _quickest(model, device, digest, tell or _to_stderr)
    if name.startswith("onnx"):
        if device.type != "cpu":
            raise ValueError(f"--runtime {name} runs on a CPU: add --device cpu, or choose torch-bf16")
        if model.linear_patch == "3d":
            raise ValueError(f"--runtime {name} has no patches that span three frames (linear_patch=3d): choose torch")
        if model.merging:
            raise ValueError(f"--runtime {name} cannot merge tokens (model.merge={model.merging.tokens}): choose torch")
        return OnnxRuntime(name, model, _graph(model, digest, int8=name == "onnx-int8"))
    return TorchRuntime(name, model, device, torch.bfloat16 if name == "torch-bf16" else torch.float32)


@torch.inference_mode()
def loss(model: CLIP4Clip, tower: TorchRuntime, pictures: Tensor) -> float:
    """What a runtime costs, on a sample of a user's own frames, uint8 [n, S, S, 3]: the share of each one's nearest 10 by torch's
    fp32 that are among its nearest 10 by `tower`. 1 is no loss.

    model: the one that `tower` was started with. Raises ValueError for a sample of fewer than 3 pictures.
    """
    if len(pictures) < _FEWEST:
        raise ValueError(f"{len(pictures)} pictures are too few to compare runtimes with: give {_FEWEST} or more")
    k = min(_NEIGHBOURS, len(pictures) - 2)  # of two others, any choice of one is a choice
    nearest = []
    for one in (TorchRuntime("torch", model, model.clip.logit_scale.device), tower):
        features = torch.cat([one(part).cpu() for part in pictures.split(one.block)])
        unit = torch.nn.functional.normalize(features, dim=-1)
        nearest.append((unit @ unit.T).fill_diagonal_(-2.0).topk(k).indices.tolist())
    shared = [len(set(a) & set(b)) for a, b in zip(*nearest, strict=True)]
    return sum(shared) / (k * len(shared))


@torch.inference_mode()
def _quickest(model: CLIP4Clip, device: torch.device, digest: str, tell: Callable[[str], None]) -> str:
    """Measure each runtime that is installed, tell, and return the quickest that agrees."""
    if model.frames_meet:
        return "torch"
    block = _pictures(_BLOCK.get(device.type, _BLOCK["cpu"]), model.image_size)
    exact = TorchRuntime("torch", model, device)
    reference = exact(block)
    rows = [_measure(exact, block, reference)]
    if device.type == "cpu" and not model.merging and all(map(find_spec, onnx.PACKAGES)):
        weights = sum(weight.numel() * weight.element_size() for weight in model.clip.visual.parameters())
        try:
            if weights > _LARGEST:
                raise ValueError("its graph would take minutes; --runtime onnx makes it")
            if not (_cache() / digest / _GRAPH).is_file():
                tell("writing the image tower's graph for onnxruntime, once for this model")
            rows.append(_measure(start("onnx", model, device, digest), block, reference))
        except (ValueError, OSError) as error:
            tell(f"onnx is left out: {error}")
    rows.append(_measure(TorchRuntime("torch-bf16", model, device, torch.bfloat16), block, reference))
    best = max((row for row in rows if row.agrees or row.name == "torch"), key=lambda row: row.pictures_per_s)
    tell("runtime      pictures/s   least cosine with torch, of features and of their differences")
    for row in rows:
        told = "   <- taken" if row is best else "" if row.agrees else "   not exact enough"
        tell(f"{row.name:12} {row.pictures_per_s:10.1f}   {row.cosine:.5f}  {row.cosine_apart:.5f}{told}")
    return best.name


def _pictures(number: int, side: int) -> Tensor:
    """Random pictures, uint8 [n, S, S, 3], of coarse and of fine patches of colour: noise of single pixels looks all the same."""
    draw = torch.Generator().manual_seed(0)
    coarse = (torch.rand(1, 3, 2 + i % 7, 2 + i % 5, generator=draw) for i in range(number))
    planes = [torch.nn.functional.interpolate(picture, (side, side), mode="bilinear") for picture in coarse]
    return (torch.cat(planes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _measure(tower: TorchRuntime, block: Tensor, reference: Tensor) -> Measured:
    features = tower(block).to(reference.device)  # the first call is slower
    cosine, apart = (
        float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())
        for a, b in ((features, reference), (features - features.mean(dim=0), reference - reference.mean(dim=0)))
    )
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _MEASURED_S or not count:
        tower(block).cpu()  # which waits for a GPU
        count += len(block)
    return Measured(tower.name, count / passed, cosine, apart)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _cache() -> Path:
    """Where graphs are kept, a folder each. Any of them may be deleted."""
    return user_cache() / "towers"


def _graph(model: CLIP4Clip, digest: str, int8: bool) -> Path:
    """The image tower's graph in the user's cache, made if it is not there yet. Raises ValueError, OSError."""
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    exact = _made(cache / digest, lambda file: onnx.write_image_tower(model, file))
    if not int8:
        return exact
    return _made(cache / f"{digest}-int8-7bit-{platform.machine()}", lambda file: onnx.round_to_int8(exact, file))


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    """FOLDER/tower.onnx, with a file of weights beside it where they are large; several processes may make it at once."""
    if not (folder / _GRAPH).is_file():
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            try:
                write(beside / _GRAPH)
            except RuntimeError as error:  # of torch's exporter
                reason = first_line(error)
                raise ValueError(f"the image tower cannot be written as ONNX ({reason})") from error
            os.rename(beside, folder)
        except OSError:
            if not (folder / _GRAPH).is_file():  # else another process was first
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder / _GRAPH

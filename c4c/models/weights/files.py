"""Files of tensors, whoever wrote them: safetensors, torch.save, TorchScript. Nothing in them is executed."""

import json
import pickle
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from c4c.models.weights import archives
from c4c.models.weights.base import Content

_READ = (
    "Read are run folders, .safetensors files, and what torch.save or TorchScript wrote, with weights of CLIP4Clip, "
    "mmaction2, OpenAI, open_clip or transformers; files that need code to be run are refused"
)


def load(path: Path) -> Content:
    """Raises ValueError if it is no file of tensors, or cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} is no file of weights. {_READ}")
    metadata: dict[str, str] = {}
    try:
        raw: object
        archive = archives.is_torchscript(path)
        if path.name.endswith(".safetensors.index.json"):
            raw = _pieces(path)
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                raw, metadata = load_file(path), file.metadata() or {}
        else:
            raw = archives.read_torchscript(path) if archive else _unpickled(path)
    except Exception as error:  # torch and safetensors raise many kinds for files that are not theirs
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ValueError(f"{path}: there is not enough memory for its weights") from error
        raise ValueError(f"{path} is no file of weights, or a damaged one. {_READ}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a dict of weights")
    return content(raw, path, metadata, archive)


def _pieces(index: Path) -> dict[str, Tensor]:
    """The tensors of a model that transformers wrote as several files."""
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError("it names files in other folders")
    return {key: tensor for name in names for key, tensor in load_file(index.with_name(name)).items()}


def content(raw: dict, path: Path, metadata: dict[str, str] | None = None, archive: bool = False) -> Content:
    """The tensors of a dict, which may hold them as its `state_dict`."""
    wrapped = isinstance(raw.get("state_dict"), dict)
    state: dict[str, Tensor] = {
        str(name): tensor
        for name, tensor in (raw["state_dict"] if wrapped else raw).items()
        if isinstance(tensor, Tensor)
    }
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return Content(path, state, metadata or {}, wrapped, archive)


def _unpickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than tensors, as mmengine's checkpoints do
        if not archives.is_archive(path):
            raise
        return archives.read_archive(path)

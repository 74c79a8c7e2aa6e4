"""Tensors out of files that torch.save or torch.jit.save wrote, without running anything that a file asks for.

Both are zip files: a pickle, data.pkl, beside the bytes of each tensor. The pickle is read with a few harmless functions;
an object of any other kind becomes a `StandIn`, which holds nothing and does nothing.
"""

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

_STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
}  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether it is a zip file, as torch writes them."""
    return zipfile.is_zipfile(path)


def is_torchscript(path: Path) -> bool:
    """Whether torch.jit.save wrote it."""
    if not is_archive(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> object:
    """What torch.save was given, with a `StandIn` for each object that is no tensor, container, number or text.

    Raises whatever a damaged file leads to.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("/data.pkl")
        return _Unpickler(archive, root).load()


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, by name, without TorchScript."""
    out: dict[str, Tensor] = {}

    def walk(module: "_Module", prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                out[prefix + name] = value
            elif isinstance(value, _Module):
                walk(value, f"{prefix}{name}.")

    root = read_archive(path)
    if not isinstance(root, _Module):
        raise ValueError("a TorchScript archive without a module")
    walk(root, "")
    return out


class StandIn:
    """Takes everything that a pickle does with a class, a function or an object, and keeps nothing of it."""

    def __new__(cls, *_args, **_named):
        """Accept any arguments."""
        return super().__new__(cls)

    def __init__(self, *_args, **_named):
        pass

    def __call__(self, *_args, **_named) -> "StandIn":
        """Return another one."""
        return StandIn()

    def __setstate__(self, _state) -> None:
        pass

    def __setitem__(self, _key, _value) -> None:
        pass

    def append(self, _item) -> None:
        """Drop the item."""


class _Module(StandIn):
    """Stands for any class of a TorchScript archive: only its attributes matter."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


class _Dict(dict):
    """Stands for collections.OrderedDict, which may also have attributes."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return _KNOWN.get((module, name), StandIn)

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, _, numel = pid
        data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("collections", "OrderedDict"): _Dict,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
}

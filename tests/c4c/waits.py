"""Operations that make a host wait for a GPU, counted as they are dispatched; also on fake and meta tensors."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# how many values they give, or what they give to the host, depends on what tensors hold
_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2", "unique_consecutive",
    "is_nonzero", "item",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_", "copy"}


class Waits(TorchDispatchMode):
    """`seen` has the name of each such operation inside; copies count where they cross devices and are not non_blocking."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self._made = _Made(self.seen)

    def __enter__(self):
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _READS or (name in _INDEXED and any(_is_mask(index) for index in args[1])):
            self.seen.append(name)
        elif name in _COPIES:
            to, source = (kwargs.get("device"), args[0]) if name == "_to_copy" else (args[0].device, args[1])
            waits = not (kwargs.get("non_blocking") or (name != "_to_copy" and len(args) > 2 and args[2]))
            if to is not None and torch.device(to).type != source.device.type and waits:
                self.seen.append(f"{name} {source.device.type} to {torch.device(to).type}")
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """What is made of values of the host: for the meta device that is no copy that would be dispatched."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type != "cpu":
            self._seen.append(f"{func.__name__} on {torch.device(device).type}")
        return func(*args, **(kwargs or {}))


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)

"""Memory for batches, used again once nobody holds what stood in it."""

import ctypes
import os
import sys
from functools import cache

import numpy as np
import torch

_ALIGNED = 64  # bytes; normalise.c writes past the caches where they begin at such a place

_MALLOPT = {-3: 32 << 20, -2: 64 << 20}  # M_MMAP_THRESHOLD, as large as glibc takes it, and M_TOP_PAD; malloc.h


class Buffers:
    """Tensors on `device`. On a CPU the last `keep` allocations are reused: fresh memory costs as much as filling it."""

    def __init__(self, device: torch.device, keep: int):
        self._device, self._keep = device, keep
        self._held: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with anything in it. Not safe to use from several threads."""
        if self._device.type != "cpu" or 0 in shape:
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = torch.empty(0, dtype=dtype).element_size() * int(np.prod(shape))
        held = self._free(size + _ALIGNED)
        start = -held.ctypes.data % _ALIGNED
        return torch.from_numpy(held[start : start + size]).view(dtype).view(shape)

    def _free(self, size: int) -> np.ndarray:
        # a tensor, and every view of it, holds a reference to the array its memory came from
        for i in range(len(self._held)):
            if len(self._held[i]) >= size and sys.getrefcount(self._held[i]) == _ONLY_OURS:
                return self._held[i]
        self._held = self._held[-self._keep + 1 :] if self._keep > 1 else []
        self._held.append(np.empty(size, np.uint8))
        return self._held[-1]


def _references_of_a_held_array() -> int:
    held = [np.empty(1)]
    return sys.getrefcount(held[0])


_ONLY_OURS = _references_of_a_held_array()


@cache
def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next to ask, up to 64 MiB in each of its arenas.

    DALI asks for every picture it decodes and for each run's frames anew, and what glibc gives back to the system in
    between comes back a page fault at a time (7 % of the decoding of 224-pixel JPEGs). Nothing is changed where the
    environment tunes malloc (MALLOC_TOP_PAD_ and so on), or without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Return to the system what malloc keeps, once nothing is decoded any more."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)

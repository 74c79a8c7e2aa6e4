"""How much memory a rank has used, and what to do if that is not enough."""

import os
import resource

import torch

from c4c.errors import is_out_of_memory
from shards import first_line

_FRAGMENTED_GIB = 2.0  # reserved by torch and not in use: enough to matter


def out_of_memory(error: BaseException, doing: str, remedies: str) -> str | None:
    """If that is what `error` is: what it was needed for, how much there is, and which keys to change."""
    if not is_out_of_memory(error):
        return None
    reason = first_line(error)
    if not torch.cuda.is_available():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return f"out of memory: {doing}; the machine has {total:.1f} GiB. Set {remedies} ({reason})"
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    reserved, most = torch.cuda.memory_reserved() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    unused = reserved - torch.cuda.memory_allocated() / 2**30
    memory = (
        f"the GPU has {total:.1f} GiB, of which the model has used {most:.1f} at most, decoders and other programs have "
        f"{max(0.0, total - free - reserved):.1f}, and {free:.1f} are free"
    )
    if (
        unused > _FRAGMENTED_GIB
        and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
        and "PYTORCH_ALLOC_CONF" not in os.environ
    ):
        memory += (
            f" ({unused:.1f} more in pieces: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may make them usable)"
        )
    return f"out of memory: {doing}; {memory}. Set {remedies} ({reason})"


def memory_gib() -> float:
    """The most this rank has used: of its GPU's memory, or of the host's where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""How much memory a rank has used, and what to do if that is not enough."""

import os
import resource

import torch


def out_of_memory(error: BaseException, doing: str, remedies: str) -> str | None:
    """If that is what `error` is: what it was needed for, how much there is, and which keys to change."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    if torch.cuda.is_available():
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} of {total:.1f} GiB were in use, {free:.1f} free"
    else:
        memory = f"the machine has {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return f"out of memory: {doing}; {memory}. Set {remedies} ({text.strip().partition(chr(10))[0][:200]})"


def memory_gib() -> float:
    """The most this rank has used: of its GPU's memory, or of the host's where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

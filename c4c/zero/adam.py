"""Which AdamW updates the weights on a GPU: DeepSpeed's fused one, which this machine has to compile, or torch's fused one.

Both compute the same to rounding and keep the same state under the same names, so a run may go on with the other. On a CPU, and
where the optimizer is offloaded to the host, it is always DeepSpeed's.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist

from c4c.settings import EngineConfig, TrainConfig
from c4c.zero import compiling
from c4c.zero.config import TORCH_ADAM, at, require_bias_correction

# what torch's own headers for CUDA include: the toolkit has them all, nvcc alone has only the first
HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cusparse.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h")


def use_torchs_adam(
    config: EngineConfig, train: TrainConfig, world: int, extra: dict, on_gpu: bool
) -> tuple[bool, str]:
    """(whether torch's AdamW is to update the weights, a line about it for the start of a run or '').

    extra: the yaml's `deepspeed:` block, whose optimizer.params.torch_adam decides where it is set. Every rank gets the same
    answer. Raises ValueError where torch's AdamW cannot do what `train` asks for.
    """
    asked = at(extra, TORCH_ADAM)
    lacks = ""
    if asked not in (None, True, False):
        raise ValueError(f"deepspeed.{TORCH_ADAM}={asked}: must be true or false")
    if asked is None and on_gpu and config.offload == "none" and not _compiled_before():
        lacks = _first(missing_to_compile(), world)
    if not (asked or lacks):
        return False, ""
    require_bias_correction(train, lacks)
    return True, f"optimizer: torch's fused AdamW; DeepSpeed's cannot be compiled here ({lacks})" if lacks else ""


def missing_to_compile() -> str:
    """What this machine lacks to compile DeepSpeed's fused Adam for its GPU; '' if it has everything.

    Where headers are missing beside nvcc and NVIDIA's Python packages have them, the compiler is shown those.
    """
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    nvcc = os.environ.get("PYTORCH_NVCC") or (str(Path(home) / "bin" / "nvcc") if home else "")
    if not nvcc or not shutil.which(nvcc):
        return "there is no nvcc" + (f" in {Path(nvcc).parent}" if nvcc else "")
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "there is no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "there are no headers of Python (Python.h)"
    absent = _absent(_header_folders(home))
    if absent:
        packages = [folder for folder in _package_folders() if any((folder / name).is_file() for name in absent)]
        if absent := _absent([*_header_folders(home), *packages]):
            return f"nvcc is there, but the CUDA headers {', '.join(absent)} are not"
        compiling.show_headers(packages)
    return ""


def _compiled_before() -> bool:
    """Whether DeepSpeed was installed with it (DS_BUILD_FUSED_ADAM=1)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("fused_adam"))


def _first(lacks: str, world: int) -> str:
    """What the first of the ranks that lacks something lacks: machines differ, and all ranks need the same optimizer."""
    if world == 1:
        return lacks
    all_ranks: list = [None] * world
    dist.all_gather_object(all_ranks, lacks)
    return next(
        (f"{text}, on the machine of rank {rank}" if rank else text for rank, text in enumerate(all_ranks) if text), ""
    )


def _absent(folders: list[Path]) -> list[str]:
    return [name for name in HEADERS if not any((folder / name).is_file() for folder in folders)]


def _header_folders(home: str | None) -> list[Path]:
    """Where a compiler that torch.utils.cpp_extension starts looks for CUDA's headers."""
    inside = [Path(home, "include"), *Path(home, "targets").glob("*/include")] if home else []
    named = [os.environ.get(name, "") for name in ("CUDA_INC_PATH", "CPATH", "CPLUS_INCLUDE_PATH")]
    listed = [Path(part) for value in named for part in value.split(os.pathsep) if part]
    return [*inside, *listed, Path("/usr/local/include"), Path("/usr/include")]


def _package_folders() -> list[Path]:
    """Headers that come with torch's own CUDA packages (nvidia/cu13/include, or a folder a library)."""
    return sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))

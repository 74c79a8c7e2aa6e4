"""How an error that ends a run is told. Nothing heavy is imported before one of torch's own kind is asked for."""

import signal
import sys
import time
from collections.abc import Callable

from c4c.launched import leave, missing_package, open_streams, own_rank

OTHERS_FIRST_S = 5.0  # an error of all ranks is told by rank 0; its launcher then ends the others before they repeat it


def speak(error: BaseException, rank: int) -> None:
    """Print an error that ends the run: rank 0 at once, another only if rank 0 had none and the launcher let it live."""
    lost = isinstance(error, RuntimeError)
    if rank or lost:
        time.sleep(OTHERS_FIRST_S)
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror  # without its number
    if lost:
        text = f"the connection to another rank broke ({text.strip().partition(chr(10))[0][:200]}): that rank ended first; see its error message"
    print(f"error{f' on rank {rank}' if rank else ''}: {text}", file=sys.stderr, flush=True)


class Stopped(KeyboardInterrupt):
    """A signal that ends the command. more: what a person should know of it, after the signal's name."""

    def __init__(self, by: signal.Signals, more: str = ""):
        super().__init__(by, more)
        self.by, self.more = by, more


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; returns its exit code. An error that a user can do something about is told in one line.

    Any other RuntimeError is a bug, and is raised.
    """
    open_streams()
    try:
        return command()
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        speak(error, own_rank())
        return 1
    except RuntimeError as error:
        if lost_peer(error):
            speak(error, own_rank())
        elif (explanation := device_failure(error)) is not None:
            speak(ValueError(explanation), own_rank())
        else:
            raise
        leave(1)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if own_rank() == 0:
            print(f"stopped by {stopped.by.name}{stopped.more}", file=sys.stderr, flush=True)
        return 128 + stopped.by


# What libraries say when another rank's process is gone: gloo's words, then NCCL's and those of torch around it.
_LOST = (
    "onnection closed by peer", "onnection closed by remote peer", "onnection reset by peer", "Broken pipe",
    "remote process exited", "ncclRemoteError", "ncclSystemError", "NCCL communicator was aborted",
    "NCCL communicator encountered error",
)  # fmt: skip
# What they say when memory ran out: torch's allocators, the CUDA runtime and driver, cuBLAS, cuDNN and NCCL.
_OUT_OF_MEMORY = (
    "can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "'out of memory'",
    "Failed to CUDA malloc", "Failed to CUDA calloc",
)  # fmt: skip
_NOTHING_SHARED = ("shared memory segment", "/dev/shm")
# Other failures of a GPU, and what to do about them; the first whose words are in the text counts.
_FAILURES = (
    (("Duplicate GPU detected",), "two ranks use the same GPU",
     "start as many ranks a machine as it has GPUs, and let CUDA_VISIBLE_DEVICES name each once"),
    (_NOTHING_SHARED, "NCCL found too little shared memory",
     "give the container more (docker run --ipc=host, or --shm-size=8g), or set NCCL_SHM_DISABLE=1"),
    (("no kernel image is available",), "this torch has no code for this GPU",
     "install a torch built for it (see README.md)"),
    (("driver version is insufficient", "driver on your system is too old"), "NVIDIA's driver is too old for this torch",
     "update the driver, or install a torch for an older CUDA"),
    (("uncorrectable ECC", "ECC error", "GPU is lost", "fallen off the bus", "NVLink error"), "the GPU itself failed",
     "look into dmesg for Xid, leave this GPU out, and continue with run.resume=auto"),
    (("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address",
      "illegal instruction", "launch timed out"), "a computation on the GPU failed",
     "continue with run.resume=auto; if it fails again at the same step, start it with CUDA_LAUNCH_BLOCKING=1, which names "
     "the operation"),
    (("CUBLAS_STATUS_NOT_INITIALIZED", "all CUDA-capable devices are busy", "device(s) is/are busy"),
     "the GPU could not be used", "see in nvidia-smi which other programs have its memory"),
    (("NCCL error", "ncclInvalidUsage", "ncclInternalError", "ncclUnhandledCudaError"), "NCCL failed",
     "start it with NCCL_DEBUG=WARN, which tells why"),
    (("CUDA error", "CUDA driver error"), "the GPU reported an error", "continue with run.resume=auto"),
)  # fmt: skip


def lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed because another rank's process is gone."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    text = str(error)
    if any(words in text for words in _NOTHING_SHARED) or is_out_of_memory(error):  # NCCL calls these system errors too
        return False
    return isinstance(error, dist.DistNetworkError) or any(phrase in text for phrase in _LOST)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a GPU did not suffice, whichever library says so."""
    import torch

    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def device_failure(error: RuntimeError) -> str | None:
    """What happened and what to do, in one sentence, if a GPU or what ranks exchange through failed; None for any other error."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    reason = lines[0][:200]
    if is_out_of_memory(error):
        return f"out of memory: use smaller batches, or a GPU with more of it ({reason})"
    text = " ".join(lines)
    for words, what, remedy in _FAILURES:
        if any(word in text for word in words):
            last = next((line for line in lines[1:] if line.startswith("Last error")), "")
            more = f"; {lines[lines.index(last) + 1][:200]}" if last and lines.index(last) + 1 < len(lines) else ""
            return f"{what}: {remedy} ({reason}{more})"
    return None

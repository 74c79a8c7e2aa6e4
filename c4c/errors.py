"""How an error that ends a run is told. Nothing heavy is imported before one of torch's own kind is asked for."""

import sys
import time

from c4c.launched import leave, own_rank

OTHERS_FIRST_S = 5.0  # what every rank has to say rank 0 says; its launcher then ends the others before they repeat it


def speak(error: BaseException, rank: int) -> None:
    """Print an error that ends the run: rank 0 at once, another only if rank 0 had none and the launcher let it live."""
    lost = isinstance(error, RuntimeError)
    if rank or lost:
        time.sleep(OTHERS_FIRST_S)
    text = str(error)
    if lost:
        text = f"the connection to another rank broke ({text.strip().partition(chr(10))[0][:200]}): that one ended first, and says why if it could"
    print(f"error{f' on rank {rank}' if rank else ''}: {text}", file=sys.stderr, flush=True)


def end_with(error: BaseException) -> int:
    """Tell an error that ends a command, and return its exit code. Raises it again if it is a bug and no mistake."""
    if isinstance(error, RuntimeError) and not lost_peer(error):
        raise error
    speak(error, own_rank())
    if isinstance(error, RuntimeError):
        leave(1)
    return 1


def lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed because another rank's process is gone."""
    import torch.distributed as dist

    said = (
        "onnection closed by peer",
        "onnection reset by peer",
        "Broken pipe",
        "remote process exited",
    )  # gloo's, NCCL's
    return isinstance(error, dist.DistNetworkError) or any(words in str(error) for words in said)

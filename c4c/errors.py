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
    if lost:
        text = f"the connection to another rank broke ({text.strip().partition(chr(10))[0][:200]}): that rank ended first; see its error message"
    print(f"error{f' on rank {rank}' if rank else ''}: {text}", file=sys.stderr, flush=True)


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
        if not lost_peer(error):
            raise
        speak(error, own_rank())
        leave(1)
    except KeyboardInterrupt:
        if own_rank() == 0:
            print("stopped by SIGINT", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed because another rank's process is gone."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    # gloo's words and NCCL's
    phrases = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, dist.DistNetworkError) or any(phrase in str(error) for phrase in phrases)

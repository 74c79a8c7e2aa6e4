"""Joining the ranks that a launcher started."""

import os
import re
import time
import uuid
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from c4c.launched import free_port, quick_imports
from c4c.zero import compiling, patches
from c4c.zero.adam import missing_to_compile
from pipelines.cores import cores


def start_distributed(timeout_s: float = 1800.0) -> tuple[int, int, torch.device]:
    """Join the process group of the launcher (deepspeed, torchrun, srun), or make one of a single rank.

    Returns rank, world, device. timeout_s: how long to wait for the other ranks. Raises ValueError.
    """
    patches.quiet_libraries()
    with quick_imports():
        import deepspeed
        from deepspeed.accelerator import get_accelerator

    compiling.prepare()
    _name_ranks(os.environ)
    if "SLURM_GPUS_PER_TASK" in os.environ and torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # each task is shown its own GPU alone
    local, on_gpu = int(os.environ["LOCAL_RANK"]), get_accelerator().device_name() == "cuda"  # DS_ACCELERATOR decides
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ['RANK']} is the {local + 1}th on a machine of {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(cores())
    backend = get_accelerator().communication_backend_name()
    patches.without_shared_memory()
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agents = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
        )
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.PrefixStore(common_word(agents, rank, world, timeout_s), agents)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def join_ranks(device: str | None, timeout_s: float = 1800.0) -> tuple[int, int, torch.device]:
    """Rank, world and device of a command that a launcher may have started. device: its --device, `cpu`, `cuda`, `cuda:N` or None.

    timeout_s: as in `start_distributed`. Raises ValueError."""
    if device and device.startswith("cuda"):
        index, gpus = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(f"--device {device}: this machine has {gpus} GPUs that torch can use")
    if launched() > 1:
        if device and ":" in device:
            raise ValueError(
                f"--device {device}: each of {launched()} ranks takes a GPU of its own; write --device cuda"
            )
        rank, world, own = start_distributed(timeout_s)
        return rank, world, torch.device("cpu") if device == "cpu" else own
    return 0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def common_word(store: dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """A word that the ranks of this start have in common, and no earlier start had.

    torchrun's agents keep one store for all restarts (torch 2.15), where ranks find the addresses of dead ones and wait for
    them for good; and agents count restarts differently. So the first rank offers a word, every other answers with one of
    its own, and believes the offer only when it gets that back. Raises ValueError after `timeout_s`.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        store.set("c4c/offer", own)
    left = set(range(1, world)) if rank == 0 else {rank}
    while left:
        if rank == 0:
            for other in [r for r in left if store.check([f"c4c/{own}/answer/{r}"])]:
                store.set(f"c4c/{own}/heard/{other}", store.get(f"c4c/{own}/answer/{other}").decode())
                left.discard(other)
        elif store.check(["c4c/offer"]):
            offer = store.get("c4c/offer").decode()
            store.set(f"c4c/{offer}/answer/{rank}", own)
            if store.check([heard := f"c4c/{offer}/heard/{rank}"]) and store.get(heard).decode() == own:
                return offer
        if time.monotonic() > until:
            raise ValueError(f"rank {rank} waited {timeout_s:g} s for rank {min(left) if rank == 0 else 0} to start")
        time.sleep(0.02)
    return own


def _name_ranks(env: MutableMapping[str, str]) -> None:
    """Fill in what torch.distributed reads from the environment: as srun tells it, else for a single rank.

    deepspeed and torchrun have set RANK and the rest themselves.
    """
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        # 4(x2),3 is two machines of 4 tasks and one of 3
        env["LOCAL_WORLD_SIZE"] = re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", env["WORLD_SIZE"]))[0]
        # below the ports that Linux hands out
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 12000))
        if int(env.get("SLURM_STEP_NUM_NODES", 1)) > 1 and "MASTER_ADDR" not in env:
            raise ValueError(
                "MASTER_ADDR is not set: ranks on several machines have to be told where the first one is. Before srun:  "
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
            )
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        env.setdefault(name, value)
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))  # deepspeed's name for it
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port())


def launched() -> int:
    """How many ranks a launcher has started; 1 without one."""
    tasks = "1" if "WORLD_SIZE" in os.environ else os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return max(int(os.environ.get("WORLD_SIZE", 1)), int(tasks))


def restarted(device: torch.device | str = "cpu") -> bool:
    """Whether torchrun (--max-restarts) or Slurm (--requeue) has started this run before, as any of the ranks was told:
    an agent of torchrun counts only the restarts that began with it."""
    counts = [int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    most = torch.tensor(max(counts), device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item() > 0


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def compile_ops() -> None:
    """Compile what DeepSpeed compiles at the first start on this machine: its fused Adam, where that is possible."""
    patches.quiet_libraries()
    from deepspeed.accelerator import get_accelerator

    compiling.prepare()
    if get_accelerator().device_name() == "cuda" and (lacks := missing_to_compile()):
        print(f"DeepSpeed's fused Adam cannot be compiled here ({lacks}): torch's fused AdamW will be used")
        return
    builder = get_accelerator().create_op_builder("FusedAdamBuilder")
    if builder is not None:
        builder.load(verbose=False)

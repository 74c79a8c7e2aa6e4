"""Starting the commands of launch/ as a user would, and reading what they leave behind."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from shards.demo import shapes
from shards.packing.pack import pack
from shards.video.profiles import Profile

ROOT = Path(__file__).parents[2]
MOST_RANKS = 4  # of any test
STEPS_PER_EPOCH = 5  # as many as a video has captions; batches of 40 of the 48 that fit, so that ranks get padding
SETTINGS = [
    "train.batch_size=48",
    "train.epochs=2",
    "data.num_frames=4",
    "data.eval_batch_size=8",  # 17 test videos: of two ranks the second has none left for the last batch
    "engine.precision=fp32",
]


def make_splits(folder: Path) -> None:
    """FOLDER/train and FOLDER/test, packed: 40 and 17 generated videos."""
    items = shapes.generate(folder / "source", seed=0, train=40, test=17, workers=2)
    for split in ("train", "test"):
        pack(items[split], folder / split, dataset="demo", split=split, profile=Profile(short_side=64), workers=2)


# what a process that has trained says of itself: a command that it starts is another one
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def own_environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in os.environ.items() if name not in OF_RANKS} | {"PYTHONPATH": path}


class Launcher:
    """Starts launch/train.py on the packed splits in `folder`.

    Runs of several numbers of ranks are compared with each other, so all compute on the same kind of `device`: on a GPU each
    where there are enough, else on the CPU.
    """

    def __init__(self, folder: Path):
        import torch

        self.folder = folder
        self.train, self.test = folder / "train", folder / "test"
        self.device = "cuda" if torch.cuda.device_count() >= MOST_RANKS else "cpu"
        self.env = {"DS_ACCELERATOR": "cpu"} if self.device == "cpu" else {}

    def command(self, ranks: int, *words: str) -> list[str]:
        """Training, with DeepSpeed's launcher."""
        return self.launch(ranks, "launch/train.py", *self.words(*words))

    def launch(self, ranks: int, script: str, *words: str) -> list[str]:
        """Any script, with DeepSpeed's launcher."""
        deepspeed = Path(sys.executable).parent / "deepspeed"
        ports = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
        return [str(deepspeed), *ports, script, *words]

    def without_deepspeed(self, *words: str) -> list[str]:
        """One rank, started by hand."""
        return [sys.executable, "launch/train.py", *self.words(*words)]

    def start(self, command: list[str], **env: str) -> subprocess.Popen:
        """In a process group of its own, so that a signal to us is none to it."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, env=own_environment() | self.env | env, **pipes
        )

    def finish(self, command: list[str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        process = self.start(command)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def words(self, *more: str) -> list[str]:
        """Arguments of launch/train.py."""
        data = [f"data.train={self.train}", f"data.test={self.test}"]
        exact = ["run.deterministic=true"] if self.device == "cuda" else []  # as the CPU is anyway
        return ["--cfg", "demo.yaml", *data, *SETTINGS, *exact, *more]


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, below a launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    training = [p for p in below if "launch/train.py" in p.cmdline() and not _launches(p)]
    return sorted(training, key=lambda p: p.pid)


def _launches(process: psutil.Process) -> bool:
    return any(word in ("deepspeed.launcher.launch", "torch.distributed.run") for word in process.cmdline())


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a command and to everything that it has started, at once."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone, timeout=30)


def wait_for_step(path: Path, step: int, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until a run's metrics.jsonl tells of step `step`. Raises RuntimeError with what the process said if it ends before."""
    until = time.monotonic() + seconds
    while step_in(path) < step:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {process.communicate()}")
        if time.monotonic() > until:
            raise RuntimeError(f"{path} did not get to step {step} in {seconds} s")
        time.sleep(0.005)


def step_in(path: Path) -> int:
    """The last step that a run's metrics.jsonl has a whole line of."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else 0


def lines(path: Path) -> list[dict]:
    """Of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run / "metrics.jsonl")]


def free_port() -> int:
    """Below those that the system hands out, or another process would have it before a launch gets to it."""
    while True:
        port = random.SystemRandom().randrange(20000, 29500)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port

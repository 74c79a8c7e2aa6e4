"""Starting the commands of launch/ as a user would, and reading what they leave behind."""

import json
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 5  # as many as a video has captions; batches of 40 of the 48 that fit, so that ranks get padding
SETTINGS = [
    "train.batch_size=48",
    "train.epochs=2",
    "data.num_frames=4",
    "data.eval_batch_size=8",  # 17 test videos: of two ranks the second has none left for the last batch
    "engine.precision=fp32",
]


class Launcher:
    """Starts launch/train.py on the packed splits in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.train, self.test = folder / "train", folder / "test"

    def command(self, ranks: int, *words: str) -> list[str]:
        """With DeepSpeed's launcher."""
        deepspeed = Path(sys.executable).parent / "deepspeed"
        ports = ["--num_accelerators", str(ranks), "--master_port", str(_free_port())]
        return [str(deepspeed), *ports, "launch/train.py", *self.words(*words)]

    def without_deepspeed(self, *words: str) -> list[str]:
        """One rank, started by hand."""
        return [sys.executable, "launch/train.py", *self.words(*words)]

    def start(self, command: list[str]) -> subprocess.Popen:
        """In a process group of its own, which can be killed as a whole."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)

    def finish(self, command: list[str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        process = self.start(command)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def words(self, *more: str) -> list[str]:
        """Arguments of launch/train.py."""
        data = [f"data.train={self.train}", f"data.test={self.test}"]
        return ["--cfg", "demo.yaml", *data, *SETTINGS, *more]


def lines(path: Path) -> list[dict]:
    """Of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run / "metrics.jsonl")]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

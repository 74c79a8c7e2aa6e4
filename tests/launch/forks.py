"""Scripts in forks of a process that has imported everything: starting one costs no imports, which are most of a short run.

    python tests/launch/forks.py SOCKET MODULE ...      # the process that is forked; `Forks` starts it

What launchers do is tested with launchers; what ranks compute is tested with forks, which find in their environment what
DeepSpeed's launcher would say to them. A process that has asked for a GPU cannot be forked: where there is one, each rank is
started afresh.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from c4c.launched import leave  # noqa: E402
from tests.launch.runs import free_port, own_environment  # noqa: E402

PRELOADED = [
    "torch", "torch._dynamo", "deepspeed", "open_clip", "nvidia.dali", "torch.utils.tensorboard", "c4c.training.trainer", "c4c.retrieval.evaluate",
]  # fmt: skip


class Forks:
    """Starts scripts; `close` ends them all."""

    def __init__(self, **env: str):
        import torch

        self._env, self._process = env, None
        if torch.cuda.is_available():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._socket = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._socket, *PRELOADED], cwd=ROOT, env=own_environment() | env,
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if "ready\n" not in iter(self._process.stdout.readline, ""):  # after what libraries print
            raise RuntimeError(f"the process to be forked ended with {self._process.wait()}")

    def start(self, words: list[str], ranks: int = 0, **env: str) -> "Forked | Afresh":
        """A script and its arguments, in so many ranks; 0: in one that no launcher has started."""
        envs = [env | more for more in _environments(ranks)]
        return Forked(self._socket, words, envs) if self._process else Afresh(words, [self._env | e for e in envs])

    def run(self, words: list[str], ranks: int = 0, **env: str) -> tuple[int, str, str]:
        return self.start(words, ranks, **env).finish()

    def close(self) -> None:
        if self._process:
            self._process.stdin.close()  # on which it ends, and its forks with it
            self._process.wait()
            self._folder.cleanup()


def _environments(ranks: int) -> list[dict[str, str]]:
    """What DeepSpeed's launcher puts into the environment of each rank."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    meet |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return [meet | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)] or [{}]


class Forked:
    """A script that has been started, in forks."""

    def __init__(self, address: str, words: list[str], envs: list[dict]):
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        self._file = self._connection.makefile("rw")
        print(json.dumps({"words": words, "envs": envs}), file=self._file, flush=True)
        self.pids: list[int] = json.loads(self._file.readline())

    def finish(self) -> tuple[int, str, str]:
        """(exit code, minus a signal's number, of the first rank that did not end with 0, stdout, stderr)."""
        with self._connection, self._file:
            code, out, err = json.loads(self._file.readline())
        return code, out, err


class Afresh:
    """The same in processes of their own."""

    def __init__(self, words: list[str], envs: list[dict]):
        self._out, self._err = _streams()
        self._processes = [
            subprocess.Popen([sys.executable, *_words(words, env)], cwd=ROOT, env=own_environment() | env,
                             stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, start_new_session=True)
            for env in envs
        ]  # fmt: skip
        self.pids = [process.pid for process in self._processes]

    def finish(self) -> tuple[int, str, str]:
        codes = [process.wait() for process in self._processes]
        return _ended(codes, self._out, self._err)


def _words(words: list[str], env: dict[str, str]) -> list[str]:
    """With the argument that DeepSpeed's launcher adds."""
    return [*words[:1], *([f"--local_rank={env['LOCAL_RANK']}"] if "LOCAL_RANK" in env else []), *words[1:]]


def _streams() -> tuple[TextIO, TextIO]:
    return tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")


def _ended(codes: list[int], out: TextIO, err: TextIO) -> tuple[int, str, str]:
    with out, err:
        out.seek(0)
        err.seek(0)
        return next((code for code in codes if code), 0), out.read(), err.read()


# ---- the process that is forked ----


def serve(address: str, modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported here need not be looked through at every collection in a fork; DeepSpeed asks for many
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with connection, connection.makefile("rw") as file:
                _answer(file)
            os._exit(0)
        connection.close()


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock a fork would find taken
    os.killpg(0, signal.SIGKILL)


def _answer(file) -> None:
    request = json.loads(file.readline())
    (out, err), pids = _streams(), []
    for env in request["envs"]:
        if (pid := os.fork()) == 0:
            _run(request["words"], env, out.fileno(), err.fileno())
        pids.append(pid)
    print(json.dumps(pids), file=file, flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(_ended(codes, out, err)), file=file, flush=True)


def _run(words: list[str], env: dict[str, str], out: int, err: int) -> None:
    code: object = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(env)
        sys.argv = _words(words, env)
        sys.path[0] = str((ROOT / words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    leave(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])

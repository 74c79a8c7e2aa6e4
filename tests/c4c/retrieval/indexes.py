"""Running `python -m c4c.index` in forks of a process that has imported what it needs, and what is in an index afterwards."""

import multiprocessing
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from c4c import index as command
from c4c.retrieval.index.store import Store
from tests.launch.runs import OF_RANKS, free_port

# lancedb itself is left out: its threads do not live on in a fork; the most of importing it is lance_namespace
PRELOADED = [
    "torch", "open_clip", "deepspeed", "av", "PIL.Image", "pyarrow.dataset", "pyarrow.compute", "lance_namespace", "rich.progress",
    "c4c.retrieval.index.command", "tests.c4c.retrieval.indexes",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Running:
    """The command, started in one process or in ranks. What it prints is in `out` once `finish` was called."""

    def __init__(self, words: list[str], ranks: int = 0, **env: str):
        self._folder = tempfile.mkdtemp(prefix="index-")
        envs = [{"DS_ACCELERATOR": "cpu"} | env]
        if ranks:
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            envs = [
                envs[0] | meet | {"RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(ranks)}
                for i in range(ranks)
            ]
        self.processes = [
            _context.Process(target=_run, args=(list(map(str, words)), one, f"{self._folder}/{i}"))
            for i, one in enumerate(envs)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.finish()

    def finish(self) -> tuple[int, str]:
        """(exit code, minus a signal's number, of the first that did not end with 0; what all printed)"""
        for process in self.processes:
            process.join()
        text = "".join(path.read_text() for path in sorted(Path(self._folder).iterdir()))
        shutil.rmtree(self._folder)
        return next((p.exitcode for p in self.processes if p.exitcode), 0), text


def _run(words: list[str], env: dict[str, str], out: str) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in OF_RANKS:
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.argv = ["index", *words]
    code = 1
    try:
        code = command.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run(*words, ranks: int = 0, **env: str) -> tuple[int, str]:
    """(exit code, what it printed)"""
    return Running(list(words), ranks, **env).finish()


def contents(uri) -> list[dict]:
    """All rows of an index but for `written`, sorted; superseded ones too, so that none is overlooked."""
    table = Store.open(uri)._segments.to_arrow().drop_columns(["written"])
    return sorted(table.to_pylist(), key=lambda row: row["id"])

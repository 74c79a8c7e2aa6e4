"""A search server as a process of its own, with the stand-in for the model."""

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.launch.runs import ROOT, own_environment


class ServerProcess:
    """A server with the stand-in for the model, at a port of its own."""

    def __init__(self, index: Path, *words: str, stderr: int | None = None):
        command = [sys.executable, "tests/c4c/retrieval/stand_in_server.py", str(index), *words]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 and no pipe, which nobody would read while it fills
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=own_environment(),
            stdout=subprocess.PIPE,
            stderr=self._log if stderr is None else stderr,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self.line)
        assert found, self.line + self._written()
        self.port = int(found[1])
        self.get("/healthz")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """A test that failed leaves it running."""
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def _written(self) -> str:
        self.process.wait(30)
        self._log.seek(0)
        return self._log.read()

    def get(self, address: str, timeout: float = 30, **headers) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("GET", address, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str, float]:
        """(exit code, stdout, stderr, seconds)"""
        began = time.monotonic()
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out, self._written(), time.monotonic() - began

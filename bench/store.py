"""An object store that is slow and fails at times: an S3 server (moto) behind a proxy, each a process of its own.

    python bench/store.py server PORT
    python bench/store.py proxy SERVER_PORT PORT LATENCY FAILURES      # GET /.counts says how many requests, how many failed

Only bench/remote.py starts them. They listen on this machine alone.
"""

import asyncio
import contextlib
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOST = "127.0.0.1"


class Store:
    """The two processes. `latency` in seconds; `failures` is a share of the requests, half of which get status 503, while on
    half the server hangs up."""

    def __init__(self, packed: Path, latency: float, failures: float):
        self._packed, self._how = packed, (str(latency), str(failures))
        self._server, self._proxy = free_port(), free_port()
        self.requests = self.failed = 0
        self.away, self.seconds_away = False, 0.0
        self._processes: list[subprocess.Popen] = []

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._proxy}"

    def start(self) -> None:
        self._run("server", str(self._server))
        wait_for(self._server)
        fill(self._packed, f"http://{HOST}:{self._server}")
        self._run("proxy", str(self._server), str(self._proxy), *self._how)
        wait_for(self._proxy)

    def _run(self, *words: str) -> None:
        self._processes.append(subprocess.Popen([sys.executable, __file__, *words]))

    def stop(self) -> None:
        """Kill both, as a machine that goes down would."""
        self.count()
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def count(self) -> None:
        """Add up what the proxy has counted since it was last asked."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/.counts") as answer:
            requests, failed = json.load(answer)
            self.requests, self.failed = self.requests + requests, self.failed + failed

    def restart(self) -> None:
        began, self.away = time.perf_counter(), True
        self.stop()
        self.start()
        self.seconds_away = time.perf_counter() - began
        time.sleep(2)  # until everybody has found it again
        self.away = False


def fill(packed: Path, endpoint: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    files = [p for p in packed.iterdir() if p.suffix in (".tar", ".parquet", ".json", ".npy")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: client.put_object(Bucket="bucket", Key=f"set/{p.name}", Body=p.read_bytes()), files))


def serve(port: int) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(HOST, port, verbose=False).start()
    threading.Event().wait()


async def relay(server: int, port: int, latency: float, failures: float) -> None:
    from aiohttp import ClientSession, web

    draw, counts = random.Random(0), [0, 0]

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/.counts":
            told, counts[:] = list(counts), (0, 0)
            return web.json_response(told)
        counts[0] += 1
        await asyncio.sleep(latency)
        if draw.random() < failures:
            counts[1] += 1
            if draw.random() < 0.5:
                return web.Response(
                    status=503, text="<Error><Code>SlowDown</Code></Error>", content_type="application/xml"
                )
            request.transport.abort()
            return web.Response()
        kept = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        target = f"http://{HOST}:{server}{request.rel_url}"
        async with session.request(request.method, target, headers=kept, data=await request.read()) as found:
            body = await found.read()
            headers = {k: v for k, v in found.headers.items() if k.lower() in ("content-type", "etag", "content-range")}
            if request.method == "HEAD":
                headers["Content-Length"] = found.headers.get("Content-Length", "0")
            return web.Response(status=found.status, body=body, headers=headers)

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    async with ClientSession(auto_decompress=False) as session:
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        await asyncio.Event().wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_for(port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    if kind == "server":
        serve(int(numbers[0]))
    else:
        asyncio.run(relay(int(numbers[0]), int(numbers[1]), float(numbers[2]), float(numbers[3])))

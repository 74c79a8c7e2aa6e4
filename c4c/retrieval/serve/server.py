"""Runs the server: opens the index, answers until a signal comes, and then ends within a second."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from c4c.retrieval.serve import log
from c4c.retrieval.serve.app import make_app
from c4c.retrieval.serve.engine import Engine
from c4c.retrieval.serve.monitor import Monitor
from c4c.retrieval.serve.options import ServeOptions

_MOST_CONNECTIONS = 1000
_LONGEST_HEAD = 256 << 10  # bytes: a sentence of 10 000 characters may take 12 each in an address
_HEAD_LIMIT_S = 15  # for the first line and headers of a request
_DRAIN_LIMIT_S = 10  # for what a client goes on sending after it was answered
_END_S = 0.6  # for answers that are under way when a signal comes
_FILES = 4096  # open at once


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, with an end to patience: it waits for headers and for the rest of a refused body for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._wait(_HEAD_LIMIT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None and not self.transport.is_closing():
            self._wait(_HEAD_LIMIT_S)  # the beginning of the next request

    def on_response_complete(self) -> None:
        """It was answered."""
        super().on_response_complete()
        self._stop_waiting()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._wait(_DRAIN_LIMIT_S)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """uvicorn's server, which ends quietly."""

    @contextlib.contextmanager
    def capture_signals(self):
        """SIGINT and SIGTERM end the server; the process goes on to delete its temporary files."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = self.force_exit = True  # force_exit: open connections are not waited for


def serve(searcher: Any, options: ServeOptions, listener: socket.socket) -> None:
    """Answer requests at `listener` until SIGINT or SIGTERM."""
    _allow_files()
    searcher.encode(["a moment"])  # loads the text tower, so that the first sentence is answered as quickly as others
    host, port = options.host.strip("[]"), listener.getsockname()[1]
    with contextlib.suppress(KeyboardInterrupt), log.in_background():
        asyncio.run(_serve(searcher, options, listener, f"[{host}]" if ":" in host else host, port))


async def _serve(searcher: Any, options: ServeOptions, listener: socket.socket, host: str, port: int) -> None:
    asyncio.get_running_loop().set_exception_handler(_lost)
    monitor = Monitor()
    engine = Engine(searcher, monitor, options.max_upload_mb * 1_000_000, options.checkpoint)
    # what uvicorn warns of is no news to whoever runs the server: requests that are none, clients that go away
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        await engine.start()
        app = make_app(engine, options, monitor)
        config = uvicorn.Config(
            app, http=PatientProtocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            limit_concurrency=_MOST_CONNECTIONS, h11_max_incomplete_event_size=_LONGEST_HEAD, timeout_keep_alive=15,
        )  # fmt: skip
        _say(options, host, port, len(searcher.store), searcher.store.n_videos)
        server = _Server(config)
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        while not answering.done() and not server.should_exit:
            await asyncio.wait([answering], timeout=0.1)
        await asyncio.wait([answering], timeout=_END_S)
    finally:
        await engine.close()


def _lost(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error that nobody waits for. asyncio would tell each anew."""
    log.report(context.get("exception") or RuntimeError(context["message"]), with_trace=True)


def _say(options: ServeOptions, host: str, port: int, segments: int, videos: int) -> None:
    if host in ("0.0.0.0", "[::]"):
        host = socket.gethostname()  # what others may call this machine
    address = f"http://{host}:{port}{'/' if not options.token else f'/?token={options.token}'}"
    print(f"{options.index}: {segments} segments of {videos} videos. Open {address} (Ctrl-C ends it)", flush=True)


def _allow_files() -> None:
    """A connection takes an open file, and many systems allow 1024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""The search server's application, running in this process."""

import io
import re
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
from starlette.testclient import TestClient

from c4c.retrieval.serve.app import make_app
from c4c.retrieval.serve.engine import Engine
from c4c.retrieval.serve.monitor import Monitor
from c4c.retrieval.serve.options import ServeOptions
from tests.c4c.retrieval import stand_in

LIMIT_MB = 1


def _without_lifespan(app):
    """uvicorn is told that there is none; starlette's client asks for it."""

    async def call(scope, receive, send):
        if scope["type"] == "lifespan":
            for answer in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": answer})
        else:
            await app(scope, receive, send)

    return call


class Served:
    """A running application, and what it runs on."""

    def __init__(self, index: Path, searcher=None, **options):
        self.index, self.monitor = index, Monitor()
        self.searcher = searcher or stand_in.StandIn(index)
        words = {"index": str(index), "max_upload_mb": LIMIT_MB} | options
        self.options = ServeOptions(**words)
        self.engine = Engine(
            self.searcher, self.monitor, self.options.max_upload_mb * 1_000_000, self.options.checkpoint
        )
        self.app = make_app(self.engine, self.options, self.monitor)
        self.client = TestClient(_without_lifespan(self.app), base_url="http://127.0.0.1:8000", follow_redirects=False)

    def __enter__(self):
        self.client.__enter__()
        return self

    def __exit__(self, *error):
        self.client.portal.call(self.engine.close)
        self.client.__exit__(*error)

    def get(self, address: str, **words):
        return self.client.get(address, **words)

    def raw(self, path: str) -> int:
        """The status of a GET of exactly this path, which clients would tidy up."""
        sent, scope = [], {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
                           "headers": [(b"host", b"localhost")], "scheme": "http", "server": ("localhost", 80),
                           "client": ("127.0.0.1", 1), "root_path": "", "http_version": "1.1", "state": {}, "asgi": {"version": "3.0"}}  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        self.client.portal.call(self.app, scope, receive, send)
        assert not any(b"root:" in message.get("body", b"") for message in sent)
        return sent[0]["status"]

    def results(self, query: str, **words) -> list[dict]:
        answer = self.get("/api/search", params={"q": query, **words})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"]

    def named(self, video: str) -> dict:
        """A result of that video."""
        return next(result for result in self.results("red", k=100) if result["video"] == video)

    def upload(self, data: bytes, name="x", **params):
        return self.client.post("/api/search/example", files={"file": (name, data)}, params=params)


def detail(answer) -> str:
    """The one sentence of a refusal."""
    text = answer.json()["detail"]
    assert re.fullmatch(r"[A-Z][^\n]*[.)?A-Z]", text), text
    return text


def played(data: bytes) -> list[tuple[float, np.ndarray]]:
    """(seconds, RGB) of the frames of an mp4, whose index must come first."""
    assert data.find(b"moov") < data.find(b"mdat")
    with av.open(io.BytesIO(data)) as file:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def colour(picture: np.ndarray) -> str:
    middle = np.median(picture.reshape(-1, 3), axis=0)
    return min(stand_in.COLOURS, key=lambda name: np.abs(np.array(stand_in.COLOURS[name]) - middle).sum())

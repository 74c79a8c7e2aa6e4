"""The routes of the server."""

import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from c4c import __version__
from c4c.retrieval.index.filters import Choice
from c4c.retrieval.serve.engine import LONGEST_QUERY, MOST_RESULTS, Engine
from c4c.retrieval.serve.guard import Guard, Refusal
from c4c.retrieval.serve.monitor import Monitor
from c4c.retrieval.serve.options import ServeOptions

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml", "docs.js": "text/javascript; charset=utf-8",
} | {f"{name}.js": "text/javascript; charset=utf-8" for name in ("app", "api", "cards", "dom", "player", "upload")}  # fmt: skip

Name = Annotated[str, Field(description="an `id` or `video_id` of a result")]
Seconds = Annotated[float | None, Field(ge=0, le=1e9, allow_inf_nan=False, description="of the whole video, seconds")]


class Filters(BaseModel):
    """What every search takes. A parameter of another name is an error: a misspelt one would be ignored."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(24, ge=1, le=MOST_RESULTS, description="how many results at most")
    path: str | None = Field(None, max_length=300, description="a pattern for names of videos, as in `cats/*.mp4`")
    min_duration: Seconds = None
    max_duration: Seconds = None
    per_video: bool = Field(
        True, description="the best segment of each video alone; else several, which do not overlap"
    )

    def choice(self) -> Choice:
        """The videos that are searched. Raises Refusal for a choice that cannot be."""
        try:
            return Choice(
                path=self.path or None,
                min_duration=self.min_duration,
                max_duration=self.max_duration,
                per_video=self.per_video,
            )
        except ValueError as error:
            raise Refusal(422, f"{str(error)[0].upper()}{str(error)[1:]}.") from error


class Question(Filters):
    """A search by a sentence."""

    q: str = Field(description="a sentence")


class ShownSegment(BaseModel):
    """A segment of a video. Times are seconds."""

    id: str
    video_id: str
    video: str
    start: float
    end: float
    duration: float


class Match(ShownSegment):
    """A segment that was found. `score` orders the results of one search."""

    score: float
    thumbnail: str
    media: str


class Matches(BaseModel):
    """What was found, best first. `note` says what may be wrong with the query or the filters, else it is empty."""

    query: str
    note: str = ""
    results: list[Match]
    more: bool = Field(description="whether a larger k may give more results")
    seconds: float


class SegmentTimes(BaseModel):
    """A segment of a video, seconds."""

    id: str
    start: float
    end: float


class Segments(BaseModel):
    """A video and its segments in order."""

    video: str
    duration: float
    segments: list[SegmentTimes]


class Playable(ShownSegment):
    """How to play a segment: `url` is the file itself or a clip of it, whose second 0 is second `offset` of the video, and which ends
    at second `until`."""

    kind: str
    type: str
    url: str
    offset: float
    until: float


class Info(BaseModel):
    """What is served."""

    version: str
    segments: int
    videos: int
    max_upload_bytes: int
    longest_query: int


class RefusalBody(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


def make_app(engine: Engine, options: ServeOptions, monitor: Monitor) -> Guard:
    """The application: its routes, and the guard around them."""
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": RefusalBody} for status in (400, 401, 403, 404, 422, 503)
    }
    app = FastAPI(
        title="c4c search", version=__version__, docs_url=None, redoc_url=None, responses=problems,
        description="Search an index of videos by a sentence, a clip or a picture.",
    )  # fmt: skip
    app.router.redirect_slashes = False
    _add_searches(app, engine, options)
    _add_videos(app, engine)
    _add_health(app, engine, monitor)
    _add_page(app)
    _add_errors(app)
    return Guard(app, options, monitor, (PAGE / "token.html").read_bytes())


def _add_searches(app: FastAPI, engine: Engine, options: ServeOptions) -> None:
    @app.get("/api/info", tags=["search"])
    async def info() -> Info:
        """What is served."""
        segments, videos = await engine.counts()
        return Info(
            version=__version__, segments=segments, videos=videos, max_upload_bytes=options.max_upload_mb * 1_000_000,
            longest_query=LONGEST_QUERY,
        )  # fmt: skip

    @app.get("/api/search", tags=["search"])
    async def search(asked: Annotated[Question, Query()]) -> Matches:
        """The segments that a sentence describes best."""
        began = time.perf_counter()
        sentence, note, found = await engine.search(asked.q, asked.k, asked.choice())
        return _matches(sentence, note, found, asked.k, began)

    @app.get("/api/similar/{id}", tags=["search"])
    async def similar(id: Name, asked: Annotated[Filters, Query()]) -> Matches:
        """The segments most like a segment of the index."""
        began = time.perf_counter()
        name, note, found = await engine.similar(id, asked.k, asked.choice())
        return _matches(name, note, found, asked.k, began)

    form = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}

    @app.post(
        "/api/search/example",
        tags=["search"],
        openapi_extra=body,
        responses={413: {"model": RefusalBody}, 415: {"model": RefusalBody}},
    )
    async def example(request: Request, asked: Annotated[Filters, Query()]) -> Matches:
        """The segments most like a clip or a picture, which is sent as the field `file` of a form."""
        began = time.perf_counter()
        note, found = await engine.by_example(request, asked.k, asked.choice())
        return _matches("", note, found, asked.k, began)


def _matches(query: str, note: str, found: list, k: int, began: float) -> Matches:
    rows = [Match(**engine_row) for engine_row in found]
    more = len(rows) == k < MOST_RESULTS
    return Matches(query=query, note=note, results=rows, more=more, seconds=round(time.perf_counter() - began, 4))


def _add_videos(app: FastAPI, engine: Engine) -> None:
    @app.get("/api/segments/{video_id}", tags=["videos"])
    async def segments(video_id: Name) -> Segments:
        """All segments of a video."""
        return Segments(**await engine.segments(video_id))

    @app.get("/api/play/{id}", tags=["videos"], responses={410: {"model": RefusalBody}, 415: {"model": RefusalBody}})
    async def play(id: Name, clip: bool = False) -> Playable:
        """How to play a segment. `clip`: in a form that every browser plays, whatever the file is."""
        return Playable(**await engine.media.play(id, clip))

    @app.get("/media/{id}", tags=["videos"], response_class=Response)
    @app.head("/media/{id}", include_in_schema=False)
    async def media(id: Name, clip: bool = False) -> Response:
        """The video of a segment, or with `clip` that part of it. Answers to Range, If-Range, If-None-Match and HEAD."""
        return await engine.media.response(id, clip)

    @app.get("/thumbnail/{id}", tags=["videos"], response_class=Response)
    @app.head("/thumbnail/{id}", include_in_schema=False)
    async def thumbnail(id: Name) -> Response:
        """A picture of a segment, JPEG."""
        picture = await engine.thumbnail(id)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


def _add_health(app: FastAPI, engine: Engine, monitor: Monitor) -> None:
    @app.head("/healthz", include_in_schema=False, response_class=PlainTextResponse)
    @app.get("/healthz", tags=["operation"], response_class=PlainTextResponse)
    async def healthz() -> str:
        """Whether the server lives."""
        return "ok\n"

    @app.head("/readyz", include_in_schema=False, response_class=PlainTextResponse)
    @app.get("/readyz", tags=["operation"], response_class=PlainTextResponse)
    async def readyz() -> str:
        """Whether the index can be read; 503 if not."""
        await engine.counts()
        return "ready\n"

    @app.head("/metrics", include_in_schema=False, response_class=PlainTextResponse)
    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(monitor.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> FileResponse:
        return _file("index.html", "text/html; charset=utf-8")

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> FileResponse:
        return _file("docs.html", "text/html; charset=utf-8")

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(name: str) -> FileResponse:
        if name not in _PAGE_FILES:
            raise Refusal(404, "There is no such page.")
        return _file(name, _PAGE_FILES[name])


def _file(name: str, media_type: str) -> FileResponse:
    return FileResponse(PAGE / name, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"detail": refusal.sentence}, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "There is no such page.", 405: "This address does not take such a request."}
        return JSONResponse(
            {"detail": words.get(error.status_code, str(error.detail))}, error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = first["loc"][-1] if first.get("loc") else "request"
        if first["type"] == "extra_forbidden":
            return JSONResponse(
                {"detail": f"There is no parameter {str(place)[:40]!r}. The page /docs lists them."}, 422
            )
        return JSONResponse({"detail": f"{place}: {str(first.get('msg', 'is wrong')).lower()}."}, 422)

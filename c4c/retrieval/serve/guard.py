"""What every request passes before a route sees it: counting, the host's name, the token, the origin; and headers of answers."""

import hashlib
import hmac
import json
import time
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from c4c.retrieval.serve import log
from c4c.retrieval.serve.monitor import Monitor
from c4c.retrieval.serve.options import ServeOptions, is_loopback

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
# without a token: nothing of the index is in them
OPEN_ROUTES = ("/healthz", "/readyz", "/page/style.css", "/page/icon.svg")

_LONGEST_HEADERS = 32 << 10  # bytes
_LONGEST_ADDRESS = 192 << 10  # bytes: a sentence of 10 000 characters may take 12 each


class Refusal(Exception):
    """A request that is not answered as it wished, with the status and one sentence for the user."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


def unreadable_index(error: Exception) -> Refusal:
    """What to raise where the index cannot be read. The error's words may name files: they go to the log alone."""
    log.report(error)
    return Refusal(503, "The index cannot be read now. The server's log says why.")


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, options: ServeOptions, monitor: Monitor, token_page: bytes):
        self._app, self._options, self._monitor, self._token_page = app, options, monitor, token_page
        self._cookie = f"c4c_{options.port}"
        self._ticket = hashlib.sha256(f"c4c cookie {options.token}".encode()).hexdigest()  # never the token itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        scope["root_path"] = self._options.root_path
        answer = _Answer(send, scope, self._monitor)
        with self._monitor.in_flight() as began:
            answer.began = began
            try:
                if (reply := self._check(scope)) is not None:
                    await answer.reply(*reply)
                else:
                    await self._app(scope, receive, answer.send)
            except (ClientDisconnect, ConnectionError, TimeoutError):
                if not answer.started:  # else whoever asked is gone, or takes nothing
                    await answer.sentence(Refusal(503, "This took too long. Try again."))
            except Refusal as refusal:
                if not answer.started:
                    await answer.sentence(refusal)
            except Exception as error:
                log.report(error, with_trace=True)
                if answer.started:
                    raise
                await answer.sentence(Refusal(500, "The server failed at this request. Its log says how."))

    def _check(self, scope: Scope) -> tuple[int, dict[str, str], bytes] | None:
        """The answer to a request that goes no further; None: it may go on. Raises Refusal likewise."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _LONGEST_HEADERS:
            raise Refusal(431, "The headers of this request are too long.")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _LONGEST_ADDRESS:
            raise Refusal(414, "The address of this request is too long.")
        headers, path = Headers(scope=scope), scope["path"].removeprefix(self._options.root_path)
        if not self._options.token and not is_loopback(_host_name(headers.get("host", ""))):
            # a page elsewhere whose name was made to mean 127.0.0.1 (DNS rebinding) calls the server by that name
            raise Refusal(
                421, "This server answers to localhost and 127.0.0.1 only. Start it with --token to use another name."
            )
        self._check_origin(scope, headers)
        if not self._options.token or path in OPEN_ROUTES:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and scope["method"] in ("GET", "HEAD"):
            if not _same(given, self._options.token):
                return self._ask_for_token("This token is not the server's.")
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            secure = "; Secure" if scope["scheme"] == "https" else ""
            cookie = f"{self._cookie}={self._ticket}; Path={self._options.root_path or '/'}; HttpOnly; SameSite=Strict{secure}"
            # relative, since a proxy may serve the page under another path; the token leaves the address bar
            place = (quote(path.rpartition("/")[2], safe="") or "./") + (f"?{rest}" if rest else "")
            return 303, {"Location": place, "Set-Cookie": cookie, "Cache-Control": "no-store"}, b""
        if self._knows(headers):
            return None
        if "text/html" in headers.get("accept", ""):
            return self._ask_for_token("")
        raise Refusal(401, "This server needs its token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def _knows(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(token.strip(), self._options.token):
            return True
        cookies = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        return any(name == self._cookie and _same(value, self._ticket) for name, _, value in cookies)

    def _ask_for_token(self, problem: str) -> tuple[int, dict[str, str], bytes]:
        page = self._token_page.replace(b"<!-- problem -->", problem.encode())
        return (
            401,
            {"Content-Type": "text/html; charset=utf-8", "WWW-Authenticate": "Bearer", "Cache-Control": "no-store"},
            page,
        )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Raise Refusal for what a page of another site has sent. Browsers say whose page it was; other programs say nothing."""
        site = headers.get("sec-fetch-site")
        if site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            raise Refusal(403, "Pages of other sites may not use this server.")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        if site in ("cross-site", "same-site"):
            raise Refusal(403, "Pages of other sites may not use this server.")
        origin = headers.get("origin")
        if (
            site != "same-origin"
            and origin is not None
            and origin.partition("://")[2].lower() != headers.get("host", "").lower()
        ):
            raise Refusal(403, "Pages of other sites may not use this server.")


class _Answer:
    """What is sent back: with the headers of all answers, counted once."""

    def __init__(self, send: Send, scope: Scope, monitor: Monitor):
        self._send, self._scope, self._monitor = send, scope, monitor
        self.started, self.began = False, 0.0

    async def send(self, message: Message) -> None:
        """Pass a message of the application on."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
            self._count(message["status"])
        try:
            await self._send(message)
        except TimeoutError:
            raise
        except Exception as error:  # of the server's protocol: it has given up on this connection
            raise ConnectionError("the connection is closed") from error

    async def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Answer at once."""
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})

    async def sentence(self, refusal: Refusal) -> None:
        """Answer with one sentence."""
        body = json.dumps({"detail": refusal.sentence}).encode()
        await self.reply(refusal.status, {"Content-Type": "application/json", **refusal.headers}, body)

    def _count(self, status: int) -> None:
        route = self._scope.get("route")
        name = getattr(route, "path", None) or "other"  # what was asked for could be anything
        self._monitor.add("c4c_requests_total", route=name, method=_method(self._scope), status=status)
        self._monitor.observe("c4c_request_seconds", time.perf_counter() - self.began, route=name)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"


def _same(given: str, right: str) -> bool:
    """Whether two strings are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode())


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.partition(":")[0]

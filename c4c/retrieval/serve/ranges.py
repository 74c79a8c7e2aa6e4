"""Answers with the bytes of a file, whole or in part (RFC 9110, 13 and 14)."""

import asyncio
import hashlib
import os
import re
from collections.abc import Callable
from email.utils import formatdate, parsedate_to_datetime
from typing import Protocol

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_CHUNK = 1 << 18  # bytes a read
_PATIENCE_S = 120  # for which a client may take none of the bytes that are sent to it


class Bytes(Protocol):
    """Something with bytes in it."""

    size: int
    modified: float  # seconds since 1970

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of it; fewer only if it became shorter."""

    def close(self) -> None:
        """It is not needed any more."""


class FileBytes:
    """A file that is open, or `size` bytes of it from `start` on."""

    def __init__(self, descriptor: int, start: int = 0, size: int | None = None):
        status = os.fstat(descriptor)
        self._descriptor, self._start = descriptor, start
        self.size = status.st_size if size is None else size
        self.modified = status.st_mtime_ns / 1e9

    def read(self, size: int, offset: int) -> bytes:
        """See Bytes."""
        return os.pread(self._descriptor, max(0, min(size, self.size - offset)), self._start + offset)

    def close(self) -> None:
        """See Bytes."""
        os.close(self._descriptor)


class RangedResponse(Response):
    """The bytes as a client asks for them. `identity` changes whenever the bytes do."""

    def __init__(self, source: Bytes, media_type: str, identity: str, headers: dict[str, str] | None = None):
        super().__init__(media_type=media_type)
        self._source = source
        self._etag = f'"{hashlib.sha256(identity.encode()).hexdigest()[:24]}"'
        self._modified = formatdate(source.modified, usegmt=True)
        self._more = {**(headers or {}), "ETag": self._etag, "Last-Modified": self._modified, "Accept-Ranges": "bytes"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await self._answer(scope, receive, send)
        finally:
            self._source.close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        status, low, high = self._part(asked)
        headers = {
            "Content-Type": self.media_type or "application/octet-stream",
            "Cache-Control": "private, no-cache",
            **self._more,
        }
        if status == 416:
            headers["Content-Range"] = f"bytes */{self._source.size}"
        elif status == 206:
            headers["Content-Range"] = f"bytes {low}-{high - 1}/{self._source.size}"
        if status == 304:
            del headers["Content-Type"]
        else:
            headers["Content-Length"] = str(high - low)
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        if scope["method"] == "HEAD" or high == low:
            await send({"type": "http.response.body", "body": b""})
            return
        gone = asyncio.create_task(_left(receive))
        try:
            await self._send_bytes(send, gone, low, high)
        finally:
            gone.cancel()

    async def _send_bytes(self, send: Send, gone: asyncio.Task, low: int, high: int) -> None:
        while low < high and not gone.done():
            data = await anyio.to_thread.run_sync(self._source.read, min(_CHUNK, high - low), low)
            if not data:
                # the client sees that bytes are missing
                raise ConnectionError("the file became shorter while it was sent")
            low += len(data)
            async with asyncio.timeout(_PATIENCE_S):
                await send({"type": "http.response.body", "body": data, "more_body": low < high})

    def _part(self, asked: Headers) -> tuple[int, int, int]:
        """(status, first byte, byte after the last)."""
        size = self._source.size
        if self._is_known(asked):
            return 304, 0, 0
        wanted = asked.get("range")
        if wanted is None or not self._may_be_part(asked.get("if-range")):
            return 200, 0, size
        bounds = parse_range(wanted, size)
        if bounds is None:
            return 200, 0, size
        return (206, *bounds) if bounds[0] < bounds[1] else (416, 0, 0)

    def _is_known(self, asked: Headers) -> bool:
        """Whether the client has these bytes."""
        if (tags := asked.get("if-none-match")) is not None:
            return tags.strip() == "*" or self._etag in [tag.strip().removeprefix("W/") for tag in tags.split(",")]
        return (since := asked.get("if-modified-since")) is not None and not self._newer_than(since)

    def _may_be_part(self, condition: str | None) -> bool:
        """Whether If-Range, an entity tag or a date, is met."""
        if condition is None or condition.strip() == self._etag:
            return True
        return not condition.startswith(('"', "W/")) and condition.strip() == self._modified

    def _newer_than(self, date: str) -> bool:
        try:
            return int(self._source.modified) > parsedate_to_datetime(date).timestamp()
        except (ValueError, OverflowError):
            return True


async def _left(receive: Receive) -> None:
    """Returns when the client is gone. Sending does not say so."""
    while (await receive())["type"] != "http.disconnect":
        pass


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """(first byte, byte after the last) of a Range header; equal: the range is outside. None: the header is to be ignored,
    as are several ranges at once, which no player asks for."""
    match = re.fullmatch(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", text.strip(), re.ASCII)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return min(int(first), size), min(int(last) + 1, size) if last else size


def opened(path: str, check: Callable[[os.stat_result], None] = lambda status: None) -> FileBytes:
    """A regular file, open for reading. `check` may refuse it by what it is. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    try:
        check(os.fstat(descriptor))
        return FileBytes(descriptor)
    except BaseException:
        os.close(descriptor)
        raise

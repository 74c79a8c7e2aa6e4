"""A clip or picture that is uploaded: written to a temporary file as it comes, and never more than the limit of it."""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from anyio import to_thread
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from c4c.retrieval.serve.guard import Refusal

_SILENCE_S = 30  # without a byte, after which an upload is over
_LONGEST_S = 1800
_ROOM = 1 << 16  # bytes of a request beside the file
_LONGEST_HEADER = 4096  # bytes, of a part of the form
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of each form that is none
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Upload:
    """What a form held: the file `file`, written to `path`."""

    def __init__(self, path: Path, most_bytes: int):
        self.path, self.most_bytes = path, most_bytes
        self.size = 0
        self.has_file = False


async def receive(request: Request, path: Path, most_bytes: int) -> Upload:
    """Read the form of a request. Raises Refusal for one that is too large, too slow, or no such form."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise Refusal(415, "Send the clip or picture as the field `file` of a form (multipart/form-data).")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes + _ROOM:
        raise too_large(most_bytes)
    upload = Upload(path, most_bytes)
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            form = _Form(upload, boundary, file)
            async with asyncio.timeout(_LONGEST_S):
                async for chunk in _chunks(request):
                    await to_thread.run_sync(form.write, chunk)  # a disk that is busy makes writers wait
                await to_thread.run_sync(file.flush)
            form.end()
    except TimeoutError as error:
        raise Refusal(408, "The upload stopped. Try again.") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise Refusal(507, "The server has no room for this upload.") from error
        raise
    if not upload.has_file:
        raise Refusal(422, "The form has no field `file`.")
    if not upload.size:
        raise Refusal(415, "The file is empty.")
    return upload


def too_large(most_bytes: int) -> Refusal:
    """What a file over the limit gets."""
    return Refusal(413, f"The file is too large: this server takes up to {most_bytes / 1e6:.0f} MB.")


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        async with asyncio.timeout(_SILENCE_S):
            chunk = await anext(stream, None)
        if chunk is None:
            return
        yield chunk


class _Form:
    """Feeds the parser, and takes what it finds."""

    def __init__(self, upload: Upload, boundary: bytes, file):
        self._upload, self._file = upload, file
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._received = 0
        self._ended = False
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_part_data": self._part_data,
            "on_header_field": self._header_field, "on_header_value": self._header_value, "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished, "on_end": self._end,
        })  # fmt: skip

    def write(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        self._received += len(chunk)
        if self._received > self._upload.most_bytes + _ROOM:
            raise too_large(self._upload.most_bytes)
        try:
            self._parser.write(chunk)
        except ValueError as error:  # the parser's own errors are
            raise Refusal(400, "The form is damaged.") from error

    def end(self) -> None:
        """The body is over."""
        if not self._ended:
            raise Refusal(400, "The form ends before its last line.")

    def _begin(self) -> None:
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._value) > _LONGEST_HEADER:
            raise Refusal(400, "The form is damaged.")

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != "file":
            raise Refusal(
                422, f"The form has a field {field[:40]!r}. Send `file` alone; k and the filters belong in the address."
            )
        if self._upload.has_file:
            raise Refusal(422, "The form has two files: send one.")
        self._upload.has_file = True

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        self._upload.size += len(piece)
        if self._upload.size > self._upload.most_bytes:
            raise too_large(self._upload.most_bytes)
        self._file.write(piece)

    def _end(self) -> None:
        self._ended = True

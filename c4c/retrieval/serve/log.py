"""The server's log, which is standard error. A thread writes it: a terminal that was stopped, or a pipe that nobody reads, holds
up no request. What is repeated is told once a minute."""

import contextlib
import io
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator

_MOST_PIECES = 1000  # that wait to be written; what comes beyond them is left out
_LONGEST_PIECE = 16 << 10  # characters
_AGAIN_S = 60.0  # after which the same error is told again
_END_S = 0.3  # for what is not written when the server ends

_lock = threading.Lock()
_told: dict[
    tuple[type, str, int], list[float]
] = {}  # {kind and place in the code: [when it was told, how often since]}


def report(error: BaseException, *, with_trace: bool = False) -> None:
    """Write an error: one line, or with its traceback. Errors of one kind from one place in the code are one error, whatever they
    say: requests must not fill a disk."""
    frames = traceback.extract_tb(error.__traceback__)
    key = (type(error), frames[-1].filename if frames else "", (frames[-1].lineno if frames else 0) or 0)
    now = time.monotonic()
    with _lock:
        before = _told.get(key)
        if before is not None and now - before[0] < _AGAIN_S:
            before[1] += 1
            return
        _told[key] = [now, 0]
    if with_trace:
        text = "".join(traceback.format_exception(error)).rstrip()
    else:
        text = f"error: {' '.join(str(error).split())[:500]}"
    text = _plain(text)
    if before is not None and before[1]:
        text += f"\n({before[1]:.0f} more of this kind since the last one that was told)"
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """What is written to sys.stderr goes to its file from a thread, here alone."""
    before = sys.stderr
    stream = _Background(before.fileno())
    sys.stderr = stream
    try:
        yield
    finally:
        sys.stderr = before
        stream.end()


class _Background(io.TextIOBase):
    """A text stream whose writing never waits."""

    def __init__(self, descriptor: int):
        super().__init__()
        self._descriptor = descriptor
        self._pieces: queue.Queue[str | None] = queue.Queue(_MOST_PIECES)
        self._thread = threading.Thread(target=self._run, daemon=True, name="c4c-log")
        self._thread.start()

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """Of the file that is written."""
        return self._descriptor

    def write(self, text: str) -> int:
        """Put it into the queue, if there is room."""
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(text[:_LONGEST_PIECE])
        return len(text)

    def end(self) -> None:
        """Wait a moment for what is not written yet."""
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(None)
        self._thread.join(_END_S)

    def _run(self) -> None:
        while (text := self._pieces.get()) is not None:
            data = text.encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):  # the reader is gone
                while data:
                    data = data[os.write(self._descriptor, data) :]


def _plain(text: str) -> str:
    """Without what steers a terminal: an error's words may come from a file or a request."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

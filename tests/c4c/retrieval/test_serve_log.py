"""The server's log: it holds up nobody, and is not filled by what is repeated."""

import os
import sys
import threading

import pytest

from c4c.retrieval.serve import log


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(log, "_told", {})


def fail(words: str) -> Exception:
    try:
        raise ValueError(words)
    except ValueError as error:
        return error


def test_what_is_repeated_is_told_once_a_minute(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    for i in range(1000):
        log.report(fail(f"{i} of them"))
    log.report(KeyError("another kind"), with_trace=True)
    assert capsys.readouterr().err == "error: 0 of them\nKeyError: 'another kind'\n"
    clock[0] += 61
    log.report(fail("again"), with_trace=True)
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith(
        "again\n(999 more of this kind since the last one that was told)\n"
    )


def test_an_error_does_not_steer_the_terminal(capsys):
    log.report(fail("a\x1b[2Jb\nerror: forged"))
    log.report(KeyError("x\x1b]0;y"), with_trace=True)
    assert capsys.readouterr().err == "error: a\\x1b[2Jb error: forged\nKeyError: 'x\\x1b]0;y'\n"


def test_a_pipe_that_nobody_reads(monkeypatch):
    """Writing into a full pipe waits for its reader; what is logged does not, however much it is, and is there later."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    with open(writer, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)

        def tell() -> None:
            with log.in_background():
                for _ in range(5000):
                    print("told while nobody reads", file=sys.stderr)
                log.report(fail("one more"))

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(20)
        waits = teller.is_alive()
        with open(reader, "rb", buffering=0) as source:  # ends the writing
            seen = b""
            while b"told" not in seen:
                seen = seen[-10:] + source.read(1 << 16)
    assert not waits and sys.stderr is file

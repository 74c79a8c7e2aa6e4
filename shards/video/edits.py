"""The edit list of an mp4 or a QuickTime file (ISO 14496-12, 8.6.6), as far as libav reads it otherwise than it is meant."""

import struct
from collections.abc import Iterator
from typing import BinaryIO

import av

_EMPTY = -1  # media time of an edit that shows nothing


def gap_note(file: BinaryIO, container: av.container.InputContainer, stream: av.VideoStream) -> tuple[str, ...]:
    """What is said of a video whose edit list shows nothing for a while after its first picture. libav takes that for a part
    of the file, and repeats pictures there."""
    if container.format.name.split(",")[0] != "mov":
        return ()
    before = file.tell()
    try:
        edits = _edits(file, stream.id)
    finally:
        file.seek(before)  # libav goes on reading there
    shown = False
    for length, start in edits:
        if start == _EMPTY and length and shown:
            return (
                "its edit list shows nothing for a while: the pictures there, and the times after it, may be wrong",
            )
        shown = shown or start != _EMPTY
    return ()


def _edits(file: BinaryIO, track: int) -> list[tuple[int, int]]:
    """(length, media time) of each edit of a track; [] if it has no edit list."""
    movie = next(_inside(file, 0, file.seek(0, 2), b"moov"), (0, 0))
    for box in _inside(file, *movie, b"trak"):
        heads = [at for at, _ in _inside(file, *box, b"tkhd")]
        numbers = [_number(file, at + (20 if _number(file, at) >> 24 else 12)) for at in heads]
        for edits in _inside(file, *box, b"edts") if track in numbers else ():
            for at, stop in _inside(file, *edits, b"elst"):
                file.seek(at)
                return _entries(file.read(stop - at))
    return []


def _entries(data: bytes) -> list[tuple[int, int]]:
    kind = struct.Struct(">Qqi" if data[:1] == b"\1" else ">Iii")
    return [entry[:2] for entry in kind.iter_unpack(data[8 : 8 + (len(data) - 8) // kind.size * kind.size])]


def _number(file: BinaryIO, at: int) -> int:
    file.seek(at)
    return int.from_bytes(file.read(4), "big")


def _inside(file: BinaryIO, at: int, end: int, name: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of each box `name` begin and end, of those that stand in a row from `at` to `end`."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, header = int.from_bytes(head[8:], "big"), 16
        size = size or end - at
        if size < header:
            return
        if kind == name:
            yield at + header, min(end, at + size)
        at += size

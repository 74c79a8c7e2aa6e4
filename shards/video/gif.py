"""The blocks of a GIF (GIF89a, 18 to 27): whether all of them are there, and how long pictures are shown."""

import io
from typing import BinaryIO

_SHORTEST, _USUAL = 2, 10  # hundredths of a second; browsers show a picture of less than the first for the second
_EXTENSION, _PICTURE, _END = 0x21, 0x2C, 0x3B
_CONTROL = 0xF9  # label of the extension that says how long the next picture is shown
_PADDING = 64  # bytes behind the last block that need not be one


def begins_like_a_gif(file: BinaryIO) -> bool:
    """Whether the file is a GIF by its first bytes; it stands at its beginning afterwards."""
    file.seek(0)
    head = file.read(6)
    file.seek(0)
    return head in (b"GIF87a", b"GIF89a")


def as_browsers_time_it(file: BinaryIO) -> BinaryIO:
    """The GIF with the delays that browsers and ffmpeg's own program give it, as a file in memory if they differ."""
    short, _ = _walk(file)
    if not short:
        file.seek(0)
        return file
    file.seek(0)
    data = bytearray(file.read())
    for place in short:
        data[place : place + 2] = _USUAL.to_bytes(2, "little")
    return io.BytesIO(data)


def hole(file: BinaryIO) -> int:
    """The first place where a block should begin and none does; 0 if there is none."""
    return _walk(file)[1]


def _walk(file: BinaryIO) -> tuple[list[int], int]:
    """Places of the delays that are too short, though not 0, and the first place where no block begins (0: none)."""
    file.seek(0, 2)
    size, short = file.tell(), []
    file.seek(10)
    _skip_colours(file, file.read(3)[:1])
    while code := file.read(1):
        at = file.tell() - 1
        if code[0] == _EXTENSION:
            label, head = file.read(1), file.read(1)
            if label and label[0] == _CONTROL and head == b"\4":
                place = file.tell() + 1
                delay = int.from_bytes(file.read(4)[1:3], "little")
                if 0 < delay < _SHORTEST:
                    short.append(place)
                head = file.read(1)
            _skip_parts(file, head)
        elif code[0] == _PICTURE:
            _skip_colours(file, file.read(9)[8:])
            file.read(1)
            _skip_parts(file, file.read(1))
        elif code[0]:  # a 0 too many is of some writers
            return short, 0 if code[0] == _END or at > size - _PADDING else at
    return short, 0


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, 1)


def _skip_parts(file: BinaryIO, length: bytes) -> None:
    while length and length[0]:
        file.seek(length[0], 1)
        length = file.read(1)

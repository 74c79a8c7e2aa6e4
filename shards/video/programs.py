"""Which sound belongs to a picture: a broadcast may hold several programs, each with a clock of its own."""

from collections.abc import Iterator
from typing import BinaryIO

import av

_PACKET = 188  # bytes
_READ = 2 << 20  # bytes in which the tables must stand; they are repeated several times a second


def sound_of(
    file: BinaryIO, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[av.AudioStream, ...]:
    """The sound that is played with the video `stream`: all that the file has, less that of other programs of an MPEG-TS."""
    sounds = tuple(container.streams.audio)
    if container.format.name != "mpegts" or not sounds:
        return sounds
    before = file.tell()
    try:
        file.seek(0)
        programs = _programs(file.read(_READ))
    finally:
        file.seek(before)  # libav goes on reading there
    mine: set[int] = set().union(*(streams for streams in programs if stream.id in streams))
    others = set().union(*programs) - mine if mine else set()
    return tuple(sound for sound in sounds if sound.id not in others)


def _programs(data: bytes) -> list[set[int]]:
    """The streams (PIDs) of each program of an MPEG-TS, by its first tables (ISO 13818-1, 2.4.4)."""
    tables: dict[int, set[int] | None] | None = None  # {PID of a program's table: PIDs of its streams}
    sections: dict[int, bytearray] = {}
    for pid, begins, payload in _payloads(data):
        if pid != 0 and (tables is None or pid not in tables):
            continue
        if begins:
            sections[pid] = bytearray(payload[1 + payload[0] :] if payload else b"")
        elif pid in sections:
            sections[pid] += payload
        section = sections.get(pid, b"")
        length = 3 + (int.from_bytes(section[1:3], "big") & 0xFFF) if len(section) >= 3 else 1 << 16
        if len(section) < length:
            continue
        body = bytes(section[8 : length - 4])
        if pid == 0 and section[0] == 0 and tables is None:
            pairs = [(body[i : i + 2], body[i + 2 : i + 4]) for i in range(0, len(body) - 3, 4)]
            tables = {int.from_bytes(at, "big") & 0x1FFF: None for number, at in pairs if number != b"\0\0"}
        elif pid != 0 and section[0] == 2 and tables is not None and tables[pid] is None:
            tables[pid] = _streams(body)
        if tables is not None and None not in tables.values():
            break
    return [streams for streams in (tables or {}).values() if streams]


def _streams(body: bytes) -> set[int]:
    """The PIDs that a program's table lists, of what stands between its header and its checksum."""
    found = set()
    at = 4 + (int.from_bytes(body[2:4], "big") & 0xFFF)
    while at + 5 <= len(body):
        found.add(int.from_bytes(body[at + 1 : at + 3], "big") & 0x1FFF)
        at += 5 + (int.from_bytes(body[at + 3 : at + 5], "big") & 0xFFF)
    return found


def _payloads(data: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """(PID, whether a section or a picture begins in it, payload) of each packet of an MPEG-TS."""
    for step in (_PACKET, _PACKET + 4, _PACKET + 16):  # as it is, with time codes (m2ts), with parity
        first = next(
            (i for i in range(step) if len(data) > i + 4 * step and set(data[i : i + 5 * step : step]) == {0x47}), None
        )
        if first is not None:
            break
    else:
        return
    for at in range(first, len(data) - _PACKET + 1, step):
        if data[at] != 0x47 or not data[at + 3] & 0x10:  # lost, or without payload
            continue
        begin = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        yield (
            int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF,
            bool(data[at + 1] & 0x40),
            data[begin : at + _PACKET],
        )

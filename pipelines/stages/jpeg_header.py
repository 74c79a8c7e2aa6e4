"""The header of a JPEG, read before a decoder gets it.

DALI 2.4's image decoder shares the headers of a run among its threads, and does not wait for them when it fails at one: they
go on in memory that is given up by then, and the process crashes. So it gets no picture whose header it would refuse. What is
broken further on, it refuses without harm.
"""

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that begin a frame; ITU-T T.81, table B.1
_SCAN = 0xDA


def header_fault(data: bytes, width: int, height: int) -> str:
    """What is wrong with a JPEG of `width` x `height` pixels, as far as its header says; empty if nothing is."""
    if not data.startswith(b"\xff\xd8"):
        return "it is no JPEG"
    at, framed = 2, False
    try:
        while True:
            if data[at] != 0xFF:
                return f"its header is broken at byte {at}"
            while (marker := data[at + 1]) == 0xFF:  # bytes to fill up with, T.81 B.1.1.2
                at += 1
            if marker == 0:  # of all markers the one that the decoder refuses
                return f"its header is broken at byte {at + 1}"
            if marker == _SCAN:
                return "" if framed else "its header has no size"
            if marker in _FRAMES:
                bits, rows, columns = data[at + 4], data[at + 5 : at + 7], data[at + 7 : at + 9]
                if bits != 8 or data[at + 9] not in (1, 3, 4):
                    return f"it has {data[at + 9]} components of {bits} bits"
                size = (int.from_bytes(columns, "big"), int.from_bytes(rows, "big"))
                if size != (width, height):
                    return f"it has {size[0]}x{size[1]} pixels, and the sample table says {width}x{height}"
                framed = True
            at += 2 + (data[at + 2] << 8) + data[at + 3]
    except IndexError:
        return "its header is cut off"

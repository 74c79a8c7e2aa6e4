"""The header of a JPEG, read before a decoder gets it.

DALI 2.4's image decoder shares the headers of a run among its threads, and does not wait for them when it fails at one: they
go on in memory that is given up by then, and the process crashes. So it gets no picture whose header it would refuse. What is
broken further on, it refuses without harm.
"""

import struct

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame; ITU-T T.81, table B.1
_SCAN, _FILL = 0xDA, 0xFF  # the end of the header; a byte to fill up with, B.1.1.2
_BITS = 8


def header_fault(data: bytes, width: int, height: int) -> str:
    """What is wrong with a JPEG of `width` x `height` pixels, as far as its header says; empty if nothing is."""
    if not data.startswith(b"\xff\xd8"):
        return "it is no JPEG"
    at, framed = 2, False
    try:
        while data[at] == 0xFF and (marker := data[at + 1]):
            if marker == _FILL:
                at += 1
                continue
            if marker == _SCAN:
                return "" if framed else "its header has no size"
            if marker in _FRAMES:
                framed = True
                if fault := _frame_fault(data[at + 4 : at + 10], width, height):
                    return fault
            at += 2 + (data[at + 2] << 8) + data[at + 3]
    except IndexError:
        return "its header is cut off"
    return f"its header is broken at byte {at}"


def _frame_fault(frame: bytes, width: int, height: int) -> str:
    """What is wrong with precision, size and number of components; empty if nothing is. Raises IndexError where they are cut off."""
    components = frame[5]
    if components in (1, 3, 4) and frame[:5] == struct.pack(">BHH", _BITS, height, width):
        return ""
    bits, rows, columns, _ = struct.unpack(">BHHB", frame)
    if bits != _BITS or components not in (1, 3, 4):
        return f"it has {components} components of {bits} bits"
    return f"it has {columns}x{rows} pixels, and the sample table says {width}x{height}"

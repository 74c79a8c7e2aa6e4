"""What a container says is to be cropped off pictures (Matroska's PixelCrop, QuickTime's and mp4's clean aperture)."""

import io
from collections.abc import Iterator
from contextlib import suppress

import av

# IDs of elements (RFC 9559, 5.1.4.1.28)
_CROPPING = {b"\x54\xcc": "left", b"\x54\xbb": "top", b"\x54\xdd": "right", b"\x54\xaa": "bottom"}
_INSIDE = (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0")  # segment, tracks, track, video
_WRITTEN = ("mov", "matroska")


def cropping(container: av.container.InputContainer, stream: av.VideoStream) -> dict[str, int]:
    """{side: pixels} of what players crop. PyAV does not tell what libav has read of it, but libav writes it again."""
    if container.format.name.split(",")[0] not in _WRITTEN:
        return {}
    header = io.BytesIO()
    with suppress(av.FFmpegError, ValueError, OSError):  # Matroska does not take every codec
        with av.open(header, "w", format="matroska") as target:
            target.add_stream_from_template(stream, opaque=True)
            target.start_encoding()
            data = header.getvalue()
        return {side: pixels for side, pixels in _sides(data, 0, len(data)) if pixels}
    return {}


def _sides(data: bytes, at: int, end: int) -> Iterator[tuple[str, int]]:
    """The sides of a Matroska file's elements, and of those inside them (RFC 8794, 4 to 6)."""
    while at + 2 <= end:
        length = 9 - data[at].bit_length()
        name, at = data[at : at + length], at + length
        width = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
        at += width
        stop = min(end, at + size)  # that of the segment is not known yet
        if name in _CROPPING:
            yield _CROPPING[name], int.from_bytes(data[at:stop], "big")
        elif name in _INSIDE:
            yield from _sides(data, at, stop)
        at = stop


def cropping_note(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[str, ...]:
    """What is said of a video of which players show a part."""
    sides = cropping(container, stream)
    if not sides:
        return ()
    listed = ", ".join(f"{side} {pixels}" for side, pixels in sides.items())
    return (f"players crop its pictures ({listed} pixels): they are read whole",)

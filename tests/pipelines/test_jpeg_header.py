"""What is read of a JPEG before a decoder gets it."""

import io

import pytest
from PIL import Image

from pipelines.stages.jpeg_header import header_fault


def jpeg(mode="RGB", size=(96, 64), **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "JPEG", **options)
    return out.getvalue()


def frame_at(data: bytes) -> int:
    """Where the segment of the frame begins."""
    return data.index(b"\xff\xc0")


def changed(at: int, new: bytes) -> bytes:
    """A JPEG with other bytes so far into its frame's segment."""
    data = bytearray(jpeg())
    data[frame_at(data) + at : frame_at(data) + at + len(new)] = new
    return bytes(data)


GOOD = {
    "rgb": jpeg(),
    "grey": jpeg("L"),
    "cmyk": jpeg("CMYK"),
    "progressive": jpeg(progressive=True),
    "a comment": jpeg(comment=b"c4c" * 100),
    "filled up": jpeg().replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_a_whole_header_has_no_fault(data):
    assert header_fault(data, 96, 64) == ""


BROKEN = {
    "nothing": (b"", "it is no JPEG"),
    "another": (b"\x89PNG\r\n\x1a\n" + bytes(100), "it is no JPEG"),
    "zeros": (b"\xff\xd8\xff\xe0" + bytes(200), "its header is broken at byte 4"),
    "no marker": (jpeg()[:20] + jpeg()[21:], "its header is broken at byte 20"),
    "marker 0": (b"\xff\xd8\xff\x00" + bytes(200), "its header is broken"),
    "marker 0 with a length": (b"\xff\xd8\xff\x00\x00\x04\x00\x00" + jpeg()[2:], "its header is broken at byte 2"),
    "two bytes": (b"\xff\xd8", "its header is cut off"),
    "cut": (jpeg()[:170], "its header is cut off"),
    "cut in the frame": (jpeg()[: frame_at(jpeg()) + 7], "its header is cut off"),
    "no frame": (jpeg()[: frame_at(jpeg())] + jpeg()[frame_at(jpeg()) + 19 :], "its header has no size"),
    "two components": (changed(9, b"\x02"), "it has 2 components of 8 bits"),
    "no component": (changed(9, b"\x00"), "it has 0 components of 8 bits"),
    "17 bits": (changed(4, b"\x11"), "it has 3 components of 17 bits"),
    "smaller": (jpeg(size=(16, 64)), "it has 16x64 pixels, and the sample table says 96x64"),
    "no width": (changed(7, b"\0\0"), "it has 0x64 pixels"),
    "no height": (changed(5, b"\0\0"), "it has 96x0 pixels"),
}


@pytest.mark.parametrize(("data", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_told(data, fault):
    found = header_fault(data, 96, 64)
    assert fault in found if fault == "its header is broken" else found.startswith(fault)

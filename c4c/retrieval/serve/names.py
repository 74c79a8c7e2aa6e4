"""Names of segments and videos in addresses: letters, digits, - and _ only, so that none of them can mean a path."""

import base64
import binascii
import re

from c4c.retrieval.serve.guard import Refusal

_LONGEST = 8192  # characters


def to_name(text: str) -> str:
    """A segment's or a video's id, for an address."""
    return base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode().rstrip("=")


def shown(video: str) -> str:
    """The name of a video for users. The index names a video by its absolute path where two others have every shorter name."""
    return video.rpartition("/")[2] if video.startswith("/") else video


def from_name(name: str) -> str:
    """Undo `to_name`. Raises Refusal for what it never gives."""
    if len(name) <= _LONGEST and re.fullmatch(r"[A-Za-z0-9_-]+", name):
        try:
            text = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
        except (binascii.Error, UnicodeDecodeError):
            text = ""
        if text and to_name(text) == name and "\0" not in text:
            return text
    raise Refusal(404, "The index holds no such segment or video.")

"""What is stored of a video: one function from a source file to the bytes and the frame table of its stored form."""

import io
from dataclasses import asdict, dataclass
from typing import BinaryIO

from crc32c import crc32c

from shards import ShardError, video
from shards.schema import FrameTable
from shards.tar import safe_extension

PROFILES = ("intra", "copy")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is stored of each video. All but the name speak of `intra`: `fps`, `short_side` in pixels, `quality` (JPEG
    quantiser, 1 best, 31 worst), `chroma` (420, or 444 for exact scaling and full colour resolution)."""

    name: str = "intra"
    fps: int = 3
    short_side: int = 224
    quality: int = 3
    chroma: int = 420

    def __post_init__(self):
        if self.name not in PROFILES:
            raise ShardError(f"--profile {self.name}: there are {', '.join(PROFILES)}")
        for name, low, high in (("fps", 1, 240), ("short_side", 16, 4096), ("quality", 1, 31)):
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise ShardError(f"--{flag} {getattr(self, name)}: must be between {low} and {high}")
        if self.chroma not in (420, 444):
            raise ShardError(f"--chroma {self.chroma}: there are 420 and 444")

    def describe(self) -> dict:
        return asdict(self) if self.name == "intra" else {"name": self.name}


@dataclass(frozen=True)
class Stored:
    """A video in its stored form. `file` is seekable, stands at its beginning and holds `size` bytes; `crc32c` is of
    all of them. Width and height are as displayed; `rotation` is what is left to turn decoded frames by."""

    source: video.Source
    file: BinaryIO
    size: int
    crc32c: int
    frames: FrameTable
    codec: str
    extension: str
    extradata: bytes
    rotation: int
    width: int
    height: int


def store(file: BinaryIO, name: str, profile: Profile, start: float | None = None, end: float | None = None) -> Stored:
    """The stored form of the video in `file` (seekable; `name` is what it is called), cut to [start, end) seconds.

    Raises VideoError if any of it does not decode.
    """
    if start is not None or end is not None:
        raise ShardError("cutting videos is not there yet")
    data = file.read()
    if profile.name == "intra":
        source, stored, frames = video.to_intra(
            data, rate=profile.fps, short_side=profile.short_side, quality=profile.quality, chroma=profile.chroma
        )
        width, height = video.scaled_size(source.width, source.height, profile.short_side)
        codec, extension, extradata, rotation = "mjpeg", "mp4", b"", 0
    else:
        source = video.scan(data)
        stored, frames, width, height = data, source.frames, source.width, source.height
        codec, extension, extradata = source.codec, safe_extension(name), source.extradata
        rotation = source.rotation
    return Stored(
        source, io.BytesIO(stored), len(stored), crc32c(stored), frames, codec, extension, extradata, rotation,
        width, height,
    )  # fmt: skip

"""What is stored of a video: one function from a source file to the bytes and the frame table of its stored form."""

import io
import math
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from crc32c import crc32c

from shards import ShardError, VideoError
from shards.limits import Limits
from shards.tar import safe_extension
from shards.video.encode import Grid, cut_copy, nvenc_opens, to_gops, to_intra
from shards.video.geometry import Geometry, stored_geometry
from shards.video.source import SourceVideo, scan
from shards.video.writer import WrittenVideo

FPS, SIDE, GOP = Limits(int, 1, 240), Limits(int, 16, 4096), Limits(int, 1, 600)
QUALITY = Limits(int, 0, 63)  # of any profile
# name: the default of --quality and its range
_QUALITY = {
    "intra": (3, Limits(int, 1, 31)),
    "copy": (0, Limits(int, 0, 0)),
    "h264": (23, Limits(int, 0, 51)),
    "hevc": (26, Limits(int, 0, 51)),
    "av1": (32, Limits(int, 1, 63)),
}
PROFILES = tuple(_QUALITY)
ENCODERS = ("cpu", "nvenc", "auto")
CHROMAS = (420, 444)
_FIELDS = {
    "intra": ("name", "fps", "short_side", "long_side", "squash", "quality", "chroma"),
    "copy": ("name",),
    **dict.fromkeys(
        ("h264", "hevc", "av1"), ("name", "fps", "short_side", "long_side", "squash", "quality", "gop", "encoder")
    ),
}
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is stored of each video.

    `intra` keeps the frames of the extractor's grid at `fps` frames a second (above a source's own rate: all of its
    frames) as JPEGs. `h264`, `hevc` and `av1` re-encode the same frames in closed GOPs of `gop` frames (None: a second of
    them, at most 12). `copy` keeps the source bytes and heeds none of it.

    Pictures are scaled to `short_side` pixels, or to `long_side` or `squash`, of which one may be set: see `Geometry`.

    `quality` is MJPEG's quantiser (1 best, 31 worst) or the encoder's constant rate factor (None: 3, 23, 26, 32 for
    intra, h264, hevc, av1). `chroma` is for intra: 420, or 444 for exact scaling and full colour resolution. `encoder`
    cpu gives the same bytes on every machine with the same libraries; nvenc's depend on the GPU and its driver too, so
    it is used only where it is asked for; auto means nvenc where it works, see `resolved`.
    """

    name: str = "intra"
    fps: int = 3
    short_side: int = 224
    long_side: int = 0
    squash: int = 0  # both sides
    quality: int | None = None
    chroma: int = 420
    gop: int | None = None
    encoder: str = "cpu"

    def __post_init__(self):
        if self.name not in PROFILES:
            raise ShardError(f"--profile must be one of {', '.join(PROFILES)}; got {self.name}")
        default, quality = _QUALITY[self.name]
        if self.quality is None or self.name == "copy":
            object.__setattr__(self, "quality", default)
        if self.gop is None:
            object.__setattr__(self, "gop", max(1, min(self.fps, 12)))
        if self.long_side and self.squash:
            raise ShardError(f"--long-side {self.long_side} and --squash {self.squash}: give one of them")
        for name, limits in {"fps": FPS, self._sized_by: SIDE, "quality": quality, "gop": GOP}.items():
            limits.check(f"--{name.replace('_', '-')}", getattr(self, name), f" with --profile {self.name}")
        if self.chroma not in CHROMAS:
            raise ShardError(f"--chroma must be {' or '.join(map(str, CHROMAS))}; got {self.chroma}")
        if self.encoder not in ENCODERS:
            raise ShardError(f"--encoder must be one of {', '.join(ENCODERS)}; got {self.encoder}")
        if self.encodes and self.geometry.side % 2:
            raise ShardError(f"{self.geometry.option}: {self.name} needs an even number of pixels")

    @property
    def encodes(self) -> bool:
        """Whether it re-encodes video."""
        return self.name in ("h264", "hevc", "av1")

    @property
    def _sized_by(self) -> str:
        return "squash" if self.squash else "long_side" if self.long_side else "short_side"

    @property
    def geometry(self) -> Geometry:
        """The size of what is stored, but for `copy`."""
        found = stored_geometry({self._sized_by: getattr(self, self._sized_by)})
        assert found is not None, "__post_init__ has checked it"
        return found

    def resolved(self) -> "Profile":
        """The same with the encoder that this machine has in place of auto. Raises ShardError if nvenc is wanted and
        does not open."""
        if not self.encodes or self.encoder == "cpu":
            return self
        opens = nvenc_opens(self.name)
        if self.encoder == "nvenc" and not opens:
            raise ShardError(
                f"--encoder nvenc: {self.name}_nvenc does not open here (it needs an NVIDIA GPU with that encoder and its "
                "driver). Use --encoder cpu, or auto."
            )
        return replace(self, encoder="nvenc" if opens else "cpu")

    def describe(self) -> dict:
        """What a split's record says of it: all that the stored bytes depend on."""
        others = {"short_side", "long_side", "squash"} - {self._sized_by}
        return {
            name: value for name, value in asdict(self).items() if name in _FIELDS[self.name] and name not in others
        }


@dataclass(frozen=True, kw_only=True)
class Stored(WrittenVideo):
    """A video in its stored form: a seekable file of `size` bytes, of which `crc32c` is the checksum, and its source.

    Numbers in `frames` count from the first frame of the cut.
    """

    source: SourceVideo
    size: int
    crc32c: int


def store(file: BinaryIO, name: str, profile: Profile, start: float | None = None, end: float | None = None) -> Stored:
    """The stored form of the video in `file` (seekable; `name` is what it is called), cut to the frames with
    start <= time < end, in seconds as a player's clock shows them, and, where the first second of that or all of it shows no
    new frame, the one that is still shown at `start`.

    Memory does not grow with the video, and the work with the cut, not with what is around it. Frame numbers count from
    the first kept frame on and times from the start of the cut, as if it were a video of its own; a cut with `copy` begins at the keyframe
    before, so its table holds frames of negative numbers. Raises VideoError if any of it does not decode.
    """
    begin, stop = 0.0 if start is None else max(0.0, start), math.inf if end is None else end
    if not begin < stop:
        raise VideoError(f"the cut is empty: it starts at {begin:g} s and ends at {stop:g} s")
    if profile.name == "copy" and (begin, stop) == (0.0, math.inf):
        return _untouched(file, name)
    if profile.name == "copy":
        source, written = cut_copy(file, begin, stop)
    else:
        assert profile.quality is not None and profile.gop is not None, "__post_init__ sets them"
        grid = Grid(profile.fps, profile.geometry, begin, stop)
        if profile.name == "intra":
            source, written = to_intra(file, grid, quality=profile.quality, chroma=profile.chroma)
        else:
            encoder = profile.resolved().encoder
            source, written = to_gops(
                file, grid, codec=profile.name, quality=profile.quality, gop=profile.gop, encoder=encoder
            )
    size, crc = _measure(written.file)
    return Stored(**vars(written), source=source, size=size, crc32c=crc)


def _untouched(file: BinaryIO, name: str) -> Stored:
    source = scan(file)
    size, crc = _measure(file)
    return Stored(
        source=source, file=file, size=size, crc32c=crc, frames=source.frames, codec=source.codec,
        extension=safe_extension(name), extradata=source.extradata, width=source.width, height=source.height,
        rotation=source.rotation, mirrored=source.mirrored, coding=source.coding,
    )  # fmt: skip


def _measure(file: BinaryIO) -> tuple[int, int]:
    """Size and crc32c of a file, read in pieces; it stands at its beginning afterwards."""
    size, crc = 0, 0
    file.seek(0)
    while piece := file.read(_PIECE):
        size, crc = size + len(piece), crc32c(piece, crc)
    file.seek(0, io.SEEK_SET)
    return size, crc

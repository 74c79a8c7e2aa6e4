"""The sample table: one row a video, with the frame table of the stored file inside the row.

The table is Arrow/Parquet, one file a shard. Lists over frames are parallel and in display order.
"""

from dataclasses import asdict, dataclass, fields
from fractions import Fraction

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 2
SUFFIXES = ("tar", "idx", "parquet")  # of a shard's files, in the order in which they are put into place
CAPTION_COUNTS = "captions.npy"  # beside dataset.json: captions of each video, so that no table is read to count them

# keys of the parquet's metadata: what belongs to a shard but to no row commits together with the rows
REJECTS = b"c4c.rejects"  # JSON: what was not packed, and why
JSON_CRCS = b"c4c.json_crc32c"  # JSON: crc32c of each row's .json member

FRAME_COLUMNS = {
    "frame_number": (pa.int32(), "frame number in the source video, counted from 0 in display order"),
    "frame_time": (pa.float64(), "seconds that a player's clock shows; of a cut, from its start on"),
    "frame_offset": (pa.int64(), "first byte of the frame's packet in the stored file; -1: cannot be sliced"),
    "frame_size": (pa.int32(), "bytes of the packet; -1: cannot be sliced"),
    "frame_key": (pa.bool_(), "a decoder can start at this packet"),
    "frame_crc32c": (pa.uint32(), "crc32c of the packet; 0 where it cannot be sliced"),
}


@dataclass(frozen=True)
class Coding:
    """What a decoder needs to know beside its extradata, as the container had it; libav's numbers and names."""

    codec_tag: str = ""
    bits_per_coded_sample: int = 0
    pix_fmt: str = ""
    width: int = 0
    height: int = 0
    colorspace: int = 2  # not specified
    color_range: int = 0
    color_trc: int = 2
    color_primaries: int = 2

    @classmethod
    def of(cls, decoder) -> "Coding":
        """What an opened container told its decoder (`av.VideoCodecContext`)."""
        kinds = {f.name: cls.__annotations__[f.name] for f in fields(cls)}
        return cls(**{name: kind(getattr(decoder, name) or kind()) for name, kind in kinds.items()})

    def tell(self, decoder) -> None:
        """Tell it to a decoder (`av.VideoCodecContext`) that is not open yet."""
        for name, value in asdict(self).items():
            if value:
                setattr(decoder, name, value)


_ARROW = {str: pa.string(), int: pa.int32()}

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # name in the tar, without characters that WebDataset or a file system would interpret
        ("id", pa.string()),  # name in the data set
        ("ext", pa.string()),
        ("offset", pa.int64()),  # first byte of the video file in the tar
        ("size", pa.int64()),
        ("crc32c", pa.uint32()),  # of the whole stored file
        ("codec", pa.string()),
        ("width", pa.int32()),  # as displayed: after rotation, in square pixels
        ("height", pa.int32()),
        ("rotation", pa.int16()),  # degrees counter-clockwise to turn decoded frames by
        ("mirrored", pa.bool_()),  # whether they are mirrored left to right after that
        ("fps_num", pa.int32()),  # of the source
        ("fps_den", pa.int32()),
        ("source_frames", pa.int32()),
        ("duration", pa.float64()),  # seconds from 0 to the end of the source's last frame
        ("extradata", pa.binary()),  # codec configuration, so that packets can be decoded without opening the container
        ("coding", pa.struct([(f.name, _ARROW[Coding.__annotations__[f.name]]) for f in fields(Coding)])),
        # of a video that was cut: seconds of the clip, from 0 to its duration; else as the annotations say
        ("captions", pa.list_(pa.struct([("text", pa.string()), ("start", pa.float64()), ("end", pa.float64())]))),
        *((name, pa.list_(kind)) for name, (kind, _) in FRAME_COLUMNS.items()),
    ]
)


def difference(schema: pa.Schema) -> str | None:
    """How the schema of a file differs from that of a sample table; None if it does not."""
    types = {field.name: field.type for field in schema}
    if odd := sorted(map(repr, types.keys() - set(SCHEMA.names))):
        return f"it has a column {odd[0]}"
    for field in SCHEMA:
        if field.name not in types:
            return f"it has no column {field.name!r}"
        if not _alike(types[field.name], field.type):
            return f"its column {field.name!r} holds {types[field.name]}, not {field.type}"
    if missing := [key for key in (REJECTS, JSON_CRCS) if key not in (schema.metadata or {})]:
        return f"it has no {missing[0].decode()}"
    return None


def _alike(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether the types are the same; what is in a list may go by any name, which Parquet decides."""
    if pa.types.is_list(one) and pa.types.is_list(other):
        return _alike(one.value_type, other.value_type)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = [[kind.field(i) for i in range(kind.num_fields)] for kind in (one, other)]
        same = [field.name for field in fields[0]] == [field.name for field in fields[1]]
        return same and all(_alike(a.type, b.type) for a, b in zip(*fields, strict=True))
    return one == other


COUNTED = -2  # offset of frames that are counted


@dataclass(frozen=True)
class FrameTable:
    """The stored frames of a video, in display order. Every array has shape [stored frames]."""

    number: np.ndarray  # int32
    time: np.ndarray  # float64, seconds
    offset: np.ndarray  # int64, into the stored file
    size: np.ndarray  # int32, bytes
    key: np.ndarray  # bool
    crc32c: np.ndarray  # uint32

    def __len__(self) -> int:
        return len(self.number)

    @property
    def sliceable(self) -> bool:
        """Whether each frame is one packet whose bytes stand at `offset` in the file."""
        return len(self.offset) > 0 and bool(self.offset[0] >= 0)

    @property
    def counted(self) -> bool:
        """Whether frames are to be counted as they come out of the decoder, since the file's stamps tell another order."""
        return len(self.offset) > 0 and bool(self.offset[0] == COUNTED)


@dataclass(frozen=True)
class Video:
    """A row of the sample table."""

    index: int  # position in the split
    shard: str
    key: str
    id: str
    ext: str
    offset: int
    size: int
    crc32c: int
    codec: str
    width: int
    height: int
    rotation: int
    fps: Fraction
    source_frames: int
    duration: float
    extradata: bytes
    frames: FrameTable
    mirrored: bool = False
    coding: Coding | None = None  # None: nothing but the extradata is known, or needed

    @property
    def inside(self) -> tuple[int, int]:
        """Positions [low, high) of the frames that are shown. Those around them are stored because others refer to them."""
        low, high = np.searchsorted(self.frames.number, [0, self.source_frames])
        return int(low), int(high)

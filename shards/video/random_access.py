"""Single frames out of a stored video: by its frame table, decoding no more than they need.

This is how a stored video is decoded, by whoever reads it: the loader, `verify`, `preview`, `frames`, and the packer before
it commits a video. What the container told the decoder stands in the row of the sample table.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Protocol

import av
import numpy as np
from crc32c import crc32c

from shards import VideoError, first_few
from shards.schema import Coding, FrameTable, Video
from shards.video.by_stamps import StampPass
from shards.video.frame_pass import Unpredictable, WholeDecoder
from shards.video.picture import Shape, short, upright
from shards.video.probe import open_video

_DECODERS = {"av1": "libdav1d"}  # libav's own "av1" decodes on a GPU only; files opened by libav get this one
_SKIPPING = ("h264", "hevc", "vp9", "vp8", "mpeg4", "mpeg2video", "mpeg1video")  # tell which frames no other refers to


class StoredVideo(Protocol):
    """What decoding needs to know of a stored video: columns of its row in the sample table."""

    @property
    def codec(self) -> str: ...  # noqa: D102 see shards.schema.SCHEMA
    @property
    def extradata(self) -> bytes: ...  # noqa: D102
    @property
    def coding(self) -> Coding | None: ...  # noqa: D102
    @property
    def frames(self) -> FrameTable: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def height(self) -> int: ...  # noqa: D102
    @property
    def rotation(self) -> int: ...  # noqa: D102
    @property
    def mirrored(self) -> bool: ...  # noqa: D102


class Picked(dict[int, np.ndarray]):
    """{position: uint8 RGB [H, W, 3]}. `decoded`: frames that came out of the decoder for them."""

    decoded = 0


def pick_frames(video: StoredVideo, read: Callable[[int, int], bytes], wanted: Iterable[int]) -> Picked:
    """The stored frames `wanted` (positions in the frame table) as a player shows them.

    No GOP is decoded that holds none of them; of the others in it only frames that some frame refers to, where the codec
    tells (H.264, HEVC). `read(offset, size)` returns bytes of the stored file; size -1 means to its end. Raises
    VideoError if a frame does not come out or its bytes have changed since packing.
    """
    out, shape = Picked(), shape_of_stored(video)
    for position, frame in decode_stored(video, read, wanted, out):
        out[position] = upright(frame, shape)
    return out


def checked(video: Video, read: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
    """`read` of a packed video, for `decode_stored`, which compares the crc32c of packets only: a file that is read as a whole is
    compared, too. What is returned raises VideoError if its bytes have changed since packing."""

    def checked_read(offset: int, size: int) -> bytes:
        data = read(offset, size)
        if size < 0 and crc32c(data) != video.crc32c:
            raise VideoError("crc32c of the file differs from the sample table: the shard is damaged")
        return data

    return checked_read


def shape_of_stored(video: StoredVideo) -> Shape:
    """How decoded frames become what a player shows."""
    return Shape(video.width, video.height, video.rotation % 360, video.mirrored)


def decode_stored(
    video: StoredVideo, read: Callable[[int, int], bytes], wanted: Iterable[int], count: Picked | None = None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(position, frame as decoded) of each of the stored frames `wanted`, once. As `pick_frames`; `count.decoded` grows."""
    count = Picked() if count is None else count
    left = set(map(int, wanted))
    if not left:
        return
    if video.frames.sliceable:
        for position, frame in _decode_packets(video, read, sorted(left), count):
            left.discard(position)
            yield position, frame
    # among them "keyframes" of intra refresh: a decoder that starts there shows nothing until the picture is whole
    if left:
        yield from _decode_container(video, read(0, -1), left, count)


def stored_decoder(video: StoredVideo) -> av.VideoCodecContext:
    """A decoder for packets of the stored video, told all that the container knew."""
    decoder = av.CodecContext.create(_DECODERS.get(video.codec, video.codec), "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.extradata = video.extradata or None
    decoder.thread_count = 1
    if video.coding is not None:
        video.coding.tell(decoder)
    return decoder


def packet_of(data: bytes, position: int, key: bool) -> av.Packet:
    """A packet whose stamp is the frame's position, which is carried through reordering."""
    packet = av.Packet(len(data))  # av.Packet(data) lacks the zeros after it that libav's decoders read
    packet.update(data)
    packet.pts = position
    packet.is_keyframe = key
    return packet


def _decode_packets(
    video: StoredVideo, read: Callable[[int, int], bytes], wanted: Sequence[int], count: Picked
) -> Iterator[tuple[int, av.VideoFrame]]:
    frames = video.frames
    decode_order = np.argsort(frames.offset, kind="stable")
    place = np.empty_like(decode_order)
    place[decode_order] = np.arange(len(decode_order))
    decoder, skips = stored_decoder(video), video.codec in _SKIPPING

    def kept(pictures: list[av.VideoFrame], group: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        count.decoded += len(pictures)
        return ((int(picture.pts), picture) for picture in pictures if picture.pts in group)

    try:
        for first, last, group in _gops(frames, place, wanted):
            for packet in _packets(frames, decode_order[first : last + 1], read):
                if skips:
                    decoder.skip_frame = "DEFAULT" if packet.pts in group else "NONREF"
                yield from kept(decoder.decode(packet), group)
            yield from kept(decoder.decode(None), group)
            decoder.flush_buffers()
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"stored frames {_some(wanted)} do not decode ({short(error)})") from error


def _gops(frames: FrameTable, place: np.ndarray, wanted: Sequence[int]) -> Iterator[tuple[int, int, set[int]]]:
    """Group wanted frames by the keyframe to start from: (first, last) places in decode order, and the frames."""
    # A frame shown before a keyframe may refer to the GOP before it (open GOP): start at a keyframe shown no later.
    keys = np.flatnonzero(frames.key)
    groups: dict[int, set[int]] = {}
    for w in wanted:
        if w >= len(frames):
            raise VideoError(f"there is no stored frame {w}: the video has {len(frames)}")
        usable = keys[(keys <= w) & (place[keys] <= place[w])]
        if len(usable) == 0:
            raise VideoError(f"no keyframe at or before stored frame {w}")
        groups.setdefault(int(place[usable].max()), set()).add(w)
    for first, group in sorted(groups.items()):
        yield first, int(max(place[w] for w in group)), group


def _packets(frames: FrameTable, positions: np.ndarray, read: Callable[[int, int], bytes]) -> Iterator[av.Packet]:
    start = int(frames.offset[positions[0]])
    stop = int(frames.offset[positions[-1]] + frames.size[positions[-1]])
    data = read(start, stop - start)
    for position in positions:
        at = int(frames.offset[position]) - start
        piece = data[at : at + int(frames.size[position])]
        if crc32c(piece) != frames.crc32c[position]:
            raise VideoError(f"crc32c of stored frame {position} differs from the sample table: the shard is damaged")
        yield packet_of(piece, int(position), bool(frames.key[position]))


def _decode_container(
    video: StoredVideo, data: bytes, wanted: set[int], count: Picked
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Through the container, from its beginning. The frames are counted as packing counted them: by their stamps if that is
    what made the table, else as they come."""
    left, first = set(wanted), 0
    try:
        with StampPass(io.BytesIO(data)) as video_pass:
            places = _positions(video_pass, video)
            first = int(places[0])
            for shown in video_pass.frames(lambda number: int(places[number]) in left):
                count.decoded += 1
                position = int(places[shown.number])
                left.discard(position)
                yield position, shown.frame
                if not left:
                    return
    except (
        Unpredictable,
        VideoError,
    ):  # the table was made another way: as packing did then, frames are taken as they come
        pass
    container, stream = open_video(io.BytesIO(data))
    with container:
        decoder = WholeDecoder(container, stream)
        frames = (frame for packet in container.demux(stream) for frame in decoder(packet))
        try:
            for position, frame in enumerate(frames, first):
                count.decoded += 1
                if position in left:
                    left.discard(position)
                    yield position, frame
                if not left:
                    return
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"stored frames {_some(sorted(left))} do not decode ({short(error)})") from error
    raise VideoError(f"stored frames {_some(sorted(left))} did not come out of the decoder")


def goes_by_stamps(video: StoredVideo, file: BinaryIO) -> bool:
    """Whether frames of this file, which cannot be sliced, are found by their stamps if its table does not say `counted`."""
    try:
        with StampPass(file) as video_pass:
            _positions(video_pass, video)
    except (Unpredictable, VideoError):
        return False
    return True


def _positions(video_pass: StampPass, video: StoredVideo) -> np.ndarray:
    """int64 [frames shown]: their positions in the frame table, which lists those that an edit list hides, too. Raises
    Unpredictable if the table was made another way than by the packets' stamps."""
    packets, times, table = video_pass.packets, video_pass.timeline.times, video.frames
    if table.counted:
        raise Unpredictable("the table counts frames")
    places = np.arange(len(times))
    if len(packets) == len(table):
        order = np.argsort(np.asarray(packets.pts), kind="stable")
        places = np.flatnonzero(np.asarray(packets.discard)[order] == 0)
    if len(places) != len(times) or len(times) > len(table):
        raise Unpredictable("the table lists other frames")
    # stamps that never go back may be those of decoding, also where all are a few frames later than they should be (ASF)
    if video_pass.context.has_b_frames and not table.sliceable and (np.diff(packets.pts) > 0).all():
        raise Unpredictable("its stamps may be those of decoding")
    listed = table.time[places]
    if np.abs((times - times[0]) - (listed - listed[0])).max() > 2e-3:
        raise Unpredictable("the table has other times")
    return places


def _some(positions: Sequence[int]) -> str:
    return first_few(map(str, positions), 5) + f" ({len(positions)})" * (len(positions) > 5)

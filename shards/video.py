"""Encoded video and frames, through PyAV: what a file holds, its intra-only copy, and picking single frames out of it."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from crc32c import crc32c
from PIL import Image

from shards.schema import FrameTable

av.logging.set_level(av.logging.PANIC)  # libav's own lines say nothing that our errors do not

_DECODERS = {"av1": "libdav1d"}  # libav's own "av1" decodes on a GPU only; files opened by libav get this one


class VideoError(ValueError):
    """A video that cannot be used, and why."""


@dataclass(frozen=True)
class Source:
    """What a video file holds. Times are seconds, `frame_times` has shape [frames] and starts near 0."""

    codec: str
    width: int
    height: int
    rotation: int
    fps: Fraction
    duration: float
    extradata: bytes
    frames: FrameTable


def open_video(data: bytes) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open an encoded file held in memory. Raises VideoError if it is no video file or has no video stream."""
    if not data:
        raise VideoError("the file is empty (0 bytes)")
    try:
        container = av.open(io.BytesIO(data), metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"not a readable video file ({_short(error)})") from error
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition).lower()]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["none"]
        container.close()
        raise VideoError(f"no video stream in the file (streams: {', '.join(kinds)})")
    stream = streams[0]
    if stream.codec_context is None:
        container.close()
        raise VideoError("no decoder for its video stream")
    stream.codec_context.thread_count = 1  # the packer runs one process a core
    return container, stream


def scan(data: bytes, on_frame: Callable[[int, float, av.VideoFrame, Fraction], None] | None = None) -> Source:
    """Decode the whole file once and describe it; `on_frame(number, seconds, frame, fps)` sees each frame as it comes.

    Raises VideoError at the first frame that does not decode, and where the file ends before its header says.
    """
    container, stream = open_video(data)
    packets: list[tuple[int | None, int, int, bool]] = []  # pts, offset in the file, size, keyframe; in decode order
    times: list[float] = []
    stamps: list[int | None] = []
    rotation = width = height = 0
    fps = stream.average_rate or stream.guessed_rate or stream.base_rate
    try:
        if not fps or fps <= 0:
            raise VideoError("the file states no frame rate")
        for packet in container.demux(stream):
            if packet.size:
                packets.append(_locate(data, packet))
                if packet.is_corrupt:
                    raise VideoError(f"packet {len(packets) - 1} is damaged")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(f"frame {len(times)} is damaged")
                if not times:
                    width, height, rotation = frame.width, frame.height, frame.rotation
                stamps.append(frame.pts)
                timed = frame.pts is not None and stamps[0] is not None
                time = float((frame.pts - stamps[0]) * frame.time_base if timed else len(times) / fps)
                if on_frame is not None:
                    on_frame(len(times), time, frame, fps)
                times.append(time)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"decoding fails after frame {len(times)} ({_short(error)})") from error
    finally:
        known = stream.frames
        codec, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
        duration = float(stream.duration * stream.time_base) if stream.duration else len(times) / float(fps)
        container.close()
    if not times:
        raise VideoError("not one frame decodes")
    if len(packets) < known:
        raise VideoError(f"the file is cut short: its header promises {known} frames, {len(packets)} are there")
    turned = rotation % 180 != 0
    return Source(
        codec=av.Codec(codec, "r").canonical_name,
        width=height if turned else width,
        height=width if turned else height,
        rotation=rotation,
        fps=Fraction(fps).limit_denominator(100_000),
        duration=duration,
        extradata=bytes(extradata),
        frames=_frame_table(data, packets, stamps, times),
    )


def _locate(data: bytes, packet: av.Packet) -> tuple[int | None, int, int, bool]:
    """A packet's stamp, the offset of its bytes in the file (-1 if they do not stand there in one piece), size, keyframe.

    MP4 states that offset; Matroska states where the block begins, a few bytes before; MPEG-TS cuts packets up.
    """
    pos = -1 if packet.pos is None else packet.pos
    offset = data.find(bytes(packet), pos, pos + packet.size + 64) if pos >= 0 else -1
    return packet.pts, offset, packet.size, packet.is_keyframe


def _frame_table(data: bytes, packets: list, stamps: list, times: list[float]) -> FrameTable:
    """Join frames and packets by presentation stamp. Where that is not one to one, or packets are not in the file in
    decode order and one piece, offsets are -1 and readers decode through the container instead."""
    by_stamp = {pts: rest for pts, *rest in packets}
    offsets = [offset for _, offset, _, _ in packets]
    if (
        len(packets) == len(times) == len(by_stamp)
        and None not in by_stamp
        and set(stamps) == set(by_stamp)
        and offsets[0] >= 0
        and all(a < b for a, b in itertools.pairwise(offsets))
    ):
        rows = [by_stamp[pts] for pts in stamps]
    else:
        rows = [(-1, -1, i == 0) for i in range(len(times))]
    return FrameTable(
        number=np.arange(len(times), dtype=np.int32),
        time=np.asarray(times, np.float64),
        offset=np.asarray([r[0] for r in rows], np.int64),
        size=np.asarray([r[1] for r in rows], np.int32),
        key=np.asarray([r[2] for r in rows], bool),
        crc32c=np.asarray([crc32c(data[o : o + s]) if o >= 0 else 0 for o, s, _ in rows], np.uint32),
    )


def grid(number: int, fps: Fraction, rate: int) -> bool:
    """Whether frame `number` is on the official extractor's grid at `rate` frames a second.

    Second s starts at frame s*int(fps); in it, frames k*max(1, int(fps)//rate) for k < rate are taken
    (CLIP4Clip `RawVideoExtractorCV2`, with the frame rate truncated as there).
    """
    whole = max(1, int(fps))
    step = max(1, whole // rate)
    inside = number % whole
    return inside % step == 0 and inside // step < rate


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the short side at `short_side` and the long side as PIL/torchvision's Resize rounds it."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def to_intra(
    data: bytes, *, rate: int, short_side: int, quality: int, chroma: int = 420
) -> tuple[Source, bytes, FrameTable]:
    """Decode `data` and store the frames of the extractor's grid as independent JPEGs in an MJPEG mp4.

    `quality` is MJPEG's quantiser scale, 1 (best) to 31. `chroma` 420 scales planes as they are (fast); 444 scales RGB
    as PIL does and keeps full colour resolution (exact). Returns the source, the new file, and its frame table, whose
    `number` and `time` speak of the source video.
    """
    out = io.BytesIO()
    kept: list[tuple[int, float]] = []
    mux: dict = {}

    def keep(number: int, time: float, frame: av.VideoFrame, fps: Fraction) -> None:
        if not grid(number, fps, rate):
            return
        if not mux:
            _open_muxer(mux, out, frame, rate, short_side, quality, chroma)
        stream = mux["stream"]
        if chroma == 444:
            picture = Image.fromarray(upright(frame)).resize((stream.width, stream.height), Image.Resampling.BICUBIC)
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        elif frame.rotation:
            frame = av.VideoFrame.from_ndarray(upright(frame), format="rgb24")
        jpeg = frame.reformat(
            stream.width, stream.height, f"yuvj{chroma}p", interpolation=Interpolation.BICUBIC,
            dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG,
        )  # fmt: skip
        jpeg.pts, jpeg.time_base = len(kept), Fraction(1, rate)
        jpeg.pict_type = 0
        mux["container"].mux(stream.encode(jpeg))
        kept.append((number, time))

    try:
        source = scan(data, keep)
        mux["container"].mux(mux["stream"].encode(None))
    finally:
        if mux:
            mux["container"].close()
    video = out.getvalue()
    container, stream = open_video(video)
    with container:
        packets = [_locate(video, p) for p in container.demux(stream) if p.size]
    stored = _frame_table(video, packets, [p[0] for p in packets], [time for _, time in kept])
    if len(packets) != len(kept) or not stored.sliceable:
        raise VideoError(f"wrote {len(kept)} frames and found {len(packets)}: this is a defect of the packer")
    numbers = np.asarray([number for number, _ in kept], np.int32)
    return source, video, FrameTable(numbers, stored.time, stored.offset, stored.size, stored.key, stored.crc32c)


def _open_muxer(
    mux: dict, out: io.BytesIO, frame: av.VideoFrame, rate: int, short_side: int, quality: int, chroma: int
) -> None:
    width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
    # bitexact: no library version in the file, so that equal input gives equal bytes
    mux["container"] = av.open(out, "w", format="mp4", options={"fflags": "+bitexact"})
    stream = mux["stream"] = mux["container"].add_stream("mjpeg", rate=rate)
    stream.width, stream.height = scaled_size(width, height, short_side)
    stream.pix_fmt = f"yuvj{chroma}p"
    stream.codec_context.qmin = stream.codec_context.qmax = quality
    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= av.codec.context.Flags.bitexact


def upright(frame: av.VideoFrame, rotation: int | None = None) -> np.ndarray:
    """The frame as uint8 RGB [H, W, 3], turned the way a player would show it."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round((frame.rotation if rotation is None else rotation) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns))  # rows may come padded


def pick_frames(
    codec: str,
    extradata: bytes,
    frames: FrameTable,
    rotation: int,
    read: Callable[[int, int], bytes],
    wanted: Sequence[int],
) -> dict[int, np.ndarray]:
    """Decode the stored frames `wanted` (positions in the frame table) and no GOP that holds none of them.

    `read(offset, size)` returns bytes of the stored file. Returns {position: uint8 RGB [H, W, 3]}.
    Raises VideoError if a frame does not come out or its bytes have changed since packing.
    """
    if not frames.sliceable:
        return _pick_through_container(read(0, -1), rotation, wanted)
    decode_order = np.argsort(frames.offset, kind="stable")
    place = np.empty_like(decode_order)
    place[decode_order] = np.arange(len(decode_order))
    out: dict[int, np.ndarray] = {}
    decoder = av.CodecContext.create(_DECODERS.get(codec, codec), "r")
    decoder.extradata = extradata or None
    decoder.thread_count = 1
    try:
        for first, last, group in _gops(frames, place, wanted):
            for packet in _packets(frames, decode_order[first : last + 1], read):
                _collect(out, decoder.decode(packet), group, rotation)
            _collect(out, decoder.decode(None), group, rotation)
            decoder.flush_buffers()
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"stored frames {list(wanted)} do not decode ({_short(error)})") from error
    missing = sorted(set(map(int, wanted)) - set(out))
    if missing:  # "keyframes" of intra refresh: a decoder that starts there shows nothing until the picture is whole
        out |= _pick_through_container(read(0, -1), rotation, missing)
    return out


def _gops(frames: FrameTable, place: np.ndarray, wanted: Sequence[int]) -> Iterator[tuple[int, int, set[int]]]:
    """Group wanted frames by the keyframe to start from: (first, last) places in decode order, and the frames."""
    # A frame shown before a keyframe may refer to the GOP before it (open GOP): start at a keyframe shown no later.
    keys = np.flatnonzero(frames.key)
    groups: dict[int, set[int]] = {}
    for w in sorted(set(map(int, wanted))):
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
        packet = av.Packet(len(piece))  # av.Packet(piece) lacks the zeros after it that libav's decoders read
        packet.update(piece)
        packet.pts = int(position)  # carried through reordering, so a decoded frame says which one it is
        yield packet


def _collect(out: dict[int, np.ndarray], frames: list[av.VideoFrame], group: set[int], rotation: int) -> None:
    for frame in frames:
        if frame.pts in group:
            out[int(frame.pts)] = upright(frame, rotation)


def _pick_through_container(data: bytes, rotation: int, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    group, last = set(map(int, wanted)), max(map(int, wanted))
    out: dict[int, np.ndarray] = {}
    container, stream = open_video(data)
    with container:
        for number, frame in enumerate(container.decode(stream)):
            if number in group:
                out[number] = upright(frame, rotation)
            if number >= last:
                return out
    raise VideoError(f"stored frames {sorted(group - set(out))} did not come out of the decoder")


def _short(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0][:160]

"""Picking single frames out of a stored video by its frame table, decoding no more than they need."""

import io
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
from crc32c import crc32c

from shards.decode import open_video
from shards.frames import VideoError, short, upright
from shards.schema import FrameTable

_DECODERS = {"av1": "libdav1d"}  # libav's own "av1" decodes on a GPU only; files opened by libav get this one


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
        raise VideoError(f"stored frames {list(wanted)} do not decode ({short(error)})") from error
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
    container, stream = open_video(io.BytesIO(data))
    with container:
        for number, frame in enumerate(container.decode(stream)):
            if number in group:
                out[number] = upright(frame, rotation)
            if number >= last:
                return out
    raise VideoError(f"stored frames {sorted(group - set(out))} did not come out of the decoder")

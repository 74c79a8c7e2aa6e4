"""What a video file holds: its codec, size and times, and where in the file the bytes of each frame are."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from crc32c import crc32c

from shards import memory
from shards.schema import COUNTED, Coding, FrameTable
from shards.video.by_stamps import StampPass
from shards.video.cropping import cropping_note
from shards.video.damage import decode_checked
from shards.video.decode import WAYS
from shards.video.frame_pass import Pass, Unpredictable, resized_note
from shards.video.picture import Shape, upright
from shards.video.probe import Packets
from shards.video.random_access import goes_by_stamps, packet_of, stored_decoder

_HEADER = 64  # bytes that may stand between where a container says a packet is and where its data begins
# decoders that need nothing of the container but the extradata, as every player relies on
_USUAL = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg"}
_SURE = {"h264", "hevc"}  # their decoders show nothing before a keyframe


@dataclass(frozen=True)
class SourceVideo:
    """What a video file holds, or a cut of it: `times` are those of the frames of the cut (see Timeline), and `frames`
    the table of what is in the file. Width and height are as displayed, `duration` is in seconds; `rotation` and
    `mirrored` say what is to be done to decoded frames (see Shape). `notes` are for people."""

    codec: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    fps: Fraction
    duration: float
    drift: float  # seconds between a frame's time and where counting frames puts it, at most
    times: np.ndarray
    extradata: bytes
    coding: Coding
    frames: FrameTable
    notes: tuple[str, ...] = ()


def scan(file: BinaryIO | bytes) -> SourceVideo:
    """Decode the whole file once and describe it, with the place of every frame's bytes.

    Packets are decoded as readers of the shard will do it; where that shows other pictures than the container does, or not
    all, the table says that they cannot be sliced. Raises VideoError at the first frame that does not decode, and where
    the file ends before its header says.
    """
    file = as_file(file)
    for name, way in WAYS.items():
        if name == "stamps":  # all of it is to be decoded
            continue
        try:
            with way(file, on_packet=lambda packets, packet: packets.add(packet, crc32c(packet))) as video_pass:
                if isinstance(video_pass, StampPass):
                    return _sliced(file, video_pass)
                for _ in video_pass.frames():
                    if name == "decoding":  # once has been enough; this tells the shape
                        break
                source = describe(video_pass, unsliced(video_pass.timeline.times))
            return _counted(file, source) if video_pass.jumbled else source
        except Unpredictable:
            continue
    raise AssertionError("decoding decides")


def as_file(file: BinaryIO | bytes) -> BinaryIO:
    """A seekable file of what may be bytes."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def describe(done: Pass, frames: FrameTable) -> SourceVideo:
    """What a pass has seen of its file, once a frame has been decoded."""
    shape, when = done.shape or Shape(0, 0), done.timeline
    return SourceVideo(
        codec=av.Codec(done.context.name, "r").canonical_name,
        width=shape.width,
        height=shape.height,
        rotation=shape.rotation,
        mirrored=shape.mirrored,
        fps=when.fps,
        duration=when.duration,
        drift=when.drift,
        times=when.times,
        extradata=bytes(done.context.extradata or b""),
        coding=Coding.of(done.context),
        frames=frames,
        notes=(*done.notes, *cropping_note(done.container, done.stream)),
    )


def unsliced(times) -> FrameTable:
    """The frame table of frames whose bytes are not looked for: readers decode through the container."""
    count = len(times)
    nowhere, none = np.full(count, -1), np.zeros(count)
    return FrameTable(
        number=np.arange(count, dtype=np.int32),
        time=np.asarray(times, np.float64),
        offset=nowhere.astype(np.int64),
        size=nowhere.astype(np.int32),
        key=np.arange(count) == 0,
        crc32c=none.astype(np.uint32),
    )


def _counted(file: BinaryIO, source: SourceVideo) -> SourceVideo:
    """The same, its table marked if readers would go by its jumbled stamps."""
    if not goes_by_stamps(source, file):
        return source
    return replace(source, frames=replace(source.frames, offset=np.full_like(source.frames.offset, COUNTED)))


def _sliced(file: BinaryIO, video_pass: StampPass) -> SourceVideo:
    """What is in a file whose packets can be decoded out of their place. Raises Unpredictable if they cannot."""
    codec = av.Codec(video_pass.context.name, "r").canonical_name
    usual, expected = codec in _USUAL, []
    if usual and video_pass.told_beside:  # what is not usual is compared
        raise Unpredictable("what its decoder has to know stands beside its packets")
    for shown in video_pass.frames():
        if usual:  # the first tells the shape
            break
        expected.append(crc32c(upright(shown.frame).data))
    offsets = _locate(file, video_pass.packets)
    if offsets is None:
        raise Unpredictable("the packets do not stand in the file in one piece")
    source = describe(video_pass, _frame_table(video_pass, offsets))
    sure = codec in _SURE or video_pass.context.codec.intra_only
    try:
        crcs: dict[int, int] = {}
        sizes: dict[tuple[int, int], int] = {}
        for i, frame in _decoded_alone(file, source):
            crcs[i] = 0 if usual and sure else crc32c(upright(frame).data)
            sizes.setdefault((frame.width, frame.height), i)
        if len(crcs) != len(source.times) or (not usual and list(crcs.values()) != expected):
            raise Unpredictable("packets alone give other pictures than the container")
        if len(sizes) > 1:
            source = replace(
                source,
                notes=(
                    *source.notes,
                    resized_note(float(source.frames.time[list(sizes.values())[1]])),
                ),
            )
        return source if sure else replace(source, frames=_with_true_keys(file, source, crcs))
    except (av.FFmpegError, ValueError) as error:
        memory.refuse_short(error)
        raise Unpredictable(str(error)) from error


def _with_true_keys(file: BinaryIO, source: SourceVideo, crcs: dict[int, int]) -> FrameTable:
    """The frame table with those keyframes only at which a decoder shows the right picture when it begins there. `crcs`:
    {position: crc32c of the picture}. Some containers mark every frame of an old codec, or the wrong ones."""
    frames, key = source.frames, source.frames.key.copy()
    first = int(np.argmin(frames.offset))
    for position in np.flatnonzero(key).tolist():
        if position != first and position in crcs:
            key[position] = _begins_right(file, source, position, crcs[position])
    return replace(frames, key=key)


def _begins_right(file: BinaryIO, source: SourceVideo, position: int, crc: int) -> bool:
    decoder = stored_decoder(source)
    try:
        pictures = decoder.decode(_stored_packet(file, source.frames, position)) + decoder.decode(None)
    except (av.FFmpegError, ValueError) as error:
        memory.refuse_short(error)
        return False
    return [(p.pts, crc32c(upright(p).data)) for p in pictures] == [(position, crc)]


def _decoded_alone(file: BinaryIO, source: SourceVideo) -> Iterator[tuple[int, av.VideoFrame]]:
    """(position, frame) of the frames that are shown, decoded from their packets without the container."""
    frames, last = source.frames, -1
    decoder = stored_decoder(source)
    for position in [*np.argsort(frames.offset).tolist(), None]:
        for frame in decode_checked(decoder, None if position is None else _stored_packet(file, frames, position)):
            if frame.pts is None or frame.pts <= last or frame.is_corrupt:
                raise Unpredictable("frames do not come as their packets promise")
            last = frame.pts
            if 0 <= frames.number[last] < len(source.times):
                yield int(last), frame


def _stored_packet(file: BinaryIO, frames: FrameTable, position: int) -> av.Packet:
    file.seek(int(frames.offset[position]))
    return packet_of(file.read(int(frames.size[position])), position, bool(frames.key[position]))


def _frame_table(video_pass: StampPass, offsets: np.ndarray) -> FrameTable:
    """All packets in display order; those that are not shown have numbers outside [0, frames)."""
    packets = video_pass.packets
    rows = np.argsort(np.asarray(packets.pts), kind="stable")  # frame -> packet
    ranks = video_pass.ranks[rows]
    first = int(np.flatnonzero(ranks >= 0)[0])
    if (np.diff(np.flatnonzero(ranks >= 0)) != 1).any():
        raise Unpredictable("frames between others are not shown")
    number = np.arange(len(rows), dtype=np.int32) - first
    return FrameTable(
        number=number,
        time=video_pass.seconds(np.asarray(packets.pts)[rows]),
        offset=offsets[rows],
        size=np.asarray(packets.size, np.int32)[rows],
        key=np.asarray(packets.key, bool)[rows],
        crc32c=np.asarray(packets.crc, np.uint32)[rows],
    )


def _locate(file: BinaryIO, packets: Packets) -> np.ndarray | None:
    """Offsets of the packets' bytes, int64 [packets]; None if they do not stand in the file in order and one piece.

    MP4 states the offset; Matroska states where the block begins, a few bytes before; MPEG-TS cuts packets up.
    Whoever reads the file goes on elsewhere afterwards.
    """
    offsets, shift, last = np.empty(len(packets), np.int64), 0, -1
    for i in range(len(packets)):
        place, size, crc = packets.place[i], packets.size[i], packets.crc[i]
        if place < 0:
            return None
        file.seek(place)
        window = memoryview(file.read(size + _HEADER))
        for guess in (shift, *range(min(_HEADER, len(window) - size) + 1)):
            if crc32c(window[guess : guess + size]) == crc:
                shift = guess
                break
        else:
            return None
        offsets[i] = place + shift
        if offsets[i] <= last:
            return None
        last = offsets[i]
    return offsets

"""Whether all of a file is there: what its container promises, what stands in it, and what libav met while reading it."""

import re
import struct
from collections.abc import Sequence
from typing import BinaryIO

import av

from shards import VideoError
from shards.video import gif
from shards.video.probe import Packets

# What libav says where it passes over bytes, by container. None of it is said of whole files, as other lines are.
_PASSED_OVER = {
    "matroska": r"first byte of an EBML number|by an EBML number's first byte|Unknown-sized element|exceeds containing master",
    "flv": "Packet mismatch",
    "asf": r"bad header|skip 0 \(unknown|packet_(obj|frag|replic)_size",
    "mpegts": "max resync size reached",
    "ogg": "CRC mismatch",
}
# What decoders say, by codec, of a picture that they give all the same, and do not mark as damaged
_CONCEALED = {"ffv1": "CRC mismatch", "mjpeg": r"^(error (y|dc|count)|overread)\b"}
_PLACE = re.compile(r"\bat (?:pos )?(0x[0-9a-f]+|\d+)")
_HEADER = 12  # bytes of an IVF frame's header, which a packet's size does not count; a Y4M's is counted
_SHARE = 0.1  # of a file's bytes, at its beginning or end, in which streams that go together have packets
_NOTHING = 256  # bytes that may follow the end of a recording and hold no other
Line = tuple[int, str, str]  # of libav's log: level, who says it, text


def decode_checked(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """The frames that come out for a packet. Raises VideoError if the decoder says that it is damaged."""
    said = _CONCEALED.get(context.codec.canonical_name)
    if said is None:
        return context.decode(packet)
    with av.logging.Capture() as lines:
        frames = context.decode(packet)
    for _, name, text in lines:
        if name == context.name and re.search(said, text):
            raise VideoError(f"a picture is damaged ({text.strip()[:100]})")
    return frames


def refuse_passed_over(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: Packets,
    lines: Sequence[Line],
    at_end: bool,
) -> None:
    """Raise VideoError if libav passed over bytes between the packets, or behind them where more was promised.

    `lines` are what it said while it read them, and `at_end` is whether it read to the end of the file."""
    kind = container.format.name.split(",")[0]
    for _, name, text in lines:
        if name != container.format.name or kind not in _PASSED_OVER or not re.search(_PASSED_OVER[kind], text):
            continue
        at = int(place[1], 0) if kind == "matroska" and (place := _PLACE.search(text)) else 0  # 0: within a packet
        if at and packets:  # not all that stands in the file is video
            behind = at > max(packets.place)
            if at < packets.place[0] or (behind and not (at_end and _falls_short(container, stream, packets))):
                continue
        raise VideoError(f"the file is damaged: part of it cannot be read ({text.strip()[:100]})")
    if kind == "avi" and not at_end and packets and _left_index(stream, packets):
        raise VideoError("the file is damaged: its frames do not stand where its index says")


def may_restart(file: BinaryIO, container: av.container.InputContainer) -> bool:
    """Whether time stamps may start anew within the file, as where recordings were joined: to seek would pass that over.

    An mp4, an AVI and an ASF have one clock; so has a Matroska file whose one Segment fills it.
    """
    kind = container.format.name.split(",")[0]
    if kind != "matroska":
        return kind not in ("mov", "avi", "asf")
    before = file.tell()
    size = file.seek(0, 2)
    end = _segment_end(file)
    file.seek(before)  # libav goes on reading there
    return not end or size - end > _NOTHING


def _left_index(stream: av.VideoStream, packets: Packets) -> bool:
    """Whether chunks were passed over before the last packet of an AVI, so that it passes for an earlier one."""
    off = set()
    for dts, place in ((packets.dts[0], packets.place[0]), (packets.dts[-1], packets.place[-1])):
        found = stream.index_entries.search_timestamp(dts, any_frame=True)
        if found < 0 or stream.index_entries[found].timestamp != dts:
            return False
        off.add(place - stream.index_entries[found].pos)
    return len(off) > 1


def _falls_short(container: av.container.InputContainer, stream: av.VideoStream, packets: Packets) -> bool:
    """Whether the packets of a Matroska file end before its header says, or it does not say."""
    promised, end = _promised_and_there(container, stream, packets)
    return not promised or end < promised - max(0.5, 0.01 * promised)


def _promised_and_there(
    container: av.container.InputContainer, stream: av.VideoStream, packets: Packets
) -> tuple[float, float]:
    """Seconds of a Matroska file by its header (0: not known), and by its packets."""
    end = (max(packets.pts) + packets.duration[-1]) * float(stream.time_base or 0)
    return float(container.duration or 0) / 1e6, end


def refuse_cut_short(
    file: BinaryIO, container: av.container.InputContainer, stream: av.VideoStream, packets: Packets
) -> None:
    """Raise VideoError if the file ends before what it says it holds. Its bytes must prove it: a count alone may be wrong."""
    before = file.tell()
    try:
        _refuse_cut_short(file, container, stream, packets)
    finally:
        file.seek(before)  # libav goes on reading there


def _refuse_cut_short(
    file: BinaryIO, container: av.container.InputContainer, stream: av.VideoStream, packets: Packets
) -> None:
    file.seek(0, 2)
    size, kind = file.tell(), container.format.name.split(",")[0]
    if kind == "mov":
        entries = stream.index_entries
        present = sum(entry.pos + entry.size <= size for entry in entries)
        if present < len(entries):
            _cut_short(len(entries), present)
        if _fragment_end(file) > size:
            raise VideoError("the file is cut short: its last fragment promises more bytes than the file has")
    elif kind == "flv" and _flv_end(file, size) > size:
        raise VideoError("the file is cut short: it ends inside a tag")
    elif kind == "asf" and (promised := _asf_size(file)) > size:
        raise VideoError(f"the file is cut short: its header promises {promised} bytes, {size} are there")
    elif kind == "gif" and not _ends_with(file, size, b";"):
        raise VideoError("the file is cut short: the end mark of a GIF is missing")
    elif kind == "gif" and (at := gif.hole(file)):
        raise VideoError(f"the file is damaged: no block of a GIF begins at byte {at}")
    elif kind == "avi" and packets:
        chunks = max(packets.dts) + 1  # of the video, empty ones among them
        if chunks < stream.frames and _riff_end(file) > size + 1:
            _cut_short(stream.frames, chunks)
        if chunks < max(stream.frames, len(stream.index_entries)) and (hole := _hole_in_riff(file, size)):
            raise VideoError(
                f"the file is damaged: it promises {max(stream.frames, len(stream.index_entries))} frames, "
                f"{chunks} are there, and no chunk begins at byte {hole}"
            )
    elif kind in ("yuv4mpegpipe", "ivf") and packets:
        behind = size - max(map(sum, zip(packets.place, packets.size, strict=True)))
        if behind > _HEADER:
            raise VideoError(f"the file is damaged or cut short: the last {behind} bytes hold no whole frame")
    elif kind == "ogg" and _ogg_end(file, size) > size:
        raise VideoError("the file is cut short: it ends inside a page")
    elif kind == "matroska" and packets and _segment_end(file) > size and _falls_short(container, stream, packets):
        promised_s, end = _promised_and_there(container, stream, packets)
        raise VideoError(
            f"the file is cut short: its header promises {promised_s:.1f} s, {end:.1f} s are there"
            if promised_s else "the file is cut short: its header promises more bytes than the file has"
        )  # fmt: skip


def cut_short_note(
    file: BinaryIO, container: av.container.InputContainer, stream: av.VideoStream, packets: Packets
) -> tuple[str, ...]:
    """What is said of a Matroska file that ends early, though not so much that pictures are missing for certain: its header
    tells the seconds of what is longest, which may be the sound."""
    if container.format.name.split(",")[0] != "matroska" or not packets:
        return ()
    before = file.tell()
    size = file.seek(0, 2)
    end = _segment_end(file)
    file.seek(before)  # libav goes on reading there
    promised, there = _promised_and_there(container, stream, packets)
    missing = promised - there
    if end <= size or missing <= packets.duration[-1] * float(stream.time_base or 0) / 2:
        return ()
    return (f"its file ends before its header says: pictures of its last {missing:.2f} s may be missing",)


def is_part(file: BinaryIO, container: av.container.InputContainer, packets: Packets) -> bool:
    """Whether there are other video streams, and the packets of this one stand in a part of the file only."""
    if len(container.streams.video) < 2 or not packets:
        return False
    before = file.tell()
    size = file.seek(0, 2)
    file.seek(before)
    places = [place for place in packets.place if place >= 0] or [0]
    return min(places) > _SHARE * size or max(places) < (1 - _SHARE) * size


def _cut_short(promised: int, present: int) -> None:
    raise VideoError(f"the file is cut short: its header promises {promised} frames, {present} are there")


def _riff_end(file: BinaryIO) -> int:
    """Where the RIFF chunk of an AVI ends; 0 if its writer left that open."""
    file.seek(0)
    head = file.read(8)
    size = struct.unpack("<I", head[4:])[0] if head[:4] == b"RIFF" and len(head) == 8 else 0
    return size + 8 if size not in (0, 0xFFFFFFFF) else 0


def _hole_in_riff(file: BinaryIO, size: int) -> int:
    """The first place in an AVI where a chunk should begin and none does; 0 if there is none."""
    at, end = 0, 0
    while at + 8 <= size:
        file.seek(at - 1 if at else 0)
        before = file.read(1) if at else b""
        head = file.read(8)
        if not _is_name(head[:4]) and end and _is_name(before + head[:3]):  # some writers do not pad odd chunks
            at, head = at - 1, before + head[:7]
        name, length = struct.unpack("<4sI", head)
        if end and at >= end and name != b"RIFF":  # whatever follows
            return 0
        if not _is_name(name):
            return at
        end = at + 8 + length if name == b"RIFF" else end
        at += 12 if name in (b"RIFF", b"LIST") else 8 + length + length % 2
    return 0


def _is_name(code: bytes) -> bool:
    """Whether these four bytes may be what a chunk or a box is called."""
    return all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in code)


def _ogg_end(file: BinaryIO, size: int) -> int:
    """Where the last page of an Ogg file ends (RFC 3533, 6); 0 if none begins near the end of the file."""
    start = max(0, size - (1 << 16) - 512)  # a page is no longer
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0 or len(tail) < at + 27:
        return 0 if at < 0 else size + 1
    segments = tail[at + 26]
    if len(tail) < at + 27 + segments:
        return size + 1
    return start + at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])


def _fragment_end(file: BinaryIO) -> int:
    """Where the last box of a fragmented mp4 ends (ISO 14496-12, 4.2 and 8.8); 0 for an mp4 without fragments. Raises
    VideoError where no box begins behind a fragment."""
    at, end, fragments, before = 0, 0, False, b""
    while True:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return end if fragments else 0
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if fragments and before != b"mfra" and (not _is_name(kind) or 0 < length < 8):
            raise VideoError(f"the file is damaged: no box begins at byte {at}, behind a fragment")
        if length < 8:  # 0: to the end of the file
            return end if fragments else 0
        fragments, before = fragments or kind == b"moof", kind
        at += length
        end = at if kind in (b"moof", b"mdat") else end


def _flv_end(file: BinaryIO, size: int) -> int:
    """Where the last tag of an FLV ends (Adobe FLV 10.1, E.3)."""
    file.seek(5)
    at = struct.unpack(">I", file.read(4).rjust(4, b"\0"))[0] + 4
    while at + 11 <= size:
        file.seek(at + 1)
        at += 15 + int.from_bytes(file.read(3), "big")
    return at - 4 if at - 4 <= size < at else at  # some writers leave out the last tag's size


def _asf_size(file: BinaryIO) -> int:
    """The size of the file that an ASF header states (ASF 3.2, file properties); 0 if it was broadcast."""
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if at < 0 or len(head) < at + 92 or head[at + 88] & 1:
        return 0
    return struct.unpack("<Q", head[at + 40 : at + 48])[0]


def _ends_with(file: BinaryIO, size: int, mark: bytes) -> bool:
    file.seek(max(0, size - 64))
    return file.read().rstrip(b"\0").endswith(mark)


def _segment_end(file: BinaryIO) -> int:
    """Where the Segment of a Matroska file ends; 0 if its writer left that open (RFC 8794, 4 to 6)."""
    file.seek(0)
    head, at = file.read(4096), 0
    while at + 12 <= len(head):
        length = 8 - head[at].bit_length() + 1  # of an element's ID, in bytes
        name, at = head[at : at + length], at + length
        width = 8 - head[at].bit_length() + 1 if head[at] else 9
        if width > 8 or length > 4:
            return 0
        value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        at += width
        if name == b"\x18\x53\x80\x67":
            return 0 if value == (1 << 7 * width) - 1 else at + value
        at += value
    return 0

"""Videos that change in the middle, and what packing says of them."""

from __future__ import annotations

import io

import av
import pytest

from shards.video.decode import WAYS
from tests.shards.video.stored import encoded, numbered, stored

EXACT = {"fps": 240, "quality": 1}
VP8 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}


def joined(parts: list[bytes], container: str, gap: int) -> bytes:
    """One stream of the packets of several files; `gap`: by how many ticks each is later than the one before."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        stream = None
        for number, part in enumerate(parts):
            with av.open(io.BytesIO(part)) as file:
                stream = stream or out.add_stream_from_template(file.streams.video[0])
                for packet in file.demux(video=0):
                    if packet.size and packet.pts is not None and packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + number * gap, packet.dts + number * gap
                        packet.stream = stream
                        out.mux(packet)
    return target.getvalue()


def turned() -> bytes:
    """A video of 20 frames in landscape and 20 upright."""
    parts = [encoded(numbered(20, size), "libvpx", "yuv420p", VP8, format="webm") for size in ((160, 120), (120, 160))]
    return joined(parts, "webm", 800)


@pytest.mark.parametrize("profile", [{"name": "copy"}, EXACT])
def test_pictures_that_change_size_are_noted(profile: dict) -> None:
    data = turned()
    what = stored(data, **profile)
    assert [note.split(":")[0] for note in what.source.notes] == ["its pictures change size or shape at 0.8 s"]
    assert len(what.frames) == 40
    assert not stored(data, **EXACT, start=0.0, end=0.6).source.notes
    assert not stored(data, **EXACT, start=1.0, end=1.5).source.notes


def test_pictures_that_change_size_are_noted_in_every_way() -> None:
    with WAYS["decoding"](io.BytesIO(turned())) as whole:
        assert len(list(whole.frames())) == 40 and len(whole.notes) == 1
    with WAYS["decoding"](io.BytesIO(turned()), 1.0, 1.5) as cut:
        assert len(list(cut.frames())) == 13 and not cut.notes


def recording(count: int, pid: int, streams: int = 1) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mpegts", options={"mpegts_start_pid": str(pid)}) as out:
        made = [out.add_stream("mpeg2video", rate=25, options={"g": "6"}) for _ in range(streams)]
        for stream in made:
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i, frame in enumerate(numbered(count)):
            for stream in made:
                frame.pts = i
                out.mux(stream.encode(frame))
        for stream in made:
            out.mux(stream.encode(None))
    return target.getvalue()


def test_another_stream_that_goes_on_is_noted() -> None:
    """Recordings that were joined, with another PID in the second."""
    notes = ["its video ends where another stream's begins, as in joined recordings: only one is read"]
    for first, second in ((40, 20), (20, 40)):
        data = recording(first, 256) + recording(second, 300)
        for profile in ({"name": "copy"}, EXACT):
            assert list(stored(data, **profile).source.notes) == notes
    for data in (recording(40, 256) * 2, recording(40, 256, streams=2)):
        assert not stored(data, **EXACT).source.notes

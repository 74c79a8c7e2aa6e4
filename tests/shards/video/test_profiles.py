"""What is stored under each profile: the right frames, of the whole video or of a cut, at the cost of what is asked for."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from pipelines.frame_sampling import choose
from shards import ShardError, VideoError
from shards.video import encode, frame_pass, profiles
from shards.video.decode import WAYS
from shards.video.picture import grid
from shards.video.profiles import PROFILES, Profile, store
from shards.video.random_access import pick_frames
from tests import videos
from tests.shards.video.stored import GOP, VP9, Counted, rotated, shown, stored

GOLDEN = Path(__file__).parents[2] / "golden"
SOURCES = {
    "h264 mp4": {"options": GOP},
    "h264 open gop": {"options": GOP | {"x264-params": "open-gop=1"}},
    "h264 intra refresh": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "h264 mkv": {"options": GOP, "format": "matroska"},
    "h264 ts": {"options": GOP, "format": "mpegts"},
    "hevc mp4": {"options": {"bf": "3", "g": "12"}, "codec": "libx265"},
    "vp9 webm": {"options": VP9, "codec": "libvpx-vp9", "format": "webm"},
    "av1 mp4": {"options": {"preset": "12", "g": "12"}, "codec": "libsvtav1"},
    "mpeg4 avi": {"options": {"g": "12", "bf": "2"}, "codec": "mpeg4", "format": "avi"},
    "mjpeg avi": {"options": {}, "codec": "mjpeg", "format": "avi"},
}
FRAMES = 60


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return {name: videos.encode(FRAMES, **how) for name, how in SOURCES.items()}


# ---- cuts ----


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("start", "end", "first", "last"), [(1.0, 1.8, 25, 44), (1.21, None, 31, 59), (None, 0.5, 0, 12)]
)
def test_a_cut_is_a_video_of_its_own(made, name, start, end, first, last) -> None:
    whole = last - first + 1
    intra = stored(made[name], "intra", start, end)
    begin = first / 25 - (start or 0.0)  # when its first frame is shown: times count from the start of the cut
    expected = [n for n in range(whole) if grid(n, Fraction(25), 3)]
    assert shown(intra) == {n: first + n for n in expected}
    assert intra.frames.time == pytest.approx([begin + n / 25 for n in expected], abs=2e-3)
    assert len(intra.source.times) == whole and intra.source.duration == pytest.approx(begin + whole / 25, abs=2e-3)
    try:
        copied = stored(made[name], "copy", start, end)
    except VideoError as error:  # a decoder that starts in the middle of these shows nothing
        assert name in ("h264 intra refresh", "mpeg4 avi") and "another profile than copy" in str(error)
        return
    inside = {n: seen for n, seen in shown(copied).items() if 0 <= n < whole}
    assert inside == {n: first + n for n in range(whole)}
    assert copied.frames.number[0] >= -24 and len(copied.frames) <= whole + 24 + 4
    assert np.interp(0, copied.frames.number, copied.frames.time) == pytest.approx(begin, abs=1e-6)
    assert (copied.codec, copied.source.codec) == (intra.source.codec,) * 2 and len(copied.source.times) == whole


def test_a_cut_that_holds_nothing_is_refused(made) -> None:
    for name in ("intra", "copy", "h264"):
        for start, end, words in (
            (2.0, 2.0, "the cut is empty"),
            (9.0, 1.0, "the cut is empty"),
            (30, 40, "between 30 and 40"),
        ):
            with pytest.raises(VideoError, match=words):
                stored(made["h264 mp4"], name, start, end)


def test_a_copied_cut_keeps_its_rotation_and_its_last_frame() -> None:
    turned = rotated(videos.encode(FRAMES, options=GOP), 90)
    for start, end in ((1.0, 1.5), (2.0, None)):
        what = stored(turned, "copy", start, end)
        assert (what.rotation % 360, what.width, what.height) == (90, 120, 160)
        assert what.frames.number[-1] >= len(what.source.times) - 1


def test_a_copied_cut_keeps_the_colours_that_its_container_tells() -> None:
    """H.264 that does not say what its colours are, in a Matroska that does: an mp4 need not say it again."""
    target = io.BytesIO()
    with av.open(io.BytesIO(videos.encode(FRAMES, options=GOP))) as file, av.open(target, "w", "matroska") as out:
        stream = out.add_stream_from_template(file.streams.video[0], opaque=False)
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.JPEG
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    whole, cut = stored(target.getvalue(), "copy"), stored(target.getvalue(), "copy", 0.52, 1.0)
    pictures = []
    for what, number in ((whole, 13), (cut, 0)):
        data = what.file.read()
        at = int(np.flatnonzero(what.frames.number == number)[0])
        pictures.append(pick_frames(what, lambda offset, size, d=data: d[offset : offset + size], [at])[at])
    assert (whole.coding.colorspace, whole.coding.color_range) == (Colorspace.ITU709, ColorRange.JPEG)
    assert np.array_equal(*pictures)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of frames that each call of the decoder gave."""
    counts, original = [], frame_pass.decode

    def counting(context, packet):
        frames = original(context, packet)
        counts.append(len(frames))
        return frames

    monkeypatch.setattr(frame_pass, "decode", counting)
    return counts


@pytest.mark.parametrize("name", ["intra", "copy", "h264"])
def test_a_cut_costs_what_it_holds_and_not_the_file(name, monkeypatch) -> None:
    rough = {"bf": "3", "g": "25", "sc_threshold": "0", "qp": "8"}
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    data = videos.encode_pictures((noise[i % 40] for i in range(1000)), 25, (64, 64), "libx264", "mp4", rough)
    file, counts = Counted(data), count_decoded(monkeypatch)
    store(file, "a.mp4", Profile(name=name, short_side=32), 33.0, 34.0)
    assert 0 < sum(counts) <= (25 + 25 + 4) * (2 if name == "copy" else 1) + (3 if name == "h264" else 0)
    assert file.total < len(data) / 4


# ---- nothing is decoded that nobody needs, and nothing else comes out ----


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_left_out_changes_no_byte(made, name, monkeypatch) -> None:
    counts = count_decoded(monkeypatch)
    quick, fewer = stored(made[name]), sum(counts)
    counts.clear()
    monkeypatch.setattr(encode, "WAYS", {"decoding": WAYS["decoding"]})
    plain = stored(made[name])
    assert quick.file.read() == plain.file.read()
    assert quick.frames.time == pytest.approx(plain.frames.time, abs=1e-9)
    assert sum(counts) == 2 * FRAMES
    if name in ("h264 mp4", "h264 mkv", "hevc mp4"):
        assert fewer <= 0.75 * FRAMES
    if name == "mjpeg avi":
        assert fewer == len(quick.frames)


def test_damage_in_a_frame_that_others_need_is_refused() -> None:
    data = bytearray(videos.encode(50, options={"bf": "0", "g": "250", "sc_threshold": "0"}))
    table = stored(bytes(data), "copy").frames
    data[table.offset[20] : table.offset[20] + table.size[20]] = bytes(int(table.size[20]))
    for name in ("intra", "copy", "h264"):
        with pytest.raises(VideoError, match=r"damaged|decoding fails"):
            stored(bytes(data), name)


@pytest.mark.parametrize(("count", "fps"), [(100, 25.0), (91, 29.97002997002997), (75, 24.0), (61, 30.0)])
def test_the_official_sampling_finds_its_own_frames_in_an_intra_video(count, fps) -> None:
    golden = np.load(GOLDEN / "frame_sampling.npz")
    rate = Fraction(fps).limit_denominator(1001)
    rates = golden["fps"][np.isclose(golden["fps"], fps, atol=1e-3)]
    assert len(rates)
    counts = golden["frame_count"][np.isin(golden["fps"], rates) & (golden["frame_count"] > 30)]
    count = int(counts[np.abs(counts - count).argmin()])
    what = stored(videos.encode(count, rate, (64, 48)), short_side=48)
    pictures = shown(what)
    row = SimpleNamespace(
        source_frames=len(what.source.times), fps=what.source.fps, frames=what.frames, inside=(0, len(what.frames))
    )
    chosen = np.flatnonzero(np.isin(golden["fps"], rates) & (golden["frame_count"] == count))
    assert len(chosen) > 3
    for i in chosen:
        rule = ("head", "tail", "uniform")[golden["slice_framepos"][i]]
        expected = golden["frame_index"][i][: golden["mask_len"][i]].tolist()
        found = what.frames.number[choose(row, rule, int(golden["max_frames"][i]))]
        assert found.tolist() == expected == [pictures[n] for n in expected]


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "h265"}, "must be one of intra, copy, h264, hevc, av1; got h265"),
        ({"name": "intra", "quality": 32}, "--quality 32: must be a whole number from 1 to 31 with --profile intra"),
        ({"name": "h264", "quality": 52}, "--quality 52: must be a whole number from 0 to 51 with --profile h264"),
        ({"name": "hevc", "gop": 0}, "--gop 0: must be a whole number from 1 to 600"),
        ({"name": "av1", "short_side": 225}, "--short-side 225: av1 needs an even number"),
        ({"name": "h264", "encoder": "gpu"}, "--encoder must be one of cpu, nvenc, auto; got gpu"),
        ({"fps": 0}, "--fps 0: must be a whole number from 1 to 240"),
        ({"chroma": 422}, "--chroma must be 420 or 444; got 422"),
    ],
)
def test_settings_that_make_no_sense(settings, words) -> None:
    with pytest.raises(ShardError, match=words):
        Profile(**settings)


def test_a_profile_records_what_its_bytes_depend_on() -> None:
    assert Profile().describe() == {"name": "intra", "fps": 3, "short_side": 224, "quality": 3, "chroma": 420}
    assert Profile(name="copy", fps=5, gop=7, quality=9).describe() == {"name": "copy"}
    common = {"fps": 3, "short_side": 224, "gop": 3, "encoder": "cpu"}
    assert {n: Profile(name=n).describe() for n in ("h264", "hevc", "av1")} == {
        n: {"name": n, "quality": q, **common} for n, q in (("h264", 23), ("hevc", 26), ("av1", 32))
    }
    assert Profile(name="h264", fps=240).gop == 12 and Profile(name="h264", fps=1).gop == 1
    assert set(PROFILES) == {"intra", "copy", "h264", "hevc", "av1"}


def test_auto_becomes_the_encoder_that_there_is(monkeypatch) -> None:
    wish = Profile(name="h264", encoder="auto")
    for opens, expected in ((True, "nvenc"), (False, "cpu")):
        monkeypatch.setattr(profiles, "nvenc_opens", lambda codec, opens=opens: opens)
        assert wish.resolved() == replace(wish, encoder=expected)
    with pytest.raises(ShardError, match="--encoder nvenc: h264_nvenc does not open here"):
        replace(wish, encoder="nvenc").resolved()
    assert Profile().resolved() == Profile()


def test_nvenc_where_there_is_one() -> None:
    if not encode.nvenc_opens("h264"):
        pytest.skip("h264_nvenc does not open on this machine")
    what = stored(videos.encode(70, 30, (320, 240)), "h264", short_side=224, encoder="nvenc", gop=3)
    assert shown(what) == {n: n for n in range(0, 70, 10)}
    assert np.flatnonzero(what.frames.key).tolist() == [0, 3, 6]

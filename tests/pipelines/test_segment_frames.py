"""A plain file gives the frames that its packed copy gives, bit for bit; both as evaluation makes them."""

import io
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.reading import Finished, ReadAtOnce
from pipelines.segment_frames import CHUNK, Described, Frames, frames_of_file, frames_of_stored, thumbnail
from pipelines.segment_lane import SegmentLane
from pipelines.segments import Cutting
from shards import VideoError
from shards.split import Split
from shards.tools.preview import preview
from tests.pipelines.conftest import pack_videos
from tests.shards.video.matrix import STEPS, made, with_edit
from tests.shards.video.stored import rotated
from tests.shards.video.test_wrong_headers import with_edits
from tests.videos import encode, number_in

pytestmark = pytest.mark.slow  # imports DALI

CONFIG = DataConfig(num_frames=4, image_size=64, fps=3).filled()
SHORT = Cutting(0.6, 0.3)
VARIABLE = np.cumsum([0, *STEPS * 3])[:36].tolist()
HARD = {
    "turned.mp4": lambda: rotated(made("mp4", "h264"), 90),
    "mirror.mov": lambda: made("mov", "prores", degrees=180),
    "edited.mp4": lambda: with_edit(made("mp4", "h264"), 0.4, 0.8),
    "to_and_fro.mp4": lambda: with_edits(made("mp4", "h264"), [(0.8, 0.4), (0.0, 0.4)]),
    "variable.mkv": lambda: made("matroska", "h264", times=VARIABLE),
    "wide_pixels.mp4": lambda: made("mp4", "h264", aspect=Fraction(4, 3)),
    "bt709.mp4": lambda: made("mp4", "h264", matrix=1, full=True),
    "late.mp4": lambda: made("mp4", "h264", sound_first=10),
    "broadcast.ts": lambda: made("mpegts", "mpeg2"),
    "old.avi": lambda: made("avi", "mpeg4"),
    "open.mkv": lambda: made("matroska", "open"),
    "web.webm": lambda: made("webm", "vp9"),
}


def taken(events):
    """(what was described, {position: pixels}, {segment: thumbnail})"""
    about, pixels, thumbnails = None, {}, {}
    for event in events:
        if isinstance(event, Described):
            about, pixels, thumbnails = event, {}, {}
        else:
            assert len(event.positions) <= CHUNK or len(event.positions) <= 64
            pixels |= dict(zip(event.positions.tolist(), event.pixels, strict=True))
            thumbnails |= event.thumbnails
    return about, pixels, thumbnails


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard") / "set"
    return folder, pack_videos(folder, {name: make() for name, make in HARD.items()}, "copy")


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("cutting", [SHORT, Cutting(0, 0)], ids=str)
def test_a_plain_file_gives_the_frames_of_its_packed_copy(name, cutting, hard):
    folder, split = hard
    video = split.find(name.split(".")[0])
    plain = taken(frames_of_file(folder / name, CONFIG, cutting))
    packed = taken(frames_of_stored(split, video, CONFIG, cutting))
    first = video.inside[0]  # the table lists frames that an edit list hides, too
    assert [(s.start, s.end, (s.positions + first).tolist()) for s in plain[0].segments] == [
        (s.start, s.end, s.positions.tolist()) for s in packed[0].segments
    ]
    assert (plain[0].duration, plain[0].width, plain[0].height) == (video.duration, video.width, video.height)
    assert {p + first for p in plain[1]} == packed[1].keys()
    assert all(np.array_equal(pixels, packed[1][p + first]) for p, pixels in plain[1].items())
    assert plain[2] == packed[2] and plain[2].keys() == set(range(len(plain[0].segments)))


def clip(about, pixels):
    """uint8 [num_frames, S, S, 3] of a video that is one segment."""
    (segment,) = about.segments
    out = np.zeros((CONFIG.num_frames, 64, 64, 3), np.uint8)
    out[: len(segment.positions)] = [pixels[p] for p in segment.positions.tolist()]
    return out


@pytest.mark.parametrize("profile", ["copy", "intra", "h264"])
def test_whole_videos_are_the_clips_of_evaluation(profile, hard, tmp_path):
    folder, copy = hard
    split = copy if profile == "copy" else pack_videos(
        tmp_path / "set", {n: (folder / n).read_bytes() for n in ("turned.mp4", "variable.mkv", "web.webm")}, profile)  # fmt: skip
    lane = SegmentLane(split, CONFIG, torch.device("cpu"), Cutting(0, 0))
    reader = EvalLoader(split, CONFIG, raw=True)
    for indices, frames, mask in reader:
        for index, expected, seen in zip(indices.tolist(), frames.numpy(), mask, strict=True):
            about, pixels, _ = taken(lane.read(split.video(index)))
            assert len(about.segments[0].positions) == seen.sum()
            assert np.array_equal(clip(about, pixels), expected)
    reader.close()
    lane.close()


def test_a_long_video_comes_in_pieces_with_each_frame_once(tmp_path):
    (tmp_path / "long.mp4").write_bytes(encode(1000, 10, (64, 64), options={"g": "50", "bf": "2"}))
    cutting = Cutting(8, 4)
    events = list(frames_of_file(tmp_path / "long.mp4", CONFIG, cutting))
    about, pixels, thumbnails = taken(events)
    assert len(events) > 5 and all(len(event.positions) <= CHUNK for event in events[1:])
    assert sum(len(event.positions) for event in events[1:]) == len(pixels)
    assert all(number_in(picture) == position for position, picture in pixels.items())
    for number, segment in enumerate(about.segments):
        shown = np.asarray(Image.open(io.BytesIO(thumbnails[number])))
        assert number_in(shown) == segment.middle and segment.start * 10 <= segment.middle < segment.end * 10


def test_thumbnails_are_small_and_keep_the_shape():
    for size, expected in (((1920, 1080), (320, 180)), ((100, 4000), (8, 320)), ((64, 48), (64, 48))):
        image = Image.open(io.BytesIO(thumbnail(Image.new("RGB", size, "red"))))
        assert image.size == expected and image.format == "JPEG"


def test_what_is_no_video_is_told_and_stops_nothing(tmp_path):
    whole = encode(50, 25)
    files = {
        "a.mp4": whole,
        "cut.mp4": whole[: len(whole) // 2],
        "text.mp4": b"hello",
        "empty.mp4": b"",
        "z.mp4": whole,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = [*files, "missing.mp4"]
    for threads in (1, 3):
        reading = ReadAtOnce(names, lambda name: frames_of_file(tmp_path / name, CONFIG, SHORT), threads)
        ended = {name: event.error for name, event in reading if isinstance(event, Finished)}
        assert ended.keys() == set(names) and ended["a.mp4"] == ended["z.mp4"] == ""
        assert "moov" in ended["cut.mp4"] or "cut short" in ended["cut.mp4"]
        assert "the file is empty" in ended["empty.mp4"] and "missing" in ended["missing.mp4"]
        assert "not a readable video file" in ended["text.mp4"]


def test_a_damaged_video_of_a_split_is_told(hard, tmp_path):
    folder, _ = hard
    split = pack_videos(tmp_path / "set", {"web.webm": (folder / "web.webm").read_bytes()}, "intra")
    video = split.video(0)
    tar = tmp_path / "set" / "packed" / f"{video.shard}.tar"
    data = bytearray(tar.read_bytes())
    data[video.offset + int(video.frames.offset[3]) + 40] ^= 0xFF
    tar.write_bytes(bytes(data))
    split = Split(tmp_path / "set" / "packed")
    lane = SegmentLane(split, CONFIG, torch.device("cpu"), SHORT)
    with pytest.raises(VideoError, match="crc32c of stored frame 3 differs"):
        taken(lane.read(split.video(0)))
    lane.close()


def test_one_wrong_bit_of_a_video_whose_frames_cannot_be_sliced_is_told(tmp_path):
    split = pack_videos(tmp_path / "set", {"a.ts": encode(40, 20, (64, 64), format="mpegts")}, "copy")
    video, path = split.video(0), tmp_path / "set" / "packed"
    tar = path / f"{video.shard}.tar"
    data = bytearray(tar.read_bytes())
    data[video.offset + video.size // 2] ^= 0x10
    tar.write_bytes(bytes(data))
    assert not video.frames.sliceable
    lane = SegmentLane(Split(path), CONFIG, torch.device("cpu"), SHORT)
    with pytest.raises(VideoError, match="crc32c of the file differs"):
        taken(lane.read(video))
    lane.close()
    assert preview([path], tmp_path / "preview.html") == 1
    assert "crc32c of the file differs" in (tmp_path / "preview.html").read_text()


def test_who_stops_reading_leaves_no_thread_and_a_defect_is_raised():
    def endless(_):
        while True:
            yield Frames(np.zeros(1, int), np.zeros((1, 1, 1, 3), np.uint8))

    reading = iter(ReadAtOnce(range(100), endless, 3))
    next(reading)
    reading.close()
    for thread in threading.enumerate():
        if thread.name.startswith("c4c-video"):
            thread.join(5)
            assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        list(ReadAtOnce([1, 2], lambda job: iter([1 / 0]), 2))

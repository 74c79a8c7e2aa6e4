"""Files as people have them: the frames, times and pictures that come out are those that a player shows, in every lane."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from c4c.shard import main
from pipelines.config import ClipsConfig, DataConfig
from pipelines.frame_sampling import choose
from pipelines.frames import write_frames
from pipelines.loader import Loader
from shards.split import Split
from shards.tools.preview import preview
from shards.tools.verify import verify
from shards.video.random_access import pick_frames

pytestmark = pytest.mark.slow  # imports DALI

FILES = Path(__file__).parents[1] / "files"

# id, file, cut; then pictures that must come out, seconds of the first and of the last, duration
WHOLE = {
    "gap": ("gap.mkv", None, range(100), 0.0, 23.96, 24.0),
    "trim_end": ("trim_end.mp4", None, range(50), 0.0, 1.96, 2.0),
    "remux": ("remux.avi", None, range(100), 0.0, 3.96, 4.0),
    "screen": ("screen.mp4", None, range(129), 0.0, 12.0, 12.033),
    "browser1k": ("browser1k.webm", None, range(150), 0.0, 4.963, 4.996),
    "cover_first": ("cover_first.mp4", None, range(100), 0.0, 3.96, 4.0),
    "thumb_unflagged": ("thumb_unflagged.mp4", None, range(100), 0.0, 3.96, 4.0),
    "divx3": ("divx3.avi", None, range(30), 0.0, 1.16, 1.2),
    "ffv1": ("ffv1.mkv", None, range(30), 0.0, 1.16, 1.2),
    "png": ("png.avi", None, range(30), 0.0, 1.16, 1.2),
    "packed": ("packed.avi", None, range(60), 0.0, 2.36, 2.4),
    "inside_gop": ("mid_og0.ts", None, range(25, 100), 0.0, 2.96, 3.0),
    "late": ("late.mp4", None, range(100), 2.0, 5.96, 6.0),
    "trim_start": ("trim_start.mp4", None, range(15, 100), 0.0, 3.36, 3.4),
    "sar": ("sar_16_9.mp4", None, range(50), 0.0, 1.96, 2.0),
}
CUTS = {
    "packed_cut": ("packed.avi", [0.4, 0.9], range(10, 23), 0.0, 0.48, 0.52),
    "inside_gop_1": ("mid_og0.ts", [0.4, 0.9], range(35, 48), 0.0, 0.48, 0.52),
    "inside_gop_2": ("mid_og0.ts", [1.0, 1.5], range(50, 63), 0.0, 0.48, 0.52),
    "late_cut": ("late.mp4", [2.4, 2.9], range(10, 23), 0.0, 0.48, 0.52),
    "before_late": ("late.mp4", [1.0, 2.2], range(5), 1.0, 1.16, 1.2),
    "late_start_ts": ("late_start.ts", [0.4, 0.9], range(10, 23), 0.0, 0.48, 0.52),
    "tail_ts": ("tail_og0.ts", [0.4, 0.9], range(10, 23), 0.0, 0.48, 0.52),
    "trim_start_cut": ("trim_start.mp4", [0.4, 0.9], range(25, 38), 0.0, 0.48, 0.52),
    "gap_cut": ("gap.mkv", [22, 24], range(50, 100), 0.0, 1.96, 2.0),
}
CAPTIONS = {"gap": [{"text": "early", "start": 0, "end": 2}, {"text": "late", "start": 22, "end": 24}]}
# seen on a screen, corners row by row; a turned or mirrored picture has no legible number
CORNERS = {"hflip": ("hflip.mp4", "GR/WB"), "r90": ("r90.mp4", "BR/WG")}
NAMED = {"R": (220, 30, 30), "G": (30, 200, 30), "B": (30, 30, 220), "W": (230, 230, 230)}


def number(picture: np.ndarray) -> int:
    height, width = picture.shape[:2]
    rows = picture[round(height * 0.46) : round(height * 0.54)]
    blocks = [rows[:, round(width * (b + 0.35) / 8) : round(width * (b + 0.65) / 8)].mean() for b in range(8)]
    return sum((block > 120) << (7 - b) for b, block in enumerate(blocks))


def corners(picture: np.ndarray) -> str:
    height, width = picture.shape[:2]
    names = []
    for y in (height // 20, height - 1 - height // 20):
        for x in (width // 20, width - 1 - width // 20):
            names.append(min(NAMED, key=lambda n: np.abs(np.array(NAMED[n]) - picture[y, x]).sum()))
    return f"{''.join(names[:2])}/{''.join(names[2:])}"


def pack(folder: Path, profile: str, *options: str) -> Split:
    lines = [
        {"video": file, "id": id, "captions": CAPTIONS.get(id, ["a caption"])} | ({"cut": cut} if cut else {})
        for id, (file, cut, *_) in (WHOLE | CUTS).items()
    ]
    lines += [{"video": file, "id": id, "captions": ["a caption"]} for id, (file, _) in CORNERS.items()]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--videos", str(FILES), "--captions", str(folder / "captions.jsonl"), "--out", str(folder / profile)]
    assert main(["folder", *words, "--profile", profile, *options]) == 0
    return Split(folder / profile)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    folder = tmp_path_factory.mktemp("real")
    return {"copy": pack(folder, "copy"), "intra": pack(folder, "intra", "--fps", "240")}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """intra as it is by default: 3 frames a second."""
    return pack(tmp_path_factory.mktemp("sparse"), "intra")


def of_each(split: Split) -> Iterator[tuple[str, object]]:
    for index in range(len(split)):
        video = split.video(index)
        yield video.id, video


def shown(split: Split, video) -> dict[int, np.ndarray]:
    return pick_frames(video, lambda at, size: split.read(video, at, size), range(*video.inside))


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_frames_times_and_durations(splits: dict[str, Split], profile: str) -> None:
    found = dict(of_each(splits[profile]))
    # what has no time stamps cannot be cut without encoding it anew, and the reason says so
    missing = {"packed_cut"} if profile == "copy" else set()
    assert found.keys() == (WHOLE | CUTS | CORNERS).keys() - missing
    for id, (_, _, expected, first, last, duration) in (WHOLE | CUTS).items():
        if id in missing:
            continue
        video, pictures = found[id], shown(splits[profile], found[id])
        low, high = video.inside
        times = video.frames.time[low:high]
        assert [number(pictures[p]) for p in range(low, high)] == list(expected), id
        assert video.frames.number[low:high].tolist() == list(range(len(expected))), id
        assert (times[0], times[-1]) == pytest.approx((first, last), abs=1e-3), id
        assert video.duration == pytest.approx(duration, abs=1e-3), id
        assert (np.diff(video.frames.time) > 0).all(), id
        assert video.source_frames == len(expected), id
        assert corners(pictures[low]) == "RG/BW", id


def test_a_cut_that_cannot_be_copied_is_rejected_with_the_true_reason(splits: dict[str, Split]) -> None:
    rejects = [json.loads(line) for line in (splits["copy"].path / "rejects.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rejects] == ["packed_cut"]
    assert "the container stores no time of presentation" in rejects[0]["reason"]
    assert (splits["intra"].path / "rejects.jsonl").read_text() == ""


def test_regular_frames_are_at_regular_times(splits: dict[str, Split]) -> None:
    for split in splits.values():
        for id in ("remux", "packed", "trim_end"):
            video = split.find(id)
            low, high = video.inside
            assert video.frames.time[low:high] == pytest.approx(np.arange(high - low) / 25, abs=1e-9)
            assert video.fps == 25


def test_pictures_are_as_players_show_them(splits: dict[str, Split]) -> None:
    for profile, split in splits.items():
        for id, (_, expected) in CORNERS.items():
            video = split.find(id)
            pictures = shown(split, video)
            assert {corners(p) for p in pictures.values()} == {expected}, (profile, id)
            assert {p.shape[1::-1] for p in pictures.values()} == {(video.width, video.height)}
    assert (splits["intra"].find("sar").width, splits["intra"].find("sar").height) == (530, 224)
    assert (splits["copy"].find("sar").width, splits["copy"].find("sar").height) == (455, 192)


def test_the_rate_follows_from_the_time_stamps(splits: dict[str, Split], sparse: Split) -> None:
    for split in (*splits.values(), sparse):
        assert float(split.find("browser1k").fps) == pytest.approx(30, abs=0.5)
        assert len(choose(split.find("browser1k"), "uniform", 12)) == 5
    assert len(sparse.find("browser1k").frames) == 15


def test_a_variable_rate_is_sampled_by_time(splits: dict[str, Split], sparse: Split) -> None:
    for split in (*splits.values(), sparse):
        video = split.find("screen")
        seconds = video.frames.time[choose(video, "uniform", 12)]
        assert seconds == pytest.approx(np.arange(12), abs=0.02)
        counted = video.frames.time[choose(video, "uniform_by_frame", 12)]
        assert (counted > 4.5).sum() <= 1  # as the official code does, where all frames are stored


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_verify_preview_loader_and_frames_agree(splits: dict[str, Split], tmp_path: Path, profile: str) -> None:
    split = splits[profile]
    assert verify(split.path, 1) == []
    assert preview([split.path], tmp_path / "page.html", count=99, frames=3) == 0
    config = DataConfig(image_size=64, num_frames=4, sampling="segment", threads=1)
    with Loader(split, config, batch_size=4, seed=0, device="cpu") as loader:
        batches = list(loader.batches(count=loader.steps_per_epoch))
    assert sum(batch.stats.bad for batch in batches) == 0
    assert len({key for batch in batches for key in batch.keys}) == len(split)
    for id in ("screen", "trim_end", "late", "sar", "hflip", "packed", "divx3", "png"):
        out = tmp_path / id
        written = write_frames(split, id, out, num_frames=5)
        video = split.find(id)
        if profile == "intra":  # libjpeg-turbo decodes them, not libav
            frames = video.frames
            pieces = [split.read(video, int(frames.offset[w.position]), int(frames.size[w.position])) for w in written]
            expected = [np.asarray(Image.open(io.BytesIO(piece))) for piece in pieces]
        else:
            positions = [w.position for w in written]
            found = pick_frames(video, lambda at, size, v=video: split.read(v, at, size), positions)
            expected = [found[p] for p in positions]
        for one, picture in zip(written, expected, strict=True):
            assert np.array_equal(np.asarray(Image.open(one.file)), picture)
            assert one.file.name == f"{one.number:06d}_{one.seconds:.3f}.png"


def test_a_clip_shows_the_seconds_of_its_caption(splits: dict[str, Split], sparse: Split) -> None:
    for split in (*splits.values(), sparse):
        video = split.find("gap")
        config, clips = DataConfig(image_size=64, num_frames=4, threads=1), ClipsConfig(cut=True, min_s=1)
        with Loader(split, config, batch_size=len(split), seed=0, device="cpu", clips=clips) as loader:
            for batch in loader.batches(count=2):
                row = batch.keys.index(video.key)
                numbers = [int(n) for n in batch.frame_numbers[row] if n >= 0]
                late = batch.captions[row] == "late"
                assert numbers and all((n >= 50) == late for n in numbers)


def test_a_download_that_was_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "cut_download.mp4", tmp_path / "in")
    (tmp_path / "in/cut_download.txt").write_text("a caption\n")
    assert main(["folder", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    reason = json.loads((tmp_path / "out/rejects.jsonl").read_text())["reason"]
    assert "its index (the moov box of an mp4) is missing" in reason and "downloaded" in reason

"""The demo set: the same bytes for a seed, the promised mix, splits that share nothing, pairs that differ in order."""

from __future__ import annotations

import collections
import io
import itertools
import json
import math
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shards.demo import scenes, shapes

TRAIN, TEST = 8, 4


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def decoded(data: bytes) -> tuple[av.VideoStream, list[av.VideoFrame]]:
    with av.open(io.BytesIO(data)) as file:
        return file.streams.video[0], list(file.decode(video=0))


def pairs(some: list[shapes.Scene]) -> list[tuple[shapes.Scene, shapes.Scene]]:
    groups = collections.defaultdict(list)
    for scene in some:
        if scene.pair:
            groups[scene.pair].append(scene)
    assert all(len(group) == 2 for group in groups.values())
    return [(a, b) for a, b in groups.values()]


@pytest.fixture(scope="module")
def full() -> dict[str, list[shapes.Scene]]:
    """The set at its default size; scenes are cheap, only their pictures are not."""
    return shapes.scenes(0, 1000, 200)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set on disk, made by one process."""
    out = tmp_path_factory.mktemp("demo")
    shapes.generate(out, seed=3, train=TRAIN, test=TEST, workers=1)
    return out


# ---- the plan ----


def test_scenes_are_a_function_of_the_seed(full: dict[str, list[shapes.Scene]]) -> None:
    assert shapes.scenes(0, 1000, 200) == full
    assert shapes.scenes(1, 1000, 200)["test"] != full["test"]
    assert shapes.scenes(0, 10, 200)["test"] == full["test"]


def test_counts_and_keys(full: dict[str, list[shapes.Scene]]) -> None:
    assert [scene.key for scene in full["train"]] == [f"train{i:05d}" for i in range(1000)]
    assert [scene.key for scene in full["test"]] == [f"test{i:05d}" for i in range(200)]
    assert shapes.scenes(0, 0, 0) == {"train": [], "test": []}
    for counts in ((-1, 5), (3000, 1000)):
        with pytest.raises(ValueError, match="2000"):
            shapes.scenes(0, *counts)


def test_splits_share_no_event_in_either_direction(full: dict[str, list[shapes.Scene]]) -> None:
    train, test = ({scene.event for scene in full[name]} for name in ("train", "test"))
    assert not train & test
    words = [{c for scene in full[name] for c in scene.captions} for name in ("train", "test")]
    assert not words[0] & words[1]


def test_every_attribute_of_test_is_common_in_train(full: dict[str, list[shapes.Scene]]) -> None:
    def values(name: str) -> collections.Counter:
        count: collections.Counter = collections.Counter()
        for scene in full[name]:
            meta = scene.meta
            count.update({("action", meta["action"]), ("background", meta["background"])})
            count.update({(key, value) for key in ("shape", "colour", "size") for value in meta[key]})
        return count

    train, test = values("train"), values("test")
    assert len(test) == len(scenes.VERBS) + 3 + len(scenes.SHAPES) + len(shapes.COLOURS) + 3 + len(scenes.BACKGROUNDS)
    assert min(train[value] for value in test) >= 25


def test_only_pairs_mirror_each_other(full: dict[str, list[shapes.Scene]]) -> None:
    for name, some in full.items():
        groups = collections.defaultdict(list)
        for scene in some:
            groups[scene.event].append(scene)
        assert all(len(group) == (2 if group[0].pair else 1) for group in groups.values())
        assert len({scene.combination for scene in some}) == len(some)
        paired = sum(scene.pair is not None for scene in some)
        assert paired / len(some) == scenes.PAIRED[name]
        assert all(a.pair is None or a.pair != b.pair for a, b in itertools.pairwise(some))
        assert {a.kind for a, _ in pairs(some)} == set(scenes.KINDS)


def test_captions(full: dict[str, list[shapes.Scene]]) -> None:
    captions = [scene.captions for scene in full["test"]]
    assert all(len(c) == 1 for c in captions) and len(set(captions)) == 200
    assert all(len(set(scene.captions)) == 5 for scene in full["train"])
    words = {word.strip(",") for scene in full["train"] + full["test"] for c in scene.captions for word in c.split()}
    assert len(words) < 110
    assert "medium" not in words


def test_captions_say_everything_shown(full: dict[str, list[shapes.Scene]]) -> None:
    opposite = {"up": "down", "left": "right", "grow": "shrink", "appear": "vanish", "over": "upright"}
    opposite |= {b: a for a, b in opposite.items()}
    for scene in full["train"]:
        for caption in scene.captions:
            words = caption.replace(",", "").split()
            assert any(word in caption for word in scenes.BACKGROUNDS[scene.background])
            for thing in filter(None, (scene.before, scene.after)):
                assert thing.colour in words
                assert any(word in words for word in scenes.SHAPES[thing.shape])
                if thing.size in scenes.SIZE_WORDS and scene.kind != "resize":
                    assert any(word in words for word in scenes.SIZE_WORDS[thing.size])
            if scene.action in scenes.VERBS:
                assert any(verb in caption for verb in scenes.VERBS[scene.action])
                assert not any(verb in caption for verb in scenes.VERBS[opposite[scene.action]])
            elif scene.kind != "morph":  # what was first is said first
                assert words.index(scene.before.colour) < words.index(scene.after.colour)


def test_mix_of_rates_lengths_and_orientations(full: dict[str, list[shapes.Scene]]) -> None:
    for some in full.values():
        rates = collections.Counter(scene.fps for scene in some)
        assert set(rates) == {24, 25, Fraction(30000, 1001), 30} and min(rates.values()) > len(some) / 6
        assert sum(scene.portrait for scene in some) / len(some) == pytest.approx(0.5, abs=0.1)
        seconds = [float(scene.frames / scene.fps) for scene in some]
        assert 3 <= min(seconds) < 3.5 and 9 < max(seconds) < 12.05
        assert 5 < np.mean(seconds) < 6


# ---- the pictures ----


def test_twins_show_the_same_frames_in_opposite_order(full: dict[str, list[shapes.Scene]]) -> None:
    twins = {a.kind: (a, b) for a, b in pairs(full["test"])}
    assert len(twins) == len(scenes.KINDS)
    for a, b in twins.values():
        same = ("fps", "frames", "portrait", "background", "seed", "kind")
        assert all(getattr(a, name) == getattr(b, name) for name in same)
        assert a.captions != b.captions and a.combination != b.combination
        one, two = np.stack(list(shapes.render(a))), np.stack(list(shapes.render(b)))
        assert np.array_equal(one, two[::-1])
        assert np.abs(one[0].astype(int) - two[0]).max() > 60, a.kind  # and the order shows


def test_action_is_inside_the_central_square_and_shows_at_one_frame_a_second(
    full: dict[str, list[shapes.Scene]],
) -> None:
    short = {scene.kind: scene for scene in full["train"] if scene.frames / scene.fps < 4}
    assert len(short) == len(scenes.KINDS)
    for scene in short.values():
        frames = np.stack(list(shapes.render(scene))).astype(int)
        assert frames.shape == (scene.frames, *scene.size, 3)
        height, width = scene.size
        moved = np.abs(frames - frames[0]).max(axis=(0, 3)) > 30
        top, left = (height - scenes.SIDE) // 2, (width - scenes.SIDE) // 2
        inside = moved[top : top + scenes.SIDE, left : left + scenes.SIDE]
        assert inside.sum() == moved.sum() > 100, scene.kind
        first, last = frames[0], frames[math.ceil(2 * scene.fps)]
        assert (np.abs(first - last).max(axis=2) > 60).sum() > 80, scene.kind


def test_files_are_the_planned_h264(full: dict[str, list[shapes.Scene]]) -> None:
    train = full["train"]
    chosen = [next(s for s in train if s.fps == fps and s.portrait == p) for fps in scenes.RATES for p in (True, False)]
    chosen.append(next(s for s in train if s.frames > shapes.GOP))
    for scene in chosen:
        data = shapes.encode(scene)
        stream, frames = decoded(data)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == scene.fps
        assert (frames[0].height, frames[0].width) == scene.size
        assert len(frames) == stream.frames == scene.frames
        times = [frame.pts * frame.time_base for frame in frames]
        assert all(abs(t - i / scene.fps) < Fraction(1, 1000) for i, t in enumerate(times))
        kinds = collections.Counter(int(frame.pict_type) for frame in frames)
        assert kinds[int(av.video.frame.PictureType.B)] > scene.frames / 3
        assert sum(frame.key_frame for frame in frames) == math.ceil(scene.frames / shapes.GOP)
        for i, shown in enumerate(shapes.render(scene)):
            if i % 40 == 0:
                assert np.abs(frames[i].to_ndarray(format="rgb24").astype(int) - shown).mean() < 8
        assert 5e3 < len(data) < 1.2e5


# ---- the files ----


@pytest.mark.slow
def test_listing_and_items(small: Path) -> None:
    items = shapes.generate(small, seed=3, train=TRAIN, test=TEST, workers=1)
    planned = shapes.scenes(3, TRAIN, TEST)
    for name, count in (("train", TRAIN), ("test", TEST)):
        lines = [json.loads(line) for line in (small / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == len(items[name]) == count
        for line, item, scene in zip(lines, items[name], planned[name], strict=True):
            assert item.path == small / line["video"] and item.path.read_bytes() == shapes.encode(scene)
            assert item.id == item.path.stem == scene.key
            assert [caption.text for caption in item.captions] == line["captions"] == list(scene.captions)
            assert item.meta == line["meta"]
            assert line["meta"]["pair"] == scene.pair and line["meta"]["kind"] == scene.kind
        assert len(list((small / name).iterdir())) == count
    assert sum(item.meta["pair"] is not None for item in items["test"]) == 2


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(small: Path, tmp_path: Path) -> None:
    shapes.generate(tmp_path, seed=3, train=TRAIN, test=TEST, workers=3)
    assert files(tmp_path) == files(small)


def test_resume_makes_only_what_is_missing(small: Path, tmp_path: Path) -> None:
    whole = files(small)
    for name, data in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    gone = ("train/train00002.mp4", "test.jsonl")
    for name in gone:
        (tmp_path / name).rename(tmp_path / (name + ".part"))  # as a killed run leaves it
    (tmp_path / (gone[0] + ".part")).write_bytes(b"half")
    kept = tmp_path / "test/test00001.mp4"
    kept.write_bytes(b"kept")
    calls: list[tuple[int, int]] = []
    shapes.generate(tmp_path, seed=3, train=TRAIN, test=TEST, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(TRAIN + TEST - 1, TRAIN + TEST), (TRAIN + TEST, TRAIN + TEST)]
    assert kept.read_bytes() == b"kept"
    kept.write_bytes(whole["test/test00001.mp4"])
    assert files(tmp_path) == whole


def test_a_finished_set_is_not_encoded_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "encode", lambda scene: pytest.fail("encoded again"))
    shapes.generate(small, seed=3, train=TRAIN, test=TEST)


def test_a_folder_holds_one_set(small: Path) -> None:
    before = files(small)
    with pytest.raises(FileExistsError, match="another demo set"):
        shapes.generate(small, seed=4, train=TRAIN, test=TEST)
    assert files(small) == before


@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_a_write_that_fails_leaves_no_half_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    writes = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        with path.open("wb") as file:
            file.write(data[: len(data) // 2] if writes == fatal else data)
        if writes == fatal:
            raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="disk full"):
        shapes.generate(tmp_path, seed=3, train=TRAIN, test=TEST, workers=1)
    whole, found = files(small), files(tmp_path)
    assert len(found) == fatal and sum(name.endswith(".part") for name in found) == 1
    assert all(whole[name] == data for name, data in found.items() if not name.endswith(".part"))


def blocks_ctrl_c(_: int) -> bytes:
    return b"%d" % (signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_ctrl_c_does_not_reach_a_process_that_draws_from_its_first_moment_on() -> None:
    assert list(shapes.encoded(range(9), blocks_ctrl_c, 2)) == [b"1"] * 9
    assert blocks_ctrl_c(0) == b"0"

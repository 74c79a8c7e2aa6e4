"""The cache of decoded frames: the same pixels, no decoding, and no wrong frame whatever happens to who fills it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import CacheConfig, DataConfig
from pipelines.loader import Loader
from pipelines.stages import cache as cache_module
from pipelines.stages.cache import FrameCache
from pipelines.stats import Stats
from shards.annotations import Caption, Item
from shards.split import Split
from tests.pipelines import fill
from tests.pipelines.conftest import pack_videos
from tests.shards.sets import packed
from tests.videos import encode, number_in

pytestmark = pytest.mark.slow  # imports DALI

SMALL = DataConfig(num_frames=3, image_size=32, max_words=12, threads=1)


def epochs(split, config=SMALL, cache=None, count=2, seed=0, **options):
    with Loader(split, config, batch_size=4, seed=seed, cache=cache, **options) as loader:
        batches = list(loader.batches(count=count * loader.steps_per_epoch))
    totals = []
    for epoch in range(count):
        total = Stats()
        for batch in batches:
            if batch.epoch == epoch:
                total.add(batch.stats)
        totals.append(total)
    return batches, totals


def same(a, b) -> bool:
    return all(
        x.keys == y.keys and np.array_equal(x.frame_numbers, y.frame_numbers) and torch.equal(x.frames, y.frames)
        for x, y in zip(a, b, strict=True)
    )


def test_a_cut_that_is_moved_finds_none_of_the_frames_of_before(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode(60, 20, (64, 64)))  # of which the first frame alone is a keyframe
    seen = []
    for start in (0.5, 1.0):
        items = [Item("a", tmp_path / "a.mp4", (Caption("x"),), {}, start, 3.0)]
        packed(items, tmp_path / "set", workers=1, update=True)
        config, cache = replace(SMALL, num_frames=2, image_size=64), CacheConfig(dir=str(tmp_path / "cache"), max_gb=1)
        with Loader(Split(tmp_path / "set"), config, batch_size=1, seed=0, raw=True, cache=cache) as loader:
            seen += [[number_in(picture) for picture in batch.frames[0].numpy()] for batch in loader.batches(count=3)]
    assert seen == [[10, 50]] * 3 + [[20, 40]] * 3


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_frames_that_were_cached_before_stamps_were_proved_are_decoded_again(numbered, tmp_path, profile):
    """Of copied videos only: a cache may hold those of H.264 in WMV at other places."""
    split, settings = getattr(numbered, profile), CacheConfig(dir=str(tmp_path), max_gb=1)
    epochs(split, SMALL, settings)
    (text,) = tmp_path.glob("frames-*.json")
    before = {key: value for key, value in json.loads(text.read_text()).items() if key != "stamps"}
    name = "frames-" + hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:20]
    for file in list(tmp_path.glob("frames-*")):
        file.rename(tmp_path / f"{name}{file.suffix}")
    _, (total, _) = epochs(split, SMALL, settings)
    assert (total.frames_decoded > 0) == (profile == "copy")


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_a_bad_frame_that_no_clip_shows_makes_no_video_bad(tmp_path):
    split = pack_videos(tmp_path / "set", {f"{name}.mp4": encode(90, 25, (64, 64)) for name in "abc"}, "intra")
    video = split.video(1)
    tar = split.path / f"{video.shard}.tar"
    data = bytearray(tar.read_bytes())
    data[video.offset + int(video.frames.offset[5]) + 40] ^= 0xFF
    tar.write_bytes(bytes(data))
    config = replace(SMALL, num_frames=2, sampling="random")
    plain, _ = epochs(Split(split.path), config)
    cached, _ = epochs(Split(split.path), config, CacheConfig(dir=str(tmp_path / "cache"), max_gb=1, frames=0))
    assert same(plain, cached) and any("b" in batch.keys for batch in plain)


@pytest.mark.parametrize("profile", ["copy", "intra"])
@pytest.mark.parametrize("rule", ["uniform", "segment", "random"])
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_cached_frames_are_the_decoded_ones_and_cost_no_decoding(numbered, tmp_path, profile, rule, augmented):
    split = getattr(numbered, profile)
    config = replace(SMALL, sampling=rule, frame_order="random", flip=0.5 * augmented, colour=0.3 * augmented)
    settings = CacheConfig(dir=str(tmp_path / "cache"), max_gb=1, frames=8)
    warm, (first, second, third) = epochs(split, config, settings, count=3)
    again, (fourth, _, _) = epochs(split, config, settings, count=3)
    assert first.frames_decoded > 0 and first.frames_cached < first.frames_used
    assert second.frames_decoded < first.frames_decoded, "only what was fetched before the first epoch was through"
    for total in (third, fourth):
        assert total.frames_decoded == 0 and total.bytes_read == 0
        assert total.frames_cached == total.frames_used > 0
    assert same(again, warm)
    if not augmented:
        assert same(warm, epochs(split, config, replace(settings, dir=""), count=3)[0])
    else:  # augmented after the resize instead of before it
        for a, b in zip(warm, epochs(split, config, replace(settings, dir=""), count=3)[0], strict=True):
            assert np.array_equal(a.frame_numbers, b.frame_numbers)
            assert (a.frames - b.frames).abs().mean() < 0.03


def test_every_stored_frame_is_kept_where_the_pool_is_not_bounded(numbered, tmp_path):
    config = replace(SMALL, sampling="segment")
    settings = CacheConfig(dir=str(tmp_path), max_gb=1)
    warm, totals = epochs(numbered.intra, config, settings, count=3)
    assert totals[2].frames_decoded == 0
    assert same(warm, epochs(numbered.intra, config, count=3)[0]), (
        "with all frames kept, the draw is that without a cache"
    )
    with pytest.raises(ValueError, match=r"keep every frame of the videos in .*cache\.frames"):
        Loader(numbered.copy, config, batch_size=4, seed=0, cache=settings)


def test_what_does_not_fit_is_decoded(numbered, tmp_path):
    clip = 3 * 32 * 32 * 3
    settings = CacheConfig(dir=str(tmp_path), max_gb=5.5 * clip / 1e9)
    batches, (_, second) = epochs(numbered.intra, SMALL, settings)
    assert same(batches, epochs(numbered.intra)[0])
    assert 0 < second.frames_cached < second.frames_used
    assert second.frames_decoded == second.frames_used - second.frames_cached, (
        "and no more of a video than a clip shows"
    )
    data = next(tmp_path.glob("*.data"))
    assert data.stat().st_blocks * 512 <= 6 * clip + 8192


def test_a_cache_of_something_else_is_never_used(numbered, tmp_path):
    settings = CacheConfig(dir=str(tmp_path), max_gb=1)
    epochs(numbered.intra, SMALL, settings, count=1)
    for split, config in (
        (numbered.copy, SMALL),
        (numbered.intra, replace(SMALL, sampling="head")),
        (numbered.intra, replace(SMALL, image_size=24)),
        (numbered.intra, replace(SMALL, resize=40)),
        (numbered.intra, replace(SMALL, num_frames=2)),
        (numbered.intra, replace(SMALL, fps=2)),
    ):
        batches, (total,) = epochs(split, config, settings, count=1)
        # a video with two captions may come back within the epoch
        assert total.frames_decoded >= total.frames_used / 2 - 3
        assert same(batches, epochs(split, config, count=1)[0])
    assert len(list(tmp_path.glob("*.data"))) == 7


def test_ranks_share_one_cache(numbered, tmp_path):
    settings = CacheConfig(dir=str(tmp_path), max_gb=1)
    epochs(numbered.intra, SMALL, settings, count=1)
    for rank in range(2):
        _, (total,) = epochs(numbered.intra, SMALL, settings, count=1, rank=rank, world=2)
        assert total.frames_decoded == 0 and total.frames_used > 0


FILL = """
import sys
from pipelines.config import CacheConfig
from pipelines.loader import Loader
from shards.split import Split
from tests.pipelines.test_cache import SMALL
with Loader(Split(sys.argv[1]), SMALL, batch_size=4, seed=0, cache=CacheConfig(dir=sys.argv[2], max_gb=1)) as loader:
    for i, batch in enumerate(loader.batches()):
        print(i, flush=True)
"""
PUT = """
import sys
from tests.pipelines.fill import clip, opened
cache = opened(sys.argv[1])
for i in range(cache.videos):
    cache.put(i, clip(i))
    print(i, flush=True)
"""


def kill_after(program: str, arguments: list[str], line: int) -> None:
    """Run the program and kill it without notice as soon as it has printed this number."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}, text=True)
    for text in process.stdout:
        if int(text) >= line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_goes_on_with_its_cache(numbered, tmp_path):
    kill_after(FILL, [str(numbered.copy.path), str(tmp_path)], 0)
    batches, totals = epochs(numbered.copy, SMALL, CacheConfig(dir=str(tmp_path), max_gb=1))
    assert same(batches, epochs(numbered.copy)[0])
    assert totals[0].frames_cached > 0 and totals[1].frames_decoded == 0


def test_a_kill_in_the_middle_of_filling_leaves_no_wrong_frame(tmp_path):
    for attempt, line in enumerate((3, 150, 301)):
        folder = tmp_path / str(attempt)
        kill_after(PUT, [str(folder)], line)
        cache = fill.opened(folder)
        there = [i for i in range(cache.videos) if cache.get(i) is not None]
        assert line < len(there) < cache.videos
        assert all(np.array_equal(cache.get(i), fill.clip(i)) for i in there)
        for i in range(cache.videos):
            assert i in there or cache.put(i, fill.clip(i))
        assert all(np.array_equal(cache.get(i), fill.clip(i)) for i in range(cache.videos))
        cache.close()


def clips(count=6, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 255, (3, 8, 9, 3), dtype=np.uint8) for _ in range(count)]


def opened(folder, videos=6, gb=0.001, what=None) -> FrameCache:
    return FrameCache(CacheConfig(dir=str(folder), max_gb=gb), what or {"a": 1}, videos, 648)


def test_entries_without_their_clip_are_not_believed_after_the_machine_went_down(tmp_path, monkeypatch):
    first = opened(tmp_path)
    kept = clips()
    for i in range(4):
        assert first.put(i, kept[i])
    end = first.used_bytes
    first.close()
    # what a power cut may leave: entries on disk, some clips not; and a header from before them
    (data,) = tmp_path.glob("*.data")
    with open(data, "r+b") as file:
        file.seek(648)
        file.write(bytes(648))
    (index,) = tmp_path.glob("*.index")
    with open(index, "r+b") as file:
        file.seek(12)
        file.write(bytes(8))
    monkeypatch.setattr(cache_module, "_boot_id", lambda: b"another.")
    second = opened(tmp_path)
    assert second.used_bytes == end, "nothing is written over clips that are there"
    assert second.get(1) is None
    for i in (0, 2, 3):
        assert np.array_equal(second.get(i), kept[i])
    assert second.put(1, kept[1]) and np.array_equal(second.get(1), kept[1])
    assert all(np.array_equal(second.get(i), kept[i]) for i in range(4))
    second.close()


def test_a_torn_entry_reads_as_nothing(tmp_path):
    cache = opened(tmp_path)
    cache.put(2, clips()[2])
    (index,) = tmp_path.glob("*.index")
    with open(index, "r+b") as file:
        file.seek(64 + 2 * 32 + 1)
        file.write(b"\x07")
    assert cache.get(2) is None and cache.get(1) is None
    cache.close()


def test_a_full_disk_ends_the_filling_and_not_the_run(numbered, tmp_path, monkeypatch):
    write = os.pwrite

    def full(descriptor, data, at):
        if len(data) > 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, at)

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    with pytest.warns(UserWarning, match="no more frames are cached in .*No space left"):
        batches, _ = epochs(numbered.intra, SMALL, CacheConfig(dir=str(tmp_path), max_gb=1))
    monkeypatch.undo()
    assert same(batches, epochs(numbered.intra)[0])


def test_caches_nobody_uses_make_room_for_a_new_one(tmp_path):
    limit = 4 * 4096 / 1e9
    big = np.zeros((1, 64, 64, 1), np.uint8).repeat(3, 3)  # three blocks
    old = opened(tmp_path, gb=limit, what={"a": 1})
    old.put(0, big)
    used = opened(tmp_path, gb=limit, what={"a": 2})
    assert not used.put(0, big), "the folder's room is taken by one that is in use"
    old.close()
    used.close()
    time.sleep(0.01)
    new = FrameCache(CacheConfig(dir=str(tmp_path), max_gb=limit), {"a": 3}, 6, big.nbytes)
    assert new.put(0, big)
    assert len(list(tmp_path.glob("*.data"))) < 3
    new.close()

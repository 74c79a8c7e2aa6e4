"""What goes wrong while batches are made, and what becomes of it."""

import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from crc32c import crc32c

from pipelines.config import CacheConfig, DataConfig
from pipelines.lane import Lane, Request, Undecodable
from pipelines.loader import Loader
from pipelines.read import Reader
from pipelines.videos import VideoReader
from pipelines.workers import Hung, Workers
from shards import ShardError
from shards.remote import Unreachable
from shards.split import Split
from tests.pipelines.conftest import pack_videos
from tests.pipelines.test_loader import SMALL, run
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI


def undecodable(monkeypatch, keys: list[str]) -> None:
    """Have JPEGs of these videos arrive with a valid crc and a picture that no decoder takes."""
    fetch = Reader.jpegs

    def spoilt(self, video, positions):
        source = fetch(self, video, positions)
        if video.key in keys:
            source.pieces[-1] = np.frombuffer(b"\xff\xd8\xff\xe0" + bytes(200), np.uint8)
        return source

    monkeypatch.setattr(Reader, "jpegs", spoilt)


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
@pytest.mark.parametrize(
    ("cached", "at_once", "device"),
    [
        *((False, at_once, "cpu") for at_once in (100, 1, 3)),
        (True, 1, "cpu"),
        pytest.param(False, 100, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_clips_that_the_graph_rejects_are_found_and_replaced(numbered, monkeypatch, tmp_path, cached, at_once, device):
    bad = ["long_25", "wide_30"]
    healthy = run(numbered.intra, 6, device=device)
    # of few at a time, some of the batch after are under way when one fails
    monkeypatch.setattr("pipelines.lane._BYTES_A_THREAD", at_once * SMALL.num_frames * SMALL.image_size**2 * 3)
    undecodable(monkeypatch, bad)
    listed = tmp_path / "quarantine.jsonl"
    settings = CacheConfig(dir=str(tmp_path / "cache") if cached else "", max_gb=1)
    found = run(numbered.intra, 6, quarantine=listed, cache=settings, device=device)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {entry["key"] for entry in entries} == set(bad) and len(entries) == 2
    assert all("the decoder rejects it" in entry["reason"] for entry in entries)
    assert sum(batch.stats.bad for batch in found) >= 4
    for before, after in zip(healthy, found, strict=True):
        assert not set(bad) & set(after.keys) and len(set(after.keys)) == len(after.keys)
        for row, key in enumerate(before.keys):
            if key not in bad and row < len(after.keys) and after.keys[row] == key:
                assert torch.equal(after.frames[row], before.frames[row])


@pytest.mark.parametrize("at_once", [1, 3, 12])
def test_exactly_the_bad_clips_are_named(numbered, monkeypatch, at_once):
    monkeypatch.setattr("pipelines.lane._BYTES_A_THREAD", at_once * SMALL.num_frames * SMALL.image_size**2 * 3)
    undecodable(monkeypatch, ["short", "mpegts", "hevc_ntsc"])
    lane = Lane(numbered.intra, SMALL, torch.device("cpu"), 12)
    requests = [Request(numbered.intra.video(i), np.array([0])) for i in range(12)]
    sources = lane.read(requests)
    with pytest.raises(Undecodable) as caught:
        lane.decode(requests, sources)
    assert sorted(requests[i].video.key for i in caught.value.rows) == ["hevc_ntsc", "mpegts", "short"]
    good = [i for i in range(12) if i not in caught.value.rows]
    frames, mask = lane.decode([requests[i] for i in good], [sources[i] for i in good])
    assert mask[:, 0].all() and frames.shape[0] == 9, "and the lane goes on"
    for request, source, clip in zip([requests[i] for i in good], [sources[i] for i in good], frames, strict=True):
        assert torch.equal(lane.decode([request], [source])[0][0], clip), "whatever is decoded with it"
    lane.close()


def test_evaluation_names_a_video_that_the_graph_rejects(numbered, monkeypatch):
    undecodable(monkeypatch, ["short"])
    reader = VideoReader(numbered.intra, SMALL)
    with pytest.raises(ShardError, match="short cannot be evaluated: the decoder rejects it"):
        list(reader)
    reader.close()


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_a_read_that_hangs_is_given_up(numbered, monkeypatch, tmp_path):
    release, read = threading.Event(), Split.read

    def hanging(self, video, offset=0, size=-1):
        if video.key == "short":
            release.wait()
        return read(self, video, offset, size)

    monkeypatch.setattr(Split, "read", hanging)
    listed = tmp_path / "quarantine.jsonl"
    config = replace(SMALL, read_timeout_s=0.3)  # one thread: the next read needs another
    started = time.perf_counter()
    batches = run(numbered.intra, 6, config=config, quarantine=listed)
    assert time.perf_counter() - started < 15
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["key"] == "short" and "reading hangs: no answer for 0.3 s (data.read_timeout_s)" in entry["reason"]
    assert not any("short" in batch.keys for batch in batches)
    release.set()


def test_a_batch_is_handed_over_before_the_error_that_the_next_one_meets(numbered, monkeypatch):
    config = replace(SMALL, prefetch=1)
    with Loader(numbered.intra, config, batch_size=4, seed=0) as loader:
        keys = [batch.keys for batch in loader.batches(count=3)]
    fetch, broken = Lane._fetch, keys[2][0]

    def unreachable(self, request):
        if request.video.key == broken:
            raise Unreachable("no answer")
        return fetch(self, request)

    monkeypatch.setattr(Lane, "_fetch", unreachable)
    monkeypatch.setattr(Lane, "good", waiting(Lane.good))
    with Loader(numbered.intra, config, batch_size=4, seed=0) as loader:
        found = loader.batches(count=3)
        assert [next(found).keys for _ in range(2)] == keys[:2]
        with pytest.raises(Unreachable, match="no answer"):
            next(found)


def waiting(good):
    """Lane.good once all is fetched, whatever else the machine does."""

    def waited(self, reading):
        while reading.found is None and not reading.job.ready:
            time.sleep(0.001)
        return good(self, reading)

    return waited


def test_hung_items_do_not_take_the_others_along():
    release = threading.Event()

    def work(i):
        if i in (1, 3):
            release.wait()
        if i == 4:
            raise KeyError("four")
        return i * i

    workers = Workers(2, "test-work")
    results = workers.start(work, range(7)).results(timeout=0.2)
    assert [r for r in results if isinstance(r, int)] == [0, 4, 25, 36]
    assert isinstance(results[1], Hung) and isinstance(results[3], Hung) and isinstance(results[4], KeyError)
    release.set()
    assert workers.map(lambda i: i + 1, range(5)) == [1, 2, 3, 4, 5]
    workers.close()
    deadline = time.perf_counter() + 2
    while any(t.name.startswith("test-work") for t in threading.enumerate()) and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("test-work") for t in threading.enumerate())


@pytest.mark.timeout(60)
def test_shared_work_is_done_by_who_waits_for_it_and_raises_there():
    release = threading.Event()
    workers = Workers(2, "test-share")
    held = workers.start(lambda _: release.wait(), [0, 1])  # no worker is free
    caller, did = threading.current_thread(), []
    assert workers.share(lambda i: did.append(threading.current_thread()) or i * i, range(5)).finish() == [
        0,
        1,
        4,
        9,
        16,
    ]
    assert did == [caller] * 5
    with pytest.raises(ZeroDivisionError):
        workers.map(lambda i: 1 // i, [1, 0, 2])
    release.set()
    held.results()
    both = threading.Barrier(2, timeout=10)  # needs two threads at once
    workers.map(lambda i: both.wait(), range(2))
    workers.close()


@pytest.mark.timeout(60)
def test_a_loader_thread_that_dies_is_not_waited_for(numbered, monkeypatch):
    monkeypatch.setattr("pipelines.loader._produce", lambda *at: None)
    loader = Loader(numbered.intra, SMALL, batch_size=4, seed=0)
    with pytest.raises(RuntimeError, match="the loader's thread ended without a word"):
        next(loader.batches())
    loader.close()


def test_an_error_in_a_reading_thread_reaches_the_step(numbered, monkeypatch):
    def broken(self, video, positions):
        raise MemoryError("no room for a frame")

    monkeypatch.setattr(Reader, "jpegs", broken)
    with pytest.raises(MemoryError, match="no room for a frame"):
        run(numbered.intra, 2)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """120 tiny videos."""
    files = {f"v{i:03}.mp4": encode(4 + i % 3, size=(32, 32), options={"g": "4"}) for i in range(120)}
    folder = tmp_path_factory.mktemp("many")
    return {profile: pack_videos(folder / profile, files, profile, 1, short_side=32) for profile in ("intra", "copy")}


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_a_run_over_shards_with_one_video_in_twenty_damaged(many, profile, tmp_path):
    split = many[profile]
    shutil.copytree(split.path, tmp_path / "split")
    draw = np.random.default_rng(5)
    bad = sorted(draw.choice(120, 6, replace=False).tolist())
    for video in map(split.video, bad):  # one bit of a frame that every clip shows: the first
        at = video.offset + int(video.frames.offset[0]) + int(draw.integers(int(video.frames.size[0])))
        with open(tmp_path / "split" / f"{video.shard}.tar", "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0] ^ 1 << int(draw.integers(8))
            file.seek(at)
            file.write(bytes([byte]))
    listed, seen = tmp_path / "quarantine.jsonl", set()
    config = DataConfig(num_frames=2, image_size=32, max_words=8, threads=2, max_bad_fraction=0.1)
    loaders = [
        Loader(Split(tmp_path / "split"), config, batch_size=8, seed=3, rank=r, world=2, quarantine=listed)
        for r in (0, 1)
    ]
    for loader in loaders:
        with loader:
            for batch in loader.batches(count=2 * loader.steps_per_epoch):
                seen |= set(batch.keys)
    names = {split.video(i).key for i in bad}
    entries = [json.loads(line)["key"] for line in listed.read_text().splitlines()]
    assert sorted(entries) == sorted(names)
    assert seen == {split.video(i).key for i in range(120)} - names


def test_crc32c_tells_one_flipped_bit():
    data = bytearray(b"frame" * 100)
    before = crc32c(bytes(data))
    data[17] ^= 1
    assert crc32c(bytes(data)) != before


def test_a_job_behind_one_that_hangs_gets_done():
    release = threading.Event()
    workers = Workers(1, "test-behind")
    first = workers.start(lambda _: release.wait(), [0])
    second = workers.start(lambda i: i, [1, 2])
    assert second.results(timeout=0.2) == [1, 2]
    (result,) = first.results(timeout=0.2)
    assert isinstance(result, Hung)
    release.set()
    workers.close()


def test_a_graph_that_fails_puts_no_other_clip_into_the_cache(numbered, tmp_path, monkeypatch):
    """Groups that were under way when it failed come out as their own."""
    monkeypatch.setattr("pipelines.lane._BYTES_A_THREAD", SMALL.num_frames * SMALL.image_size**2 * 3)
    config = replace(SMALL, threads=1)  # a clip at a time
    requests = [Request(video, np.arange(2)) for video in map(numbered.intra.video, range(6))]
    plain = Lane(numbered.intra, config, torch.device("cpu"), 6)
    expected, _ = plain.decode(requests, plain.read(requests), raw=True)
    lane = Lane(numbered.intra, config, torch.device("cpu"), 6, cache=CacheConfig(dir=str(tmp_path)))
    sources = lane.read(requests)
    sources[0].pieces[0] = np.frombuffer(b"no picture", np.uint8)
    with pytest.raises(Undecodable) as error:
        lane.decode(requests, sources, raw=True)
    assert list(error.value.rows) == [0] and lane.cache.get(0) is None
    for i in range(1, 6):
        assert np.array_equal(lane.cache.get(i), expected[i, :2].numpy())
    plain.close(), lane.close()

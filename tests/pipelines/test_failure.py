"""What goes wrong while batches are made, and what becomes of it."""

import json
import shutil
import threading
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from crc32c import crc32c

from pipelines import running
from pipelines.config import CacheConfig, DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.lanes import Lane
from pipelines.loader import Loader
from pipelines.requests import ClipRequest
from pipelines.stages.fetch import Reader
from pipelines.workers import Hung, InOrder, Workers
from shards import ShardError
from shards.remote import Unreachable
from shards.split import Split
from tests.pipelines.conftest import pack_videos
from tests.pipelines.test_loader import SMALL, run, until
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI


def undecodable(monkeypatch, keys: list[str]) -> None:
    """Have JPEGs of these videos arrive with a valid crc, and with a picture that no decoder takes."""
    fetch = Reader.jpegs

    def spoilt(self, video, positions):
        source = fetch(self, video, positions)
        if video.key in keys:
            data = source.pieces[-1].tobytes()
            assert data[2:4] == b"\xff\xdb", "the quantisation table"
            source.pieces[-1] = np.frombuffer(data[:2] + data[2 + 2 + int.from_bytes(data[4:6], "big") :], np.uint8)
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
    monkeypatch.setattr("pipelines.lanes._BYTES_A_THREAD", at_once * SMALL.num_frames * SMALL.image_size**2 * 3)
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
        for row, (video, _) in enumerate(after.pairs.tolist()):  # what replaced a clip says what it is
            assert after.keys[row] == numbered.intra.video(video).id
            caption = numbered.intra.captions(video)[after.caption_numbers[row, 0]]
            assert after.captions[row] == caption["text"]


@pytest.mark.parametrize("at_once", [1, 3, 12])
def test_exactly_the_bad_clips_are_named(numbered, monkeypatch, at_once):
    monkeypatch.setattr("pipelines.lanes._BYTES_A_THREAD", at_once * SMALL.num_frames * SMALL.image_size**2 * 3)
    undecodable(monkeypatch, ["short", "mpegts", "hevc_ntsc"])
    lane = Lane(numbered.intra, SMALL, torch.device("cpu"), 12)
    requests = [ClipRequest(numbered.intra.video(i), np.array([0])) for i in range(12)]
    plan = lane.batch(requests)
    assert sorted(s.request.video.key for s in plan.clips if s.error) == ["hevc_ntsc", "mpegts", "short"]
    good = [sample.row for sample in plan.clips if not sample.error]
    again = lane.batch([requests[i] for i in good])
    assert lane.mask(again.clips, again.rows)[:, 0].all() and again.frames.shape[0] == 9, "and the lane goes on"
    for i, clip in zip(good, again.frames, strict=True):
        assert torch.equal(plan.frames[i], clip)
        assert torch.equal(lane.batch([requests[i]]).frames[0], clip), "whatever is decoded with it"
    lane.close()


def test_evaluation_names_a_video_that_the_graph_rejects(numbered, monkeypatch):
    undecodable(monkeypatch, ["short"])
    reader = EvalLoader(numbered.intra, SMALL)
    with pytest.raises(ShardError, match="short cannot be evaluated: the decoder rejects it"):
        list(reader)
    reader.close()


def test_videos_that_cannot_be_decoded_are_taken_note_of_where_that_is_asked_for(numbered, monkeypatch):
    whole = frames_of(EvalLoader(numbered.intra, SMALL))
    undecodable(monkeypatch, bad := ["short", "wide_30"])
    taken = {}
    found = frames_of(
        EvalLoader(numbered.intra, SMALL, bad=lambda video, reason: taken.update({video.index: str(reason)}))
    )
    rows = [i for i in range(len(whole)) if numbered.intra.video(i).id in bad]
    assert sorted(taken) == rows and len(whole) == len(found)
    assert set(taken.values()) == {"the decoder rejects it: Failed to decode"}
    for i, (frames, expected) in enumerate(zip(found, whole, strict=True)):
        assert torch.equal(frames, torch.zeros_like(frames) if i in rows else expected)


def frames_of(reader: EvalLoader) -> list[torch.Tensor]:
    try:
        return [clip for _, frames, _ in reader for clip in frames.clone()]
    finally:
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
    batches = run(numbered.intra, 6, config=config, quarantine=listed)
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["key"] == "short" and "reading hangs: no answer for 0.3 s (data.read_timeout_s)" in entry["reason"]
    assert not any("short" in batch.keys for batch in batches)
    release.set()


def test_a_batch_is_handed_over_before_the_error_that_the_next_one_meets(numbered, monkeypatch):
    config = replace(SMALL, prefetch=1)
    with Loader(numbered.intra, config, batch_size=4, seed=0) as loader:
        keys = [batch.keys for batch in loader.batches(count=3)]
    fetch, broken = Lane._source, keys[2][0]

    def unreachable(self, sample):
        if sample.request.video.key == broken:
            raise Unreachable("no answer")
        return fetch(self, sample)

    monkeypatch.setattr(Lane, "_source", unreachable)
    with Loader(numbered.intra, config, batch_size=4, seed=0) as loader:
        found = loader.batches(count=3)
        assert [next(found).keys for _ in range(2)] == keys[:2]
        with pytest.raises(Unreachable, match="no answer"):
            next(found)


def in_order(workers: Workers, function, items, timeout: float = 60, in_flight: int = 100) -> list:
    """What comes of each item: a result, or what was raised."""
    return list(InOrder(workers, function, iter(items), lambda item, result: result, in_flight, timeout))


def test_hung_items_do_not_take_the_others_along():
    release = threading.Event()

    def work(i):
        if i in (1, 3):
            release.wait()
        if i == 4:
            raise KeyError("four")
        return i * i

    workers = Workers(2, "test-work")
    results = in_order(workers, work, range(7), timeout=0.2)
    assert [r for r in results if isinstance(r, int)] == [0, 4, 25, 36]
    assert isinstance(results[1], Hung) and isinstance(results[3], Hung) and isinstance(results[4], KeyError)
    release.set()
    assert workers.map(lambda i: i + 1, range(5)) == [1, 2, 3, 4, 5]
    workers.close()
    until(lambda: not any(t.name.startswith("test-work") for t in threading.enumerate()))


@pytest.mark.timeout(60)
def test_shared_work_is_done_by_who_waits_for_it_and_raises_there():
    release = threading.Event()
    workers = Workers(2, "test-share")
    held = SimpleQueue()
    for number in range(2):  # no worker is free
        workers.submit(lambda _: release.wait(), None, number, lambda *what: held.put(what))
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
    assert {held.get(timeout=10) for _ in range(2)} == {(0, True), (1, True)}
    both = threading.Barrier(2, timeout=10)  # needs two threads at once
    workers.map(lambda i: both.wait(), range(2))
    workers.close()


@pytest.mark.timeout(60)
def test_a_loader_thread_that_dies_is_not_waited_for(numbered, monkeypatch):
    monkeypatch.setattr("pipelines.chain._make", lambda *at: None)
    loader = Loader(numbered.intra, SMALL, batch_size=4, seed=0)
    with pytest.raises(RuntimeError, match="the loader's thread ended without an error"):
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


def test_work_behind_an_item_that_hangs_gets_done():
    release = threading.Event()
    workers, done = Workers(1, "test-behind"), SimpleQueue()
    workers.submit(lambda _: release.wait(), None, 0, lambda *what: done.put(what))
    assert in_order(workers, lambda i: i, [1, 2], timeout=0.2) == [1, 2]
    number, result = done.get(timeout=10)
    assert number == 0 and isinstance(result, Hung)
    release.set()
    workers.close()


def test_a_stream_is_taken_a_bounded_way_ahead_and_what_it_raises_comes_last():
    taken, release = [], threading.Event()

    def source():
        for i in range(10):
            taken.append(i)
            yield i
        raise KeyError("the end")

    workers = Workers(2, "test-ahead")
    stream = InOrder(workers, lambda i: release.wait(10) and i, source(), lambda item, result: result, 4, 60)
    assert not stream.at_hand and taken == [], "nothing is begun before it is asked for"
    threading.Timer(0.05, release.set).start()
    assert next(stream) == 0 and taken == [0, 1, 2, 3]
    assert [next(stream) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(KeyError, match="the end"):
        next(stream)
    assert stream.at_hand
    workers.close()


def test_a_graph_that_fails_puts_no_other_clip_into_the_cache(numbered, tmp_path, monkeypatch):
    """Groups that were under way when it failed come out as their own."""
    monkeypatch.setattr("pipelines.lanes._BYTES_A_THREAD", SMALL.num_frames * SMALL.image_size**2 * 3)
    config = replace(SMALL, threads=1)  # a clip at a time
    requests = [ClipRequest(video, np.arange(2)) for video in map(numbered.intra.video, range(6))]
    plain = Lane(numbered.intra, config, torch.device("cpu"), 6, raw=True)
    expected = plain.batch(requests).frames
    undecodable(monkeypatch, [requests[0].video.key])
    lane = Lane(numbered.intra, config, torch.device("cpu"), 6, raw=True, cache=CacheConfig(dir=str(tmp_path)))
    assert [sample.row for sample in lane.batch(requests).clips if sample.error] == [0] and lane.cache.get(0) is None
    for i in range(1, 6):
        assert np.array_equal(lane.cache.get(i), expected[i, :2].numpy())
    plain.close(), lane.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Loader, EvalLoader])
def test_closing_does_not_wait_for_reads_that_hang(numbered, monkeypatch, tmp_path, kind):
    release, hanging = threading.Event(), threading.Event()

    def hang(self, video, offset=0, size=-1):
        hanging.set()
        release.wait()

    monkeypatch.setattr(Split, "read", hang)
    listed = tmp_path / "quarantine.jsonl"
    if kind is Loader:
        loader = Loader(numbered.intra, SMALL, batch_size=4, seed=0, quarantine=listed)
        stream = loader.batches()
    else:
        loader = EvalLoader(numbered.intra, SMALL)
        stream = iter(loader)
    reader = threading.Thread(target=lambda: next(stream, None), daemon=True)
    reader.start()
    hanging.wait()
    loader.close()  # a read may take a minute (data.read_timeout_s), and there are many
    reader.join()
    assert not listed.exists(), "nor is a video blamed"
    release.set()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Loader, EvalLoader])
def test_a_loader_that_is_closed_while_it_starts_ends(numbered, monkeypatch, kind):
    loader = (
        Loader(numbered.intra, SMALL, batch_size=4, seed=0) if kind is Loader else EvalLoader(numbered.intra, SMALL)
    )
    prefetch = running.Prefetch

    def start(*given):
        made = prefetch(*given)
        loader.close()  # another thread does, before the loader knows what it has started
        return made

    monkeypatch.setattr(running, "Prefetch", start)
    assert next(loader.batches() if kind is Loader else iter(loader), None) is None


def test_a_closed_loader_says_so(numbered):
    loader = Loader(numbered.intra, SMALL, batch_size=4, seed=0)
    loader.close()
    with pytest.raises(RuntimeError, match="this loader is closed"):
        next(loader.batches())
    with EvalLoader(numbered.intra, SMALL) as evaluation:
        pass
    with pytest.raises(RuntimeError, match="this loader is closed"):
        next(iter(evaluation))


def test_an_evaluation_that_was_left_can_begin_again(numbered):
    with EvalLoader(numbered.intra, replace(SMALL, eval_batch_size=2)) as loader:
        first = next(iter(loader))
        again = list(loader)
    assert len(again) == len(loader) and torch.equal(again[0][1], first[1])
    until(lambda: not any(t.name == "c4c-eval-loader" for t in threading.enumerate()))

"""Training from an object store, through a bounded folder of this machine."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.eval_loader import EvalLoader
from pipelines.loader import Loader
from pipelines.remote_prefetch import RemotePrefetch
from pipelines.requests import BatchPlan
from pipelines.segment_frames import Described
from pipelines.segment_lane import SegmentLane
from pipelines.segments import Cutting
from shards import ShardError, remote
from shards.annotations import Caption, Item
from shards.concat import Concat, open_splits
from shards.disk_cache import DiskCache, Full
from shards.remote import Local, RemoteFiles, Server, Unreachable, patiently
from shards.split import Split
from tests.buckets import object_store
from tests.pipelines.test_loader import SMALL, run
from tests.shards.sets import packed
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI

# ---- the folder ----


def held(folder: Path) -> int:
    """Bytes of disk that pieces take, whole ones and others."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.glob("*/*"))


def test_the_longest_unused_piece_makes_way_and_the_bound_holds(tmp_path):
    pieces = DiskCache(tmp_path, 100_000)
    fetched = []

    def get(i: int) -> bytes:
        fetched.append(i)
        return bytes([i]) * 20_000

    for i in range(4):  # 20 480 bytes of disk each
        pieces.read(f"set/{i}", lambda i=i: get(i))
        os.utime(tmp_path / f"set/{i}", (i, i))
    assert pieces.read("set/0", lambda: get(0), 5, 10, 20_000) == bytes(10)  # used again, so 1 is the oldest
    pieces.read("set/4", lambda: get(4))
    assert sorted(p.name for p in tmp_path.glob("set/*")) == ["0", "3", "4"] or not (tmp_path / "set/1").exists()
    assert (tmp_path / "set/0").exists() and held(tmp_path) <= 100_000
    assert fetched == [0, 1, 2, 3, 4]
    with pytest.raises(Full, match=r"more than .* raise data\.local_gb"):
        pieces.bring("set/large", lambda: bytes(200_000))
    assert not list(tmp_path.glob("set/*.part"))


def test_what_is_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.disk_cache._FULL_WAIT", 0.1)
    pieces = DiskCache(tmp_path, 50_000)
    for i in (0, 1):
        pieces.bring(f"set/{i}", lambda: bytes(20_000))
    with open(tmp_path / "set/0", "rb") as first, open(tmp_path / "set/1", "rb") as second:
        fcntl.flock(first, fcntl.LOCK_SH)
        fcntl.flock(second, fcntl.LOCK_SH)
        with pytest.raises(Full, match="full of files that running processes use"):
            pieces.bring("set/2", lambda: bytes(20_000))
        fcntl.flock(second, fcntl.LOCK_UN)
        pieces.bring("set/2", lambda: bytes(20_000))
    assert sorted(p.name for p in tmp_path.glob("set/*")) == ["0", "2"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    pieces = DiskCache(tmp_path, 50_000)
    pieces.bring("set/0", lambda: bytes(20_000))
    (tmp_path / "set/1.part").write_bytes(bytes(20_000))  # nobody has it locked
    (tmp_path / "set/0").write_bytes(bytes(100))  # as after a crash of the machine: shorter than it was
    assert pieces.read("set/0", lambda: b"\1" * 20_000, 0, 4, 20_000) == b"\1\1\1\1"
    pieces.bring("set/2", lambda: bytes(20_000))
    assert not (tmp_path / "set/1.part").exists() and held(tmp_path) <= 50_000
    assert pieces.bring("set/1", lambda: b"x") == b"x"


def _hammer(folder: str, seed: int, fetched) -> None:
    import random

    pieces, draw = DiskCache(Path(folder), 300_000), random.Random(seed)
    for _ in range(150):
        i = draw.randrange(30)

        def get(i: int = i) -> bytes:
            with fetched.get_lock():
                fetched.value += 1
            return bytes([i]) * (5_000 + 500 * i)

        start = draw.randrange(4_000)
        assert pieces.read(f"set/{i}", get, start, 100, 5_000 + 500 * i) == bytes([i]) * 100


def test_processes_and_threads_share_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    fetched = context.Value("i", 0)
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed, fetched)) for seed in range(3)]
    for process in processes:
        process.start()
    worst = 0
    while any(p.is_alive() for p in processes):
        worst = max(worst, held_now(tmp_path))
        time.sleep(0.002)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert worst <= 300_000 and held(tmp_path) <= 300_000 and 30 <= fetched.value < 450


def held_now(folder: Path) -> int:
    total = 0
    for p in folder.glob("*/*"):
        try:
            total += -(-p.stat().st_size // 4096) * 4096
        except FileNotFoundError:
            continue
    return total


def test_one_of_many_fetches(tmp_path):
    pieces, fetched, go = DiskCache(tmp_path, 10**6), [], threading.Barrier(8)

    def get() -> bytes:
        fetched.append(1)
        time.sleep(0.05)
        return b"once"

    def read() -> None:
        go.wait()
        assert pieces.read("set/a", get) == b"once"

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [1]


# ---- fetching ahead ----


def test_so_many_batches_are_fetched_ahead_and_no_more_than_fit():
    done, idle = [], threading.Event()

    def bring(request: int) -> int:
        idle.set()
        if request == 3:
            raise OSError("left for whoever reads the clip")
        done.append(request)
        return 60

    def samples(count: int):
        for place in range(count):
            plan = BatchPlan(place, 1, 1)
            plan.add(place)
            yield plan.samples[0]

    def settled() -> list[int]:
        while idle.is_set():  # until nothing has been fetched for a while
            idle.clear()
            idle.wait(0.2)
        got = sorted(done)
        done.clear()
        return got

    def fetched(stream) -> list[int]:
        idle.set()
        next(stream)
        return settled()

    wide, narrow = RemotePrefetch(bring, 4, 10**6)(samples(12)), RemotePrefetch(bring, 4, 100)(samples(12))
    assert [fetched(wide) for _ in range(9)] == [[0, 1, 2, 4], [5], [6], [7], [8], [9], [10], [11], []]
    assert [s.batch.place for s in wide] == [9, 10, 11]
    wide.close()
    assert fetched(narrow) == [0, 1, 2], "the next batch's whatever they take, then what there is room for"
    assert fetched(narrow) + fetched(narrow) == [4, 5]
    narrow.close()


def test_what_the_stream_raises_comes_behind_the_samples_before():
    def samples():
        for place in range(3):
            plan = BatchPlan(place, 1, 1)
            plan.add(place)
            yield plan.samples[0]
        raise KeyError("no table")

    stream = RemotePrefetch(lambda request: 0, 16, 10**6)(samples())
    assert [next(stream).batch.place for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(KeyError, match="no table"):
            next(stream)
    stream.close()


# ---- the server ----


@pytest.fixture(scope="module")
def store():
    """An S3 server that can be stopped and started again; its environment is set for s3fs."""
    with object_store() as (server, _):
        import s3fs

        yield server, s3fs.S3FileSystem()


@pytest.fixture(scope="module")
def url(store, numbered) -> dict[str, str]:
    """The numbered videos as intra and copy, on the server."""
    _, files = store
    files.mkdir("sets")
    for profile in ("intra", "copy"):
        files.put(f"{getattr(numbered, profile).path}/", f"sets/{profile}/", recursive=True)
    return {profile: f"s3://sets/{profile}" for profile in ("intra", "copy")}


def at(url: str, folder: Path, gb: float = 0.05, patience: float = 20.0) -> Split:
    return Split(url, Local(folder, gb, patience))


def same(a, b) -> bool:
    return a.keys == b.keys and a.captions == b.captions and torch.equal(a.frames, b.frames)


@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_batches_are_those_of_the_local_split(numbered, url, tmp_path, monkeypatch, profile):
    monkeypatch.setattr(remote, "WHOLE", 0 if profile == "copy" else remote.WHOLE)  # by videos, and by whole tars
    monkeypatch.setattr(remote, "PIECE", 20_000)
    here = run(getattr(numbered, profile), 8)
    config = replace(SMALL, local_gb=0.05, ahead=3)
    there = run(at(url[profile], tmp_path), 8, config=config)
    assert all(map(same, here, there)) and len(there) == 8
    assert 0 < held(tmp_path) <= 0.05e9
    names = {p.name for p in tmp_path.glob("*/*")}
    assert any(name.endswith(".tar") for name in names) == (profile == "intra")


def test_requests_that_fail_are_tried_again_and_others_see_nothing(numbered, url, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WHOLE", 0)
    monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.02))
    split, asked = at(url["intra"], tmp_path, 0.001), []
    ask = split.remote._fs.cat_file

    def flaky(path, **options):
        asked.append(path)
        if len(asked) % 3 == 0:
            raise ConnectionResetError("reset by peer")
        data = ask(path, **options)
        return data[:-1] if len(asked) % 7 == 0 and options.get("start") is not None else data

    monkeypatch.setattr(split.remote._fs, "cat_file", flaky)
    here = run(numbered.intra, 8)
    there = run(split, 8, config=replace(SMALL, local_gb=0.001))
    assert all(map(same, here, there)) and len(asked) > 15
    assert held(tmp_path) <= 0.001e9


def test_a_restart_of_the_server_is_waited_out(numbered, url, store, tmp_path, monkeypatch):
    server, _ = store
    host, port = server.get_host_and_port()
    split = at(url["copy"], tmp_path)
    here, there = run(numbered.copy, 9), []
    monkeypatch.setattr(remote, "WHOLE", 0)
    with Loader(split, replace(SMALL, ahead=0, prefetch=1), batch_size=4, seed=0) as loader:
        for batch in loader.batches(count=9):
            there.append(batch)
            if len(there) == 1:
                server._server.shutdown()
                server._server.server_close()
                threading.Timer(1.0, lambda: restart(server, host, port)).start()
    assert all(map(same, here, there)) and len(there) == 9


def restart(server, host: str, port: int) -> None:
    """The same server, with what it held, at the same address."""
    from werkzeug.serving import make_server

    server._server = make_server(host, port, server._server.app, True)
    threading.Thread(target=server._server.serve_forever, daemon=True).start()


def test_evaluation_reads_it_too_and_ahead(numbered, url, tmp_path, monkeypatch):
    found, remote, by = {}, at(url["intra"], tmp_path), set()
    fetch = remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda *at: (by.add(threading.current_thread().name), fetch(*at))[1])
    for name, split in (("here", numbered.intra), ("there", remote)):
        reader = EvalLoader(split, SMALL)
        found[name] = [frames for _, frames, _ in reader]
        reader.close()
    assert all(map(torch.equal, found["here"], found["there"])) and len(found["here"]) > 0
    assert by and all(name.startswith("c4c-fetch") for name in by)


def test_a_local_copy_that_is_damaged_is_fetched_again(numbered, url, tmp_path):
    split = at(url["intra"], tmp_path)
    run(split, 3)
    for tar in tmp_path.glob("*/*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    assert all(map(same, run(numbered.intra, 3), run(split, 3)))
    for table in tmp_path.glob("*/*.parquet"):
        table.write_bytes(b"nothing")
    assert all(map(same, run(numbered.intra, 3), run(at(url["intra"], tmp_path), 3)))


def test_an_index_fetches_a_local_copy_that_is_damaged_again(numbered, url, tmp_path):
    split = at(url["copy"], tmp_path)
    chosen, config = ("mpegts", "short", "one_frame"), SMALL.filled()

    def read(split: Split) -> dict[str, list]:
        lane, found = SegmentLane(split, config, torch.device("cpu"), Cutting(0, 0)), {}
        for video in map(split.find, chosen):
            for event in lane.read(video):
                if isinstance(event, Described):  # decoding starts, or starts anew
                    found[video.id] = []
                else:
                    found[video.id].append(event.pixels.tobytes())
        return found

    expected = read(numbered.copy)
    assert read(split) == expected
    for tar in tmp_path.glob("*/*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    assert read(split) == expected


def test_pieces_of_a_split_that_is_laid_out_anew_are_others(store, tmp_path):
    _, files = store
    (tmp_path / "a.mp4").write_bytes(encode(5, 20, (64, 64)))
    digests, read = set(), []
    for meta in ({}, {"longer": "x" * 700}):
        items = [Item(id, tmp_path / "a.mp4", (Caption("x"),), meta) for id in "ab"]
        packed(items, tmp_path / "set", workers=1, update=True)
        files.put(f"{tmp_path}/set/", "sets/anew/", recursive=True)
        split = at("s3://sets/anew", tmp_path / "local")
        digests.add(split.digest)
        read.append(split.read(split.video(1)))
    assert len(digests) == 1 and read == [(tmp_path / "a.mp4").read_bytes()] * 2


def test_a_server_that_stays_away_ends_the_run(url, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise ConnectionRefusedError("connection refused")

    split = at(url["intra"], tmp_path, patience=0.3)
    monkeypatch.setattr(split.remote._fs, "cat_file", gone)
    with pytest.raises(Unreachable, match=r"cannot be reached, for \d+ s now \(connection refused\).*server_timeout_s"):
        run(split, 2)


def test_a_folder_that_is_too_small_ends_the_run_and_blames_no_video(url, tmp_path):
    with pytest.raises(Full, match=r"000000\.tar takes \d+ bytes, more than"):
        run(at(url["intra"], tmp_path, gb=0.00005), 2, config=replace(SMALL, local_gb=0.00005))


def test_what_can_never_succeed_is_said_at_once(url, tmp_path, store):
    with pytest.raises(ShardError, match=r"sets/nothing/dataset\.json is missing"):
        at("s3://sets/nothing", tmp_path)

    def refused(_):
        raise PermissionError("Access Denied")

    with pytest.raises(ShardError, match="may not be read: Access Denied"):
        patiently(refused, "s3://x", 60, Server())
    with pytest.raises(TypeError):
        patiently(lambda _: None + 1, "s3://x", 60, Server())
    assert isinstance(open_splits([url["intra"], url["copy"]], Local(tmp_path)), Concat)
    assert isinstance(at(url["intra"], tmp_path).remote, RemoteFiles)

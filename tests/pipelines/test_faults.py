"""Faults of disks, servers and limits, injected: none of them is blamed on a video, and none is kept."""

from __future__ import annotations

import contextlib
import errno
import gc
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.loader import Loader
from pipelines.quarantine import Quarantine
from pipelines.stages.fetch import Reader
from shards import ShardError, remote
from shards.remote import Local, Refused, Unreachable
from shards.split import Split
from tests.pipelines.test_loader import SMALL, run, same

pytestmark = pytest.mark.slow  # imports DALI

# ---- reading ----


def failing(monkeypatch, kind: str, once: bool) -> list[tuple[int, int]]:
    """Have the first read of each place fail, or each read; returns the places as they come."""
    pread, seen = os.pread, []

    def read(descriptor: int, size: int, offset: int) -> bytes:
        place, first = (offset, size), (offset, size) not in seen
        seen.append(place)
        if first or not once:
            if kind == "short":
                return pread(descriptor, size // 2, offset) if offset % 2 else b""
            raise MemoryError if kind == "memory" else OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        return pread(descriptor, size, offset)

    monkeypatch.setattr("shards.open_files.os.pread", read)
    return seen


@pytest.mark.parametrize("kind", ["EIO", "ENOMEM", "ESTALE", "short", "memory"])
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_a_read_that_fails_once_is_done_again(numbered, monkeypatch, tmp_path, kind, profile):
    split, listed = getattr(numbered, profile), tmp_path / "quarantine.jsonl"
    whole = run(split, 2)
    monkeypatch.setattr("pipelines.stages.fetch._PAUSE", 0.01)
    seen = failing(monkeypatch, kind, once=True)
    found = run(Split(split.path), 2, quarantine=listed)
    assert all(map(same, whole, found)) and seen and not listed.exists()


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_a_read_that_keeps_failing_is_a_bad_sample(numbered, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.stages.fetch._PAUSE", 0.01)
    failing(monkeypatch, "EIO", once=False)
    with pytest.raises(ShardError, match=r"Input/output error|no video of .* can be read"):
        run(Split(numbered.intra.path), 2, quarantine=tmp_path / "quarantine.jsonl")
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert lines and all("Input/output error" in json.loads(line)["reason"] for line in lines)


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_a_torn_line_of_the_quarantine_is_passed_over(numbered, tmp_path):
    listed, videos = tmp_path / "quarantine.jsonl", [numbered.intra.video(i) for i in range(2)]
    Quarantine(numbered.intra.path, listed, 0.5).report(videos[0], ValueError("first"))
    whole = listed.read_text()
    listed.write_text(whole + whole[: len(whole) // 2])
    for _ in range(2):  # the second time it is listed already
        Quarantine(numbered.intra.path, listed, 0.5).report(videos[1], ValueError("second"))
    first, torn, second = listed.read_text().splitlines()
    assert [json.loads(line)["id"] for line in (first, second)] == [video.id for video in videos] and whole.startswith(
        torn
    )


# ---- open files ----

SHARDS = 60
OPEN_ALL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from shards.open_files import NoMoreFiles
from shards.split import Split
splits = [Split(sys.argv[1]) for _ in range(2)]
for i in range(len(splits[0])):
    for split in splits:
        assert len(split.read(split.video(i))) == split.video(i).size
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(46 - len(os.listdir("/proc/self/fd")))]
for i in range(len(splits[0])):
    splits[0].read(splits[0].video(i))
splits[0].close(), splits[1].close()
while True:
    try:
        kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
try:
    splits[0].read(splits[0].video(0))
except NoMoreFiles as error:
    print(error)
"""


@pytest.fixture(scope="module")
def many_shards(numbered, tmp_path_factory) -> Path:
    """The same videos in sixty shards of one name each; only good to be read."""
    folder = tmp_path_factory.mktemp("shards") / "split"
    shutil.copytree(numbered.intra.path, folder)
    info = json.loads((folder / "dataset.json").read_text())
    (first,) = info["shards"]
    for i in range(1, SHARDS):
        for suffix in ("tar", "idx", "parquet"):
            shutil.copy(folder / f"000000.{suffix}", folder / f"{i:06d}.{suffix}")
    info["shards"] = [first | {"name": f"{i:06d}"} for i in range(SHARDS)]
    info |= {what: SHARDS * info[what] for what in ("videos", "captions")}
    (folder / "dataset.json").write_text(json.dumps(info))
    (folder / "captions.npy").unlink()
    return folder


def test_open_files_follow_the_limit_of_the_process(many_shards):
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(many_shards)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "000000.tar cannot be opened: this process may have 48 files open" in done.stdout
    assert "No file is damaged" in done.stdout and "ulimit -n" in done.stdout


def test_the_limit_is_blamed_on_no_video(numbered, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    split = Split(numbered.intra.path)
    video = split.video(0)
    monkeypatch.setattr("shards.open_files.os.open", full)
    with pytest.raises(ShardError, match=r"cannot be opened: this process may have \d+ files open.*ulimit -n"):
        Reader(split).jpegs(video, np.array([0]))


# ---- loaders that are dropped ----


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("c4c-")]


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(before: list[str], most: int) -> None:
    """Waits until threads and handles are what they were."""
    deadline = time.monotonic() + 20
    while (len(ours()) > len(before) or handles() > most) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert len(ours()) <= len(before) and handles() <= most, (ours(), handles(), most)


def dropped(split: Split, how: str, config: DataConfig) -> None:
    loader = Loader(split, config, batch_size=4, seed=0)
    if how == "unused":
        return
    found = loader.batches()
    next(found)
    if how == "full":  # all that is made ahead waits in the queue
        time.sleep(1)
    if how == "half of a batch":
        raise ZeroDivisionError
    assert ours()


@pytest.mark.parametrize("how", ["unused", "begun", "full", "half of a batch"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_loader_that_is_dropped_gives_back_all_it_has(numbered, store, tmp_path, how, place):
    split = Split(store, Local(tmp_path, 0.05, 5)) if place == "remote" else Split(numbered.intra.path)
    config = replace(SMALL, local_gb=0.05)
    run(split, 1, config=config)  # what is made once a process
    gc.collect()
    before, most = ours(), handles() + 1  # a tar may stay open in the split
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError):
            dropped(split, how, config)
    settled(before, most)


def test_a_reader_that_is_dropped_gives_back_all_it_has(numbered, store, tmp_path):
    for split in (Split(numbered.intra.path), Split(store, Local(tmp_path, 0.05, 5))):
        config = replace(SMALL, local_gb=0.05)
        run(split, 1, config=config)
        before, most = ours(), handles() + 1
        next(iter(EvalLoader(split, config)))
        settled(before, most)


def test_a_loader_that_failed_gives_back_all_it_has(numbered, monkeypatch):
    run(numbered.intra, 1)
    before, most = ours(), handles() + 1
    monkeypatch.setattr("pipelines.loader._Batching.__call__", lambda self, *at: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        next(Loader(numbered.intra, SMALL, batch_size=4, seed=0).batches())
    settled(before, most)
    Loader(numbered.intra, replace(SMALL, prefetch=1), batch_size=4, seed=0).batches()  # not even begun
    settled(before, most)


# ---- servers ----


@pytest.fixture
def store(numbered) -> str:
    """The numbered videos on a server, in memory; two captions each, so that captions.npy is read."""
    files = fsspec.filesystem("memory")
    files.put(f"{numbered.intra.path}/", "/sets/intra/", recursive=True)
    yield "memory://sets/intra"
    files.rm("/sets", recursive=True)


def answering(split: Split, monkeypatch, answer) -> list[str]:
    """Have `answer(name, data)` say what comes of a file; returns the names of what was asked for."""
    ask, asked = split.remote._fs.cat_file, []

    def cat(path, **options):
        asked.append(path.rsplit("/", 1)[-1])
        return answer(asked[-1], lambda: ask(path, **options))

    monkeypatch.setattr(split.remote._fs, "cat_file", cat)
    return asked


def test_wrong_caption_counts_are_fetched_again(numbered, store, tmp_path, monkeypatch):
    split = Split(store, Local(tmp_path, 0.05, 5))
    wrong = iter([b"<html>a proxy's page</html>"])
    asked = answering(split, monkeypatch, lambda name, get: next(wrong, None) or get())
    assert split.caption_counts.tolist() == numbered.intra.caption_counts.tolist()
    assert asked == ["captions.npy"] * 2
    assert Split(store, Local(tmp_path, 0.05, 5)).caption_counts.sum() == 24
    assert asked[2:] == ["dataset.json"], "the right ones are kept"


def test_caption_counts_that_stay_wrong_are_not_kept(store, tmp_path, monkeypatch):
    split = Split(store, Local(tmp_path, 0.05, 5))
    asked = answering(split, monkeypatch, lambda name, get: b"no counts")
    with pytest.raises(
        ShardError, match=rf"captions\.npy cannot be read .*Upload it again.*No copy of it .*{tmp_path}"
    ):
        _ = split.caption_counts
    assert asked == ["captions.npy"] * 2 and not list(tmp_path.glob("*/captions.npy"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_ends_the_run_at_once_and_says_so(store, tmp_path, monkeypatch, status):
    class HTTPError(Exception):
        def __init__(self):
            super().__init__(f"{status} refused")
            self.status = status

    def answer(name, get):
        if name.endswith(".tar"):
            raise HTTPError
        return get()

    split = Split(store, Local(tmp_path, 0.05, 3600))  # which is not waited for
    answering(split, monkeypatch, answer)
    listed = tmp_path / "quarantine.jsonl"
    with pytest.raises(Refused, match=rf"000000\.tar may not be read: {status} refused.*credentials"):
        run(split, 2, config=replace(SMALL, local_gb=0.05), quarantine=listed)
    assert not listed.exists() and issubclass(Refused, Unreachable)


def test_names_on_a_server_lead_nowhere(store, tmp_path):
    files = fsspec.filesystem("memory")
    info = json.loads(files.cat_file("/sets/intra/dataset.json"))
    files.pipe_file("/sets/intra/dataset.json", json.dumps(info | {"name": "../../out", "split": "/x"}).encode())
    split = Split(store, Local(tmp_path / "local", 0.05, 5))
    assert split.captions(0) and {p.name for p in tmp_path.iterdir()} == {"local"}
    info["shards"][0]["name"] = "../000000"
    files.pipe_file("/sets/intra/dataset.json", json.dumps(info).encode())
    with pytest.raises(ShardError, match=r"dataset\.json is damaged: the name of shard 0 is '\.\./000000'\. Upload"):
        Split(store, Local(tmp_path / "local", 0.05, 5))


class Broken(http.server.SimpleHTTPRequestHandler):
    """Serves files, and when told to goes wrong in one way with all but dataset.json and the sample tables."""

    fault = ""

    def do_GET(self):
        if not self.path.endswith(".tar") or not self.fault:
            return super().do_GET()
        if self.fault == "500":
            return self.send_error(500)
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(bytes(1000))
        self.wfile.flush()
        if self.fault == "hangs":
            time.sleep(20)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("fault", ["500", "drops", "hangs"])
def test_all_threads_share_one_patience_with_a_server(numbered, tmp_path, monkeypatch, fault):
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Broken,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(numbered.intra.path)))
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    split = Split(f"http://127.0.0.1:{server.server_port}", Local(tmp_path, 0.05, 2.0))
    whole = run(split, 2, config=replace(SMALL, local_gb=0.05))
    assert all(map(same, run(numbered.intra, 2), whole))
    shutil.rmtree(next(tmp_path.glob("*/*.tar")).parent)
    monkeypatch.setattr(remote, "WHOLE", 0)  # pieces, which many threads fetch
    handler.fault, listed = fault, tmp_path / "quarantine.jsonl"
    with pytest.raises(Unreachable, match=r"000000\.tar cannot be re.*server_timeout_s"):
        run(split, 2, config=replace(SMALL, local_gb=0.05), quarantine=listed)
    assert not listed.exists()
    handler.fault = ""  # and it is well again
    assert all(map(same, run(Split(str(split.path), Local(tmp_path, 0.05, 2.0)), 2), whole))
    server.shutdown()

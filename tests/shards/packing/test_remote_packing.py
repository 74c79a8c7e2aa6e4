"""Packing on a Dask cluster, from web servers, and from and to object stores."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from upath import UPath

from c4c.shard import main
from shards import ShardError, storage
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.packing.worker import Job, pack_shard
from shards.schema import REJECTS
from shards.tools.verify import verify
from tests.shards.packing.same import same
from tests.shards.sets import COPY, INTRA, files, packed

# ---- Dask ----


@pytest.fixture
def cluster():
    """A Dask scheduler and two workers, each a process of its own; yields (address, worker processes)."""
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error",
    }
    start = functools.partial(subprocess.Popen, env=environment, **quiet)
    dask = [sys.executable, "-m", "distributed.cli"]
    processes = [start([*dask[:2], "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"])]
    worker = [*dask[:2], "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    processes += [start([*worker, "--death-timeout", "20"]) for _ in range(2)]
    yield address, processes[1:]
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.network
def test_a_lost_dask_worker_costs_nothing(cluster, eight: list[Item], whole: dict, tmp_path: Path) -> None:
    address, workers = cluster
    out, events = tmp_path / "train", []

    def lose_one(event) -> None:
        events.append(event)
        if len(events) == 1:
            workers[0].send_signal(signal.SIGKILL)

    info = packed(eight, out, shard_videos=2, cluster=address, on_progress=lose_one)
    assert files(out) == whole and len(events) == 8
    assert workers[0].wait(5) == -signal.SIGKILL and workers[1].poll() is None
    assert info["rejected_videos"] == 1


def test_no_dask_is_said(eight: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dask.distributed", None)
        with pytest.raises(ShardError, match=r"pip install 'c4c\[dask\]'"):
            packed(eight, tmp_path, cluster="tcp://127.0.0.1:9")


# ---- object stores and web servers ----


class Web(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and trouble: v3 breaks off twice before it comes, v6 is forbidden, v7 always fails."""

    trouble: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        nth = self.trouble[name] = self.trouble.get(name, 0) + 1
        if name == "v3.mp4" and nth <= 2:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif name in ("v6.mp4", "v7.mp4"):
            self.send_error(403 if name == "v6.mp4" else 503)
        else:
            super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def web(folder: Path):
    Web.trouble.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.network
def test_videos_come_from_a_web_server(web: str, eight: list[Item], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE", 0.01)
    remote = [replace(item, path=UPath(f"{web}/{item.path.name}")) for item in eight]
    remote.append(Item("gone", UPath(f"{web}/gone.mp4"), (Caption("c"),)))
    there, here = tmp_path / "remote", tmp_path / "local"
    for out, items in ((there, remote), (here, [item for item in eight if item.id not in ("v5", "v6", "v7")])):
        out.mkdir()
        pack_shard(Job("000000", tuple(items), out, INTRA))
    assert (there / "000000.tar").read_bytes() == (here / "000000.tar").read_bytes()
    rejects = json.loads(pq.read_schema(there / "000000.parquet").metadata[REJECTS])
    reasons = {r["id"]: r["reason"] for r in rejects}
    assert reasons.pop("v5").startswith("not a readable video file")
    assert reasons == {
        "v6": "the server answers 403", "v7": "the server answers 503", "gone": "the file is missing",
    }  # fmt: skip
    assert [Web.trouble[f"v{i}.mp4"] for i in (3, 6, 7)] == [3, 1, 4]


def test_a_network_that_is_down_ends_the_run(eight: list[Item], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v.mp4"
    with pytest.raises(ShardError, match=r"v\.mp4 cannot be reached .*network is back"):
        pack_shard(Job("000000", (eight[0], Item("v", UPath(nobody), (Caption("c"),))), tmp_path, COPY))
    assert not files(tmp_path)


def test_protocols_say_what_they_need(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SystemExit):
        main(["folder", "--videos", ".", "--out", "gs://bucket/x"])
    assert "pip install gcsfs" in capsys.readouterr().err
    with pytest.raises(ShardError, match="pip install gcsfs"):
        storage.place("gs://bucket/x")
    with pytest.raises(ShardError, match="nonsense"):
        storage.place("nonsense://bucket/x")
    with pytest.raises(ShardError, match="a web server cannot be written to"):
        storage.output(UPath("http://127.0.0.1/x"))
    assert storage.place("a/b") == Path("a/b")


@pytest.mark.network
def test_a_bucket_to_read_from_and_to_write_to(bucket: str, eight: list[Item], whole: dict, tmp_path: Path) -> None:
    fs = UPath(bucket).fs
    for item in eight:
        fs.put_file(str(item.path), f"bucket/videos/{item.path.name}")
    remote = [replace(item, path=UPath(f"{bucket}/videos/{item.path.name}")) for item in eight]
    out = storage.place(f"{bucket}/sets/train")

    def there() -> dict[str, bytes]:
        fs.invalidate_cache()
        return {p.rsplit("/", 1)[1]: fs.cat_file(p) for p in fs.ls("bucket/sets/train")}

    def run(**options) -> dict:
        return pack(remote, out, dataset="set", split="train", profile=COPY, shard_videos=2, workers=1, **options)

    class Stop(Exception):
        pass

    def stop(event) -> None:
        if event.rejected:
            raise Stop

    with pytest.raises(Stop):
        run(on_progress=stop)
    assert "packing.json" in there() and "dataset.json" not in there()
    starts = []
    run(on_start=lambda *a: starts.append(a))
    assert starts[0][0] >= 4  # it went on
    fs.rm_file("bucket/sets/train/000001.idx")
    run(on_start=lambda *a: starts.append(a))
    assert starts[1] == (6, 8)
    same(there(), whole)
    again = run(on_start=lambda *a: starts.append(a))
    assert again == json.loads(there()["dataset.json"]) and starts[2] == (8, 8)
    with pytest.raises(ShardError, match="different packing"):
        pack(remote[:-1], out, dataset="set", split="train", profile=COPY, shard_videos=2)
    local = tmp_path / "copy"
    fs.get("bucket/sets/train", str(local), recursive=True)
    assert not verify(local, 1)

"""Packing beyond one machine and one good day: parts, Dask, object stores, videos that hang or kill, hostile names."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
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
from shards import ShardError, VideoError, storage
from shards.annotations import Caption, Item
from shards.packing.pack import finish_parts, missing, pack
from shards.packing.worker import Job, pack_shard
from shards.schema import REJECTS
from shards.split import Split
from shards.tar import MAX_KEY, read_members, safe_key
from shards.tools.verify import verify
from tests.shards.sets import COPY, INTRA, files, packed
from tests.videos import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small videos with their csv; one of them is none."""
    out = tmp_path_factory.mktemp("eight")
    for i in range(8):
        (out / f"v{i}.mp4").write_bytes(encode(8 + i, 12, (64, 48)) if i != 5 else b"no video")
    (out / "captions.csv").write_text("video,caption\n" + "".join(f"v{i}.mp4,caption {i}\n" for i in range(8)))
    return out


@pytest.fixture(scope="module")
def eight(folder: Path) -> list[Item]:
    return [Item(f"v{i}", folder / f"v{i}.mp4", (Caption(f"caption {i}"),)) for i in range(8)]


@pytest.fixture(scope="module")
def whole(eight: list[Item], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the eight packed at once."""
    out = tmp_path_factory.mktemp("whole") / "train"
    packed(eight, out, workers=1)
    return files(out)


def same(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Equal but for where rejected sources lay, which the parquet and rejects.jsonl tell."""
    assert found.keys() == whole.keys()
    for name, data in whole.items():
        if name.endswith((".tar", ".idx")):
            assert found[name] == data, name
    assert said(found) == said(whole)


def said(found: dict[str, bytes]) -> dict:
    """dataset.json without the checksums of the tables."""
    info = json.loads(found["dataset.json"])
    return info | {"shards": [{k: v for k, v in shard.items() if k != "table_crc32c"} for shard in info["shards"]]}


# ---- parts ----


def test_parts_make_the_same_split(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*options: str, out: Path) -> str:
        command = ["folder", "--videos", str(folder), "--captions", str(folder / "captions.csv"), "--name", "set"]
        command += ["--profile", "copy", "--shard-videos", "2", "--workers", "1", "--out", str(out), *options]
        assert main(command) == 0
        return capsys.readouterr().err

    run(out=tmp_path / "whole" / "train")
    whole, out = files(tmp_path / "whole" / "train"), tmp_path / "parts" / "train"
    said = run("--part", "2/3", out=out)
    assert "part 2/3 is packed. 3 shards of other parts still missing (000000, 000002, 000003)" in said
    assert sorted(p.name for p in out.glob("*.tar")) == ["000001.tar"] and not (out / "dataset.json").exists()
    assert missing(out) == ["000000", "000002", "000003"]
    with pytest.raises(ShardError, match="incomplete: 1 of 4"):
        Split(out)
    assert main(["finish", str(out)]) == 1
    assert "3 of 4 shards are missing (000000, 000002, 000003)" in capsys.readouterr().err
    begun, before = (out / "packing.json").read_bytes(), (out / "000001.tar").stat().st_mtime_ns
    run("--part", "2/3", out=out)
    assert (out / "000001.tar").stat().st_mtime_ns == before
    run("--part", "3/3", out=out)
    assert "7 videos, 7 captions in 4 shards" in run("--part", "1/3", out=out)
    assert {n: d for n, d in files(out).items() if not n.startswith(".lock")} == whole

    (out / "dataset.json").unlink()  # as if the last part had been killed before its last step
    (out / "packing.json").write_bytes(begun)
    assert main(["finish", str(out)]) == 0
    assert files(out) == whole


def test_parts_share_a_folder_and_nobody_else_does(eight: list[Item], tmp_path: Path) -> None:
    target = storage.output(tmp_path)
    with target.locked((1, 2)):
        with target.locked((2, 2)):
            pass
        torn = [target.draft("000000.tar", "p1of2-"), target.draft("000001.tar", "p2of2-")]
        assert packed(eight, tmp_path, part=(2, 2), workers=1) is None  # sweeps what its own part left, no more
        assert [Path(file.name).exists() for file in torn] == [True, False]
        for attempt in ((1, 2), None):
            with pytest.raises(ShardError, match="being packed by another process"), target.locked(attempt):
                pass
        with pytest.raises(ShardError, match="being packed by another process"):
            finish_parts(tmp_path)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4"])
def test_parts_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["folder", "--videos", ".", "--captions", "c.csv", "--out", "x", "--part", text])
    assert "such as 2/16" in capsys.readouterr().err or text == "-1/4"


# ---- videos that hang or kill, and that are mended ----

SPELL = """
import os, signal, time
import shards.video.profiles
real = shards.video.profiles.store
def store(file, name, *rest):
    if name == "v1.mp4":
        time.sleep(3600)
    if name == "v2.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(file, name, *rest)
shards.video.profiles.store = store
"""


def test_a_video_that_hangs_and_one_that_kills_cost_only_themselves(
    eight: list[Item], whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spell").mkdir()
    (tmp_path / "spell" / "sitecustomize.py").write_text(SPELL)
    events, out = [], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "spell"))
        info = packed(eight, out, shard_videos=4, workers=2, timeout=1.0, on_progress=events.append)
    assert (info["videos"], info["rejected_videos"], len(events)) == (5, 3, 8)
    reasons = {r["id"]: r["reason"] for r in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}
    assert reasons["v1"] == "it took longer than 1 s" and reasons["v2"] == "it kills the program (SIGSEGV)"
    assert not list(out.glob(".*.json")) and not verify(out, 1)

    # a packer that goes on comes to the same verdicts without trying again, as it does while a verdict is on record
    before = files(out)
    (out / "000000.parquet").unlink()
    (out / ".000000.lost.json").write_text(json.dumps({1: reasons["v1"], 2: reasons["v2"]}))
    packed(eight, out, shard_videos=4, workers=1)
    assert files(out) == before

    # and mended ones are packed when that is asked for
    assert packed(eight, out, shard_videos=4, workers=1)["videos"] == 5
    assert packed(eight, out, shard_videos=4, workers=1, retry_rejects=True)["videos"] == 7
    packed(eight, tmp_path / "mended", shard_videos=4, workers=1)
    assert files(out) == files(tmp_path / "mended")


def test_only_shards_with_rejects_are_retried(eight: list[Item], tmp_path: Path) -> None:
    broken = tmp_path / "v5.mp4"
    broken.write_bytes(b"no video")
    mixed = [*eight[:5], replace(eight[5], path=broken), *eight[6:]]
    out = tmp_path / "out"
    packed(mixed, out, workers=1)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    broken.write_bytes(eight[4].path.read_bytes())
    starts = []
    assert packed(mixed, out, workers=1, retry_rejects=True, on_start=lambda *a: starts.append(a))["videos"] == 8
    assert starts == [(6, 8)]
    changed = [n for n, t in before.items() if (out / n).stat().st_mtime_ns != t]
    assert changed == ["000002.tar"] and (out / "rejects.jsonl").read_bytes() == b""


def test_a_pipe_is_not_waited_for(eight: list[Item], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a regular file"), storage.opened(tmp_path / "pipe.mp4"):
        pass


# ---- hostile names ----

NAMES = [
    "../../escape", "/etc/passwd", "a/b", "a\\b", "line\nbreak", "nul\0byte", "..", ".", "-rf", "~", "CON", "nul", "Com1",
    "a.b.c", "x" * 300, "ünï cödé 長", "\u202etxt.exe", "%2e%2e%2f", " ", "'; drop table", "*?[a]", "🎬", "tab\there",
]  # fmt: skip


def test_names_from_data_are_never_paths(eight: list[Item], tmp_path: Path) -> None:
    items = [Item(name, eight[0].path, (Caption("c"),), {"name": name}) for name in NAMES]
    too_long, not_unicode = "長" * MAX_KEY, "bad \udc80"
    out = tmp_path / "deep" / "out"
    odd = [replace(items[0], id=too_long), replace(items[0], id=not_unicode), replace(items[0], id="")]
    info = packed([*items, *odd], out, shard_videos=64, workers=1)
    assert info["videos"] == len(NAMES) and not verify(out, 1)
    split = Split(out)
    assert [split.video(i).id for i in range(len(split))] == NAMES
    assert [split.json(split.video(i))["meta"]["name"] for i in range(len(split))] == NAMES
    for member in read_members(out / "000000.tar"):
        key, extension = member.split(".")
        assert extension in ("mp4", "json") and not set(key) & set("/\\:*?\"<>|\0\n ~'") and len(key) <= MAX_KEY
        assert key.upper() not in ("CON", "NUL", "COM1") and key not in ("", "..")
    reasons = [json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [r.split(":")[0].split(" (")[0] for r in reasons] == [
        "its name is too long", "its name is not valid Unicode", "a video needs a name"]  # fmt: skip
    written = {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {("deep", "out")}  # nothing else was written
    assert len({safe_key(name).lower() for name in NAMES}) == len(NAMES)


def test_captions_and_files_that_are_not_unicode(eight: list[Item], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"v\xff.mp4")
    shutil.copy(eight[0].path, path)
    info = packed([Item("v", path, (Caption("fine"), Caption("bad \udc80")))], tmp_path / "out", workers=1)
    assert (info["videos"], info["captions"], info["rejected_captions"]) == (1, 1, 1)
    assert not verify(tmp_path / "out", 1)


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
        "PYTHONPATH": str(Path(__file__).parents[2]),
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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """An S3 server with an empty bucket; yields its URL."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


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

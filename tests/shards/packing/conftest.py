from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.annotations import Caption, Item
from shards.packing import scheduler, worker
from shards.packing.worker import Progress, pack_shard
from tests.buckets import object_store
from tests.shards.sets import files, packed
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


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Nine small videos with two captions each, the last two of them cut with timed captions."""
    folder = tmp_path_factory.mktemp("nine")
    out = []
    for i in range(9):
        path = folder / f"v{i}.mp4"
        path.write_bytes(encode(8 + i, 12, (64, 48)))
        captions = (Caption(f"caption {i}"), Caption("again", 0.1, 0.3 + i / 10))
        out.append(Item(f"v{i}", path, captions, {"nth": i}, *((0.2, 0.6) if i > 6 else (None, None))))
    return out


@pytest.fixture
def bucket() -> Iterator[str]:
    """An S3 server with an empty bucket; yields its URL."""
    with object_store():
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from here on. Shards are packed in this process."""
    names, real = [], worker.store

    def store(file, name: str, *args):
        names.append(name)
        return real(file, name, *args)

    def run_locally(jobs, workers: int, on_progress: Callable[[Progress], None]) -> None:
        for job in jobs:
            pack_shard(job, lambda event: event.what == "done" and on_progress(event.progress))

    monkeypatch.setattr(worker, "store", store)
    monkeypatch.setattr(scheduler, "run_locally", run_locally)
    return names

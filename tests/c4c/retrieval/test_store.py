"""The index as a database: what is put in comes out, whoever else writes at the same time."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pytest

from c4c.retrieval.index.rows import Failure, IndexedVideo
from c4c.retrieval.index.store import About, Store
from tests.buckets import object_store

pytestmark = pytest.mark.slow

WIDTH, FRAMES = 16, 3
ABOUT = About(
    identity={"checkpoint": "runs/a", "digest": "a" * 64}, late=False, width=WIDTH, num_frames=FRAMES, segment_s=8.0,
    stride_s=4.0, runtime="torch", version="1",
)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "encoder.json").write_text("{}")
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b")
    return folder


@pytest.fixture
def store(tmp_path, text):
    return Store.create(tmp_path / "my.index", ABOUT, text)


def unit(rows, seed):
    values = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def video(name, segments=3, seed=0, late=False):
    frames = np.random.default_rng(seed).normal(size=(segments, FRAMES, WIDTH)).astype(np.float16) if late else None
    return IndexedVideo(
        video=name, path=f"/videos/{name}", source="file", size=1000 + seed, mtime_ns=seed, duration=4.0 * segments + 4,
        width=64, height=48, starts=[4.0 * i for i in range(segments)], ends=[4.0 * i + 8 for i in range(segments)],
        vectors=unit(segments, seed), thumbnails=[f"{name} {seed} {i}".encode() for i in range(segments)], frames=frames,
    )  # fmt: skip


def test_search_ranks_by_inner_product_as_numpy_does(store):
    videos = [video(f"{i}.mp4", 1 + i % 4, seed=i) for i in range(20)]
    store.append(videos[:7])
    store.append(videos[7:])
    ids = [f"{v.video}#{i:06d}" for v in videos for i in range(len(v.starts))]
    every, queries = np.concatenate([v.vectors for v in videos]), np.concatenate([unit(3, 99), videos[3].vectors])
    for query, hits in zip(queries, store.search(queries, 5), strict=True):
        scores = every @ query
        assert [hit.id for hit in hits] == [ids[i] for i in np.argsort(-scores)[:5]]
        assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=1e-6)
    many = np.concatenate([queries, unit(9, 100)])  # which are answered in one pass over the vectors
    for one, hits in zip(many, store.search(many, 5, where="video <> '3.mp4'"), strict=True):
        (alone,) = store.search(one[None], 5, where="video <> '3.mp4'")
        assert [hit.id for hit in hits] == [hit.id for hit in alone] and hits[0].path == alone[0].path
        assert np.allclose([hit.score for hit in hits], [hit.score for hit in alone], atol=1e-6)
    assert [len(hits) for hits in store.search(many, 99)] == [len(ids)] * len(many)
    assert store.search(many, 3, where="duration < 0") == [[]] * len(many)
    assert (len(store), store.n_videos) == (len(ids), 20)
    best = store.search(videos[3].vectors[1:2], 1)[0][0]
    assert (best.id, best.video, best.path) == ("3.mp4#000001", "3.mp4", "/videos/3.mp4")
    assert (best.start, best.end, best.duration) == (4.0, 12.0, 20.0) and abs(best.score - 1) < 1e-6


def test_what_is_stored_of_a_segment_comes_out_as_it_went_in(store):
    names = ["it's.mp4", "back\\slash.mp4", "per%cent_é.mp4", "new\nline.mp4"]
    store.append([video(name, 2, seed=i) for i, name in enumerate(names)])
    for i, name in enumerate(names):
        one = f"{name}#000001"
        assert store.thumbnail(one) == f"{name} {i} 1".encode()
        assert np.array_equal(store.vectors_of([one, "no#1"])[one], unit(2, i)[1])
        assert [hit.id for hit in store.segments_of(name)] == [f"{name}#000000", one] and store.segment(one).start == 4
        assert store.search(unit(2, i)[1:], 9, where=f"duration > {i}")[0][0].video == name
    assert store.videos() == sorted(names) and store.segment("no#1") is None
    with pytest.raises(ValueError, match="no segment no#1"):
        store.thumbnail("no#1")
    with pytest.raises(ValueError, match="holds no frames"):
        store.frames_of(["no#1"])


def test_frames_of_late_heads_are_kept_in_half_precision(tmp_path, text):
    store = Store.create(tmp_path / "late.index", replace(ABOUT, late=True), text)
    one = video("a.mp4", 2, late=True)
    store.append([one])
    frames = store.frames_of(["a.mp4#000001", "a.mp4#000000"])
    assert frames["a.mp4#000001"].dtype == np.float32 and np.array_equal(frames["a.mp4#000001"], one.frames[1])
    with pytest.raises(ValueError, match=r"a.mp4: its 2 segments have a frames of another size"):
        store.append([video("a.mp4", 2)])


def test_a_video_that_is_indexed_again_replaces_itself(store):
    store.append([video("a.mp4", 5, seed=1), video("b.mp4", 2, seed=2)])
    before = {known.video: known.written for known in store.known()}
    store.append([video("a.mp4", 3, seed=3)], before)
    assert [hit.id for hit in store.segments_of("a.mp4")] == [f"a.mp4#00000{i}" for i in range(3)]
    assert len(store) == 5 and {(k.video, k.mtime_ns) for k in store.known()} == {("a.mp4", 3), ("b.mp4", 2)}


class Killed:
    """A table, of which one kind of commit ends the process."""

    def __init__(self, table, at):
        self._table, self._at = table, at

    def __getattr__(self, name):
        if name == self._at:
            raise KeyboardInterrupt
        return getattr(self._table, name)


@pytest.mark.parametrize(("at", "segments"), [("add", 5), ("delete", 3)])
def test_a_kill_between_two_commits_leaves_the_old_or_the_new_video_and_no_moment_without(at, segments, store):
    store.append([video("a.mp4", 5, seed=1)])
    before = {known.video: known.written for known in store.known()}
    table = store._segments
    store._segments = Killed(table, at)
    with pytest.raises(KeyboardInterrupt):
        store.append([video("a.mp4", 3, seed=3)], before)
    left = Store.open(store.uri)
    assert len(left) == len(left.segments_of("a.mp4")) == len(left.search(unit(1, 0), 9)[0]) == segments
    left.tidy()
    assert left._segments.count_rows() == segments


def test_a_video_that_two_processes_index_counts_once_at_once_and_for_good(store):
    other = Store.open(store.uri)
    store.append([video("a.mp4", 4, seed=1)])
    other.append([video("a.mp4", 4, seed=1), video("b.mp4", 1, seed=2)])  # it did not know of the first
    for one in (store, other, Store.open(store.uri)):
        assert (len(one), one.n_videos, one.videos()) == (5, 2, ["a.mp4", "b.mp4"])
        ids = [hit.id for hit in one.search(unit(1, 5), 10)[0]]
        assert len(ids) == len(set(ids)) == 5
    assert store._segments.count_rows() == 9
    other.tidy()
    assert store._segments.count_rows() == 5 == len(store)


def _appends(uri, worker):
    store = Store.open(uri)
    for i in range(6):
        store.append([video(f"{worker}-{i}.mp4", 2, seed=i), video(f"both-{i}.mp4", 2, seed=i)])
        store.fail([Failure(f"/bad/{i}", f"of {worker}", 1, 2)])
    store.tidy()


def test_processes_that_write_at_once_lose_nothing_and_leave_nothing_twice(store):
    context = multiprocessing.get_context("spawn")  # LanceDB's threads do not live on in a fork
    workers = [context.Process(target=_appends, args=(store.uri, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = sorted([f"{w}-{i}.mp4" for w in range(3) for i in range(6)] + [f"both-{i}.mp4" for i in range(6)])
    assert store.videos() == expected and len(store) == 48
    store.tidy()
    assert store._segments.count_rows() == 48
    assert [path for path, _ in store.failures()] == [f"/bad/{i}" for i in range(6)]


@pytest.mark.parametrize("width", [16, 256])
def test_the_approximate_index_finds_what_exact_search_finds_and_what_came_after_it(width, tmp_path, text):
    store = Store.create(tmp_path / "my.index", replace(ABOUT, width=width), text)

    def near(segments, seed):
        """A video whose segments are alike."""
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=width) + 0.5 * rng.normal(size=(segments, width))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def videos(seeds, segments):
        return [replace(video(f"{i}.mp4", segments), vectors=near(segments, i)) for i in seeds]

    with pytest.raises(ValueError, match="needs at least 1000 segments"):
        store.build_ann()
    store.append(videos(range(30), 50))
    assert "needs at least" not in store.tidy(ann=True) and store.has_ann
    store.append(videos([77], 3))  # in no partition yet
    queries = np.concatenate([near(1, i) for i in range(20)] + [near(3, 77)])
    exact, fast = store.search(queries, 10), store.search(queries, 10, exact=False)
    found = [len({h.id for h in a} & {h.id for h in b}) for a, b in zip(exact, fast, strict=True)]
    assert np.mean(found) > 9.8 and fast[-1][0].id == "77.mp4#000002"
    assert max(abs(h.score - float(store.vectors_of([h.id])[h.id] @ queries[0])) for h in fast[0]) < 1e-5
    store.tidy()
    assert store.search(queries[-1:], 1, exact=False)[0][0].id == "77.mp4#000002"


def test_many_small_commits_become_few_files_and_old_versions_go(store, monkeypatch):
    monkeypatch.setattr("c4c.retrieval.index.database._OLD", timedelta(milliseconds=1))
    for i in range(12):
        store.append([video(f"{i}.mp4", 2, seed=i)])
    before = store.vectors_of(["7.mp4#000001"])["7.mp4#000001"]
    assert store._segments.stats()["fragment_stats"]["num_fragments"] == 12
    store.tidy()
    assert store._segments.stats()["fragment_stats"]["num_fragments"] == 1 and len(store._segments.list_versions()) <= 2
    monkeypatch.setattr("c4c.retrieval.index.database._LARGE", 20)
    store.append([video("more.mp4", 2)])
    store.tidy()  # which leaves a large table as it is for one small file
    assert store._segments.stats()["fragment_stats"]["num_fragments"] == 2 and len(store) == 26
    assert np.array_equal(store.vectors_of(["7.mp4#000001"])["7.mp4#000001"], before)


def test_a_large_index_keeps_no_second_copy_of_what_was_joined(store, monkeypatch):
    monkeypatch.setattr("c4c.retrieval.index.database._OLD", timedelta(seconds=1))
    monkeypatch.setattr("c4c.retrieval.index.database._LARGE", 20)
    for i in range(16):
        store.append([video(f"{i}.mp4", 2, seed=i)])
    folder = Path(store.uri) / "segments.lance" / "data"
    before = sum(file.stat().st_size for file in folder.iterdir())
    store.tidy()
    assert store._segments.stats()["fragment_stats"]["num_fragments"] == 1 and len(store) == 32
    assert sum(file.stat().st_size for file in folder.iterdir()) <= before and len(list(folder.iterdir())) == 1


def test_an_index_of_other_vectors_is_refused_by_name(store, tmp_path, text):
    for other, words in (
        (replace(ABOUT, identity={"checkpoint": "runs/b", "digest": "b" * 64}), r"of checkpoint runs/a \(a{12}\), not of runs/b \(b{12}\)"),
        (replace(ABOUT, segment_s=0.0), r"segments of 8 s every 4 s, not of whole videos"),
        (replace(ABOUT, num_frames=12), r"3 frames a segment, not of 12"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Store.create(store.uri, other, text)
    assert Store.create(store.uri, ABOUT, text).about == ABOUT
    assert (store.text_encoder() / "tokenizer" / "vocabulary.txt").read_text() == "a b"


def test_what_is_no_index_is_told(tmp_path, text, store):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("")
    for name, words in (("file", "it is a file"), ("folder", "folder of other things"), ("nothing", "no index at")):
        with pytest.raises(ValueError, match=words):
            Store.open(tmp_path / name)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="other things"):
        Store.create(tmp_path / "folder", ABOUT, text)
    with pytest.raises(ValueError, match="vectors of 16 numbers, not of 8"):
        store.search(np.zeros((1, 8), np.float32), 3)
    with pytest.raises(ValueError, match="condition 'colour = 3' cannot be used"):
        store.search(unit(1, 0), 3, where="colour = 3")
    with pytest.raises(ValueError, match=r"a\.mp4: a vector is not finite"):
        store.append([replace(video("a.mp4"), vectors=np.full((3, WIDTH), np.nan))])
    assert store.search(unit(1, 0), 3) == [[]]
    rows = [{"json": json.dumps(json.loads(ABOUT.to_json()) | {"format": 9})}]
    lancedb.connect(store.uri).create_table("about", rows, mode="overwrite")
    with pytest.raises(ValueError, match="its format is 9, and this version of c4c reads format 1"):
        Store.open(store.uri)


def test_a_full_disk_and_a_damaged_file_are_told(small_disk, text, tmp_path):
    disk, fill = small_disk
    store = Store.create(disk / "my.index", ABOUT, text)
    store.append([video("a.mp4", 2, seed=1)])
    fill(30_000)
    with pytest.raises(OSError, match="the index could not be written"):
        store.append([replace(video("b.mp4", 2), thumbnails=[bytes(100_000)] * 2)])
    assert Store.open(disk / "my.index").videos() == ["a.mp4"]
    for file in (disk / "my.index" / "segments.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(OSError, match="the index cannot be read"):
        Store.open(disk / "my.index").search(unit(1, 0), 3)


def test_a_kill_while_an_index_is_made_leaves_one_that_the_next_start_completes(tmp_path, text, monkeypatch):
    uri = tmp_path / "my.index"
    monkeypatch.setattr("c4c.retrieval.index.database.put_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Store.create(uri, ABOUT, text)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no text tower"):
        Store.open(uri).text_encoder()
    assert (Store.create(uri, ABOUT, text).text_encoder() / "encoder.json").exists()


@pytest.mark.network
def test_an_index_in_a_bucket_is_like_one_on_a_disk(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_store():
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        store = Store.create("s3://bucket/some/my.index", ABOUT, text)
        other = Store.create("s3://bucket/some/my.index", ABOUT, text)
        store.append([video("a.mp4", 4, seed=1)])
        other.append([video("b.mp4", 2, seed=2), video("a.mp4", 4, seed=1)])
        store.tidy()
        third = Store.open("s3://bucket/some/my.index")
        assert third.videos() == ["a.mp4", "b.mp4"] and len(third) == 6
        assert third.search(unit(2, 2)[1:], 1)[0][0].id == "b.mp4#000001"
        assert (third.text_encoder() / "tokenizer" / "vocabulary.txt").read_text() == "a b"
        assert (
            Store.about_of("s3://bucket/some/my.index") == ABOUT and Store.about_of("s3://bucket/other.index") is None
        )
        with pytest.raises(ValueError, match="no index that can be read"):
            Store.open("s3://bucket/other.index")


def test_a_disk_that_is_full_is_named_in_one_sentence(tmp_path, text, monkeypatch):
    def full(source, target):
        raise shutil.Error([(source, target, f"[Errno 28] No space left on device: '{source}' -> '{target}'")])

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match=r"my\.index/text cannot be written \(No space left on device\)$"):
        Store.create(tmp_path / "my.index", ABOUT, text)

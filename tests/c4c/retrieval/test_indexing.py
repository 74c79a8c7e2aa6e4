"""What is encoded and stored of each segment, against its clip encoded alone; lists of videos compared with an index."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from c4c.retrieval.index.build import Indexing
from c4c.retrieval.index.filters import of_path
from c4c.retrieval.index.plan import VideoSources, compare, os_path, text_of
from c4c.retrieval.index.rows import SHARD, Failure, Known
from c4c.retrieval.index.store import About, Store
from pipelines.segment_frames import Described, frames_of_file
from pipelines.segments import Cutting
from shards import ShardError
from shards.annotations import Caption, Item
from shards.split import Split
from tests.c4c.retrieval.encoders import encoder
from tests.pipelines.conftest import pack_videos
from tests.shards.sets import packed
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports open_clip and DALI

CUTTING = Cutting(1.0, 0.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "set"
    files = {f"{i}.mp4": encode(20 + 23 * i, 25, (64, 48), options={"g": "12", "bf": "2"}) for i in range(4)}
    return folder, pack_videos(folder, files, "intra", short_side=32)


def indexed(model, names, tmp_path, commit=3, threads=2):
    about = About(
        identity=model.identity.to_dict(), late=model.late, width=model.identity.width, num_frames=model.data.num_frames,
        segment_s=CUTTING.segment_s, stride_s=CUTTING.stride_s, runtime=model.runtime, version="1",
    )  # fmt: skip
    model.save(tmp_path / "text")
    store = Store.create(tmp_path / "my.index", about, tmp_path / "text")
    sources = VideoSources(list(map(str, names)), str(tmp_path / "my.index"))
    plan = compare(sources.list(), store.known(), store.failed(), sources)
    told = []
    indexing = Indexing(
        store, model, sources, CUTTING, threads=threads, commit=commit, before={}, tell=lambda c: told.append(c.done)
    )
    counts = indexing.run(plan.jobs)
    assert told == list(range(1, len(plan.jobs) + 1))
    return store, counts


def alone(model, path):
    """{segment: (vector, frames)} of a file, each clip encoded by itself."""
    events = list(frames_of_file(path, model.data, CUTTING))
    (about,) = (event for event in events if isinstance(event, Described))
    pixels = {
        p: picture for event in events[1:] for p, picture in zip(event.positions.tolist(), event.pixels, strict=True)
    }
    for number, segment in enumerate(about.segments):
        shown = np.stack([pixels[p] for p in segment.positions.tolist()])
        clip = np.zeros((1, model.data.num_frames, *shown.shape[1:]), np.uint8)
        clip[0, : len(shown)] = shown
        mask = np.arange(model.data.num_frames)[None] < len(shown)
        video = model.videos(model.clips(clip, mask), mask)
        yield number, model.video_vectors(video)[0].cpu().numpy(), video[0].half().float().cpu().numpy()


@pytest.mark.parametrize(("head", "patch"), [("meanP", "2d"), ("seqWTI", "2d"), ("seqTransf", "3d"), ("wti", "3d")])
def test_a_segment_has_the_vector_of_its_clip_alone(head, patch, videos, tmp_path):
    folder, _ = videos
    model = encoder(tmp_path / "model.safetensors", head, patch=patch)
    store, counts = indexed(model, [folder / f"{i}.mp4" for i in range(4)], tmp_path)
    assert (counts.videos, counts.failures) == (4, []) and counts.frames < 4 * counts.segments * (
        1 if patch == "2d" else 9
    )
    for i in range(4):
        for number, vector, frames in alone(model, folder / f"{i}.mp4"):
            one = f"{i}.mp4#{number:06d}"
            assert np.array_equal(store.vectors_of([one])[one], vector)
            if model.late:
                assert np.array_equal(store.frames_of([one])[one], frames)
        assert len(store.segments_of(f"{i}.mp4")) == number + 1


def test_vectors_do_not_depend_on_what_is_indexed_together(videos, tmp_path):
    folder, split = videos
    model = encoder(tmp_path / "model.safetensors")
    seen = []
    for commit, threads, names in ((1, 1, [folder]), (99, 3, [folder]), (2, 2, [folder / "3.mp4", folder / "1.mp4"])):
        (tmp_path / f"{commit}").mkdir()
        store, _ = indexed(model, names, tmp_path / f"{commit}", commit, threads)
        ids = [hit.id for hit in store.segments_of("3.mp4")]
        seen.append(np.stack([store.vectors_of(ids)[one] for one in ids]))
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])
    (tmp_path / "packed").mkdir()
    store, counts = indexed(model, [split.path], tmp_path / "packed")
    assert counts.videos == 4 and store.videos() == ["0", "1", "2", "3"]
    assert [(h.start, h.end) for h in store.segments_of("3")] == [
        (h.start, h.end) for h in Store.open(tmp_path / "1" / "my.index").segments_of("3.mp4")
    ]
    assert store.thumbnail("3#000000")[:2] == b"\xff\xd8"


def test_a_video_whose_features_are_not_numbers_is_listed_and_stops_nothing(videos, tmp_path, monkeypatch):
    folder, _ = videos
    model = encoder(tmp_path / "model.safetensors")
    whole = model.video_vectors

    def broken(features):
        vectors = whole(features)
        return vectors * float("nan") if len(vectors) > 5 else vectors

    monkeypatch.setattr(model, "video_vectors", broken)
    store, counts = indexed(model, [folder], tmp_path)
    assert [(os.path.basename(f.path), f.reason) for f in counts.failures] == [("3.mp4", "its features are not finite")]
    assert store.failures() == [(str(folder / "3.mp4"), "its features are not finite")] and store.n_videos == 3


def test_a_video_whose_frames_are_too_large_to_store_is_listed_and_stops_nothing(videos, tmp_path, monkeypatch):
    folder, _ = videos
    model = encoder(tmp_path / "model.safetensors", "wti")
    whole = model.videos
    monkeypatch.setattr(model, "videos", lambda features, mask: whole(features, mask) * (1e8 if len(mask) > 5 else 1))
    store, counts = indexed(model, [folder], tmp_path)
    assert [os.path.basename(f.path) for f in counts.failures] == ["3.mp4"] and store.n_videos == 3
    assert "too large to be stored" in counts.failures[0].reason


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_a_video_that_begins_anew_counts_once_and_one_that_lacks_frames_is_listed(patch, videos, tmp_path, monkeypatch):
    folder, _ = videos
    model = encoder(tmp_path / "model.safetensors", patch=patch)

    def odd(path, config, cutting):
        events = list(frames_of_file(path, config, cutting))
        if path.endswith("1.mp4"):  # a way of decoding gives up halfway
            yield from events[: len(events) // 2 + 1]
        if path.endswith("2.mp4"):
            last = events.pop()
            events.append(replace(last, positions=last.positions[:-1], pixels=last.pixels[:-1]))
        yield from events

    monkeypatch.setattr("c4c.retrieval.index.build.frames_of_file", odd)
    store, counts = indexed(model, [folder], tmp_path)
    assert store.failures() == [(str(folder / "2.mp4"), "1 of its frames did not come out of the decoder")]
    assert store.videos() == ["0.mp4", "1.mp4", "3.mp4"] and counts.videos == 3
    for number, vector, _ in alone(model, folder / "1.mp4"):
        assert np.array_equal(store.vectors_of([f"1.mp4#{number:06d}"])[f"1.mp4#{number:06d}"], vector)


@pytest.mark.parametrize("changed", [True, False])
def test_a_video_that_cannot_be_read_any_more_goes_if_it_has_changed(changed, videos, tmp_path, monkeypatch):
    model = encoder(tmp_path / "model.safetensors")
    path = tmp_path / "a.mp4"
    path.write_bytes((videos[0] / "1.mp4").read_bytes())
    store, _ = indexed(model, [path], tmp_path)
    if changed:
        path.write_bytes(b"no video")

    def unreadable(*_):
        raise OSError("the disk is away")
        yield

    monkeypatch.setattr("c4c.retrieval.index.build.frames_of_file", unreadable)
    sources = VideoSources([str(path)], "")
    plan = compare(sources.list(), store.known(), [], sources, refresh=True)
    counts = Indexing(store, model, sources, CUTTING, threads=1, commit=1, before=plan.before).run(plan.jobs)
    assert [failure.reason for failure in counts.failures] == ["the disk is away"]
    assert store.videos() == ([] if changed else ["a.mp4"])


def test_a_failed_write_is_told_and_what_was_committed_stays(videos, tmp_path, monkeypatch):
    folder, _ = videos
    model = encoder(tmp_path / "model.safetensors")
    append, calls = Store.append, []

    def full(self, group, before=None):
        calls.append(len(group))
        if len(calls) == 3:
            raise OSError("the index could not be written: no space left on device")
        append(self, group, before)

    monkeypatch.setattr(Store, "append", full)
    with pytest.raises(OSError, match="no space left"):
        indexed(model, [folder], tmp_path, commit=1)
    assert len(calls) == 3 and Store.open(tmp_path / "my.index").n_videos == 2


# ---- what is to be done ----


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "sub/b.MKV", "sub/c.webm"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_text(name)
    return tmp_path / "videos"


def planned(folder, known=(), failures=(), **options):
    sources = VideoSources([str(folder)], "")
    return compare(sources.list(), known, failures, sources, **options)


def held(job, written=1, **other):
    one = job.listed
    return replace(Known(job.video, one.path, one.size, one.mtime_ns, written), **other)


def test_what_is_known_and_the_same_is_left(folder):
    jobs = planned(folder).jobs
    assert [job.video for job in jobs] == ["a.mp4", "sub/b.MKV", "sub/c.webm"]
    known = [held(job) for job in jobs]
    assert planned(folder, known).jobs == [] and planned(folder, known).unchanged == 3
    changed = planned(folder, [known[0], replace(known[1], size=1), replace(known[2], mtime_ns=1, written=7)])
    assert [job.video for job in changed.jobs] == ["sub/b.MKV", "sub/c.webm"]
    assert changed.before == {"sub/b.MKV": 1, "sub/c.webm": 7}
    assert len(planned(folder, known, refresh=True).jobs) == 3


def test_a_packed_video_that_was_cut_elsewhere_has_changed(folder, tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode(60, 20, (64, 48)))  # of which the first frame alone is a keyframe
    known, seen = [], []
    for start in (0.5, 0.5, 1.0):
        items = [Item("a", tmp_path / "a.mp4", (Caption("x"),), {}, start, 3.0)]
        packed(items, tmp_path / "set", workers=1, update=True)
        jobs = planned(tmp_path / "set", known).jobs
        seen.append((Split(tmp_path / "set").video(0).crc32c, len(jobs)))
        known = [held(job) for job in jobs] or known
    assert seen == [(seen[0][0], 1), (seen[0][0], 0), (seen[0][0], 1)]


def test_what_has_gone_vanishes_only_where_it_was_looked_for(folder, tmp_path):
    known = [held(job) for job in planned(folder).jobs]
    other = Known("z.mp4", str(tmp_path / "elsewhere" / "z.mp4"), 1, 1, 1)
    (folder / "a.mp4").unlink()
    assert [one.video for one in planned(folder, [*known, other]).vanished] == ["a.mp4"]
    assert planned(folder / "sub", known).vanished == []


def test_failures_wait_for_a_change(folder):
    jobs = planned(folder).jobs
    bad = [Failure(job.listed.path, "why", job.listed.size, job.listed.mtime_ns) for job in jobs]
    plan = planned(folder, [], [bad[0], replace(bad[1], size=3), replace(bad[0], path=str(folder / "gone.mp4"))])
    assert [job.video for job in plan.jobs] == ["sub/b.MKV", "sub/c.webm"]
    assert plan.failed == [bad[0]] and plan.forgiven == [str(folder / "gone.mp4")]
    assert len(planned(folder, [], bad, retry=True).jobs) == 3
    assert planned(folder, [held(jobs[0])], bad[:1], retry=True).forgiven == [bad[0].path]


def test_two_files_that_got_one_name_get_two(folder, tmp_path):
    jobs = planned(folder).jobs
    first, second = held(jobs[0], 1, path=str(tmp_path / "x" / "a.mp4")), held(jobs[0], 2)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.mp4").write_text("a.mp4")
    plan = planned(folder, [second, first])
    assert plan.doubled == [second] and plan.jobs[0].video == "videos/a.mp4"
    assert "videos/a.mp4" not in plan.before


def test_a_file_that_got_two_names_keeps_one(folder):
    first = held(planned(folder).jobs[0], 1)
    second = replace(first, video="videos/a.mp4", written=2)
    plan = planned(folder, [second, first])
    assert plan.doubled == [second] and plan.unchanged == 1 and len(plan.jobs) == 2


def test_the_name_of_a_file_that_has_gone_is_given_once(tmp_path):
    old = Known("x.mp4", str(tmp_path / "a" / "x.mp4"), 1, 1, 1)
    for name in "bc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").write_text(name)
    sources = VideoSources([str(tmp_path / "b"), str(tmp_path / "c")], "")
    plan = compare(sources.list(), [old], [], sources)
    assert [job.video for job in plan.jobs] == ["x.mp4", "c/x.mp4"] and plan.before == {"x.mp4": 1}


def test_a_video_of_one_name_elsewhere_leaves_the_rows_of_the_other(tmp_path, videos):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.mp4").write_text("b")
    sources = VideoSources([str(tmp_path / "b")], "")
    away = Known("x.mp4", "/media/unmounted/x.mp4", 2, 1, 1)  # of another size: not this file, moved
    plan = compare(sources.list(), [away], [], sources)
    assert [job.video for job in plan.jobs] == ["b/x.mp4"] and plan.before == {} and plan.vanished == []
    splits = VideoSources([str(videos[1].path)], "")
    (first, *others) = splits.list()
    other = Known(first.name, f"{tmp_path}::{first.name}", first.size + 1, first.mtime_ns + 1, 1, SHARD)
    for known in (other, replace(other, size=first.size, mtime_ns=first.mtime_ns)):  # packed twice, or another video
        plan = compare([first, *others], [known], [], splits)
        assert plan.jobs[0].video != first.name and plan.before == {}
    moved = replace(other, path=f"{tmp_path}/gone::{first.name}", size=first.size, mtime_ns=first.mtime_ns)
    plan = compare([first, *others], [moved], [], splits)
    assert plan.jobs[0].video == first.name and plan.before == {first.name: 1}


@pytest.fixture(scope="module")
def in_folders(tmp_path_factory, videos):
    """A split of three videos, two of them with names that are no keys."""
    out = tmp_path_factory.mktemp("split") / "packed"
    names = {"sub/ä b": "1.mp4", "sub/hevc": "2.mp4", "plain": "3.mp4"}
    items = [Item(id, videos[0] / name, (Caption("x"),)) for id, name in names.items()]
    packed(items, out)
    return out


def test_packed_videos_have_their_own_names(in_folders, tmp_path):
    """As evaluation and `shard info` name them; what opens them is the key."""
    model = encoder(tmp_path / "model.safetensors")
    store, _ = indexed(model, [in_folders], tmp_path)
    assert store.videos() == ["plain", "sub/hevc", "sub/ä b"]
    assert store.segment("sub/hevc#000000").path == f"{in_folders}::sub%2Fhevc"
    found = store.search(np.eye(1, model.identity.width), 99, where=of_path("sub/*"))[0]
    assert {hit.video for hit in found} == {"sub/hevc", "sub/ä b"}


def test_names_that_earlier_versions_gave_go_with_the_next_indexing_of_the_video(in_folders, tmp_path):
    sources = VideoSources([str(in_folders)], "")
    listed = {one.name: one for one in sources.list()}
    coded = {name: one.path.rpartition("::")[2] for name, one in listed.items()}
    known = [
        Known(f"packed/{key}" if name == "plain" else key, one.path, one.size, one.mtime_ns, i, SHARD)
        for i, (name, key, one) in enumerate((name, coded[name], one) for name, one in listed.items())
    ]
    plan = compare(list(listed.values()), known, [], sources)
    assert (plan.unchanged, plan.coded, plan.jobs, plan.renamed) == (3, 2, [], [])
    plan = compare(list(listed.values()), known, [], sources, refresh=True)
    assert [job.video for job in plan.jobs] == ["packed/plain", "sub/ä b", "sub/hevc"]
    assert {one.video: (one.old.video, one.changed) for one in plan.renamed} == {
        name: (coded[name], False) for name in ("sub/hevc", "sub/ä b")
    }
    moved = [replace(one, path=one.path.replace(str(in_folders), str(tmp_path / "gone"))) for one in known]
    plan = compare(list(listed.values()), moved, [], sources)  # the split was moved since
    assert sorted(one.video for one in plan.renamed) == ["sub/hevc", "sub/ä b"]
    changed = [replace(one, mtime_ns=one.mtime_ns + 1) for one in known]
    plan = compare(list(listed.values()), changed, [], sources)
    assert [one.changed for one in plan.renamed] == [True, True] and plan.before == {"packed/plain": 0}


def test_a_folder_with_a_dataset_json_of_another_program_is_a_folder_of_files(in_folders, videos, tmp_path):
    folder = tmp_path / "dj"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((videos[0] / "1.mp4").read_bytes())
    for text in ('{"name": "mine", "format": "coco", "videos": 3}', "[1, 2]", "not JSON"):
        (folder / "dataset.json").write_text(text)
        assert [one.name for one in VideoSources([str(folder)], "").list()] == ["a.mp4"]
    split = shutil.copytree(in_folders, tmp_path / "split")
    (split / "dataset.json").write_text("not JSON")  # a packed split stays one, however damaged
    with pytest.raises(ShardError, match="is not JSON"):
        VideoSources([str(split)], "")
    (split / "dataset.json").write_text('{"format": 1, "shards": [], "profile": {}}')
    with pytest.raises(ShardError, match="has format 1; this version reads"):
        VideoSources([str(split)], "")


def test_paths_that_are_no_text_come_back():
    for raw in (b"/v/caf\xe9.mp4", "/v/café.mp4".encode(), b"/v/back\\x.mp4", b"/v/\xff\xfe/\\.mp4"):
        assert os.fsencode(os_path(text_of(os.fsdecode(raw)))) == raw
        text_of(os.fsdecode(raw)).encode()


def test_what_holds_no_video_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no video in .* \(1 other file\); videos are files that end in \.mp4"):
        VideoSources([str(tmp_path)], "").list()
    with pytest.raises(ValueError, match="--videos nothing: there is no such file"):
        VideoSources(["nothing"], "")

"""The loader: ahead of the step, exact to resume and to cut, and not to be stopped by a bad video."""

import gc
import itertools
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import loader as loader_module
from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.loader import Batch, Loader
from pipelines.tokens import clips_tokenizer
from shards import ShardError
from shards.split import Split

pytestmark = pytest.mark.slow  # imports DALI

SMALL = DataConfig(num_frames=3, image_size=32, max_words=12, threads=1)
PROFILES = ["copy", "intra"]


def run(split, count, start=(0, 0), batch_size=4, seed=0, config=SMALL, **options) -> list[Batch]:
    with Loader(split, config, batch_size=batch_size, seed=seed, **options) as loader:
        return list(loader.batches(*start, count=count))


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.epoch, a.step, a.keys, a.captions) == (b.epoch, b.step, b.keys, b.captions)
        and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("frames", "frame_mask", "tokens", "valid"))
        and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frame_numbers", "pairs"))
    )


def joined(parts: list[Batch]) -> dict:
    """The valid rows of a step's batches on all ranks."""
    used = [part.valid for part in parts]
    tensors = {n: torch.cat([getattr(p, n)[u] for p, u in zip(parts, used, strict=True)]) for n in ("frames", "tokens")}
    numbers = np.concatenate([p.frame_numbers[u.numpy()] for p, u in zip(parts, used, strict=True)])
    return tensors | {"keys": [key for part in parts for key in part.keys], "numbers": torch.from_numpy(numbers)}


def equal(a: dict, b: dict) -> bool:
    return a["keys"] == b["keys"] and all(torch.equal(a[n], b[n]) for n in ("frames", "tokens", "numbers"))


def damage(split: Split, keys: list[str], folder: Path, frames: slice = slice(1)) -> Split:
    """A copy of the split in which these stored frames of these videos have changed since packing."""
    shutil.copytree(split.path, folder)
    for video in map(split.video, range(len(split))):
        if video.key in keys:
            with open(folder / f"{video.shard}.tar", "r+b") as file:
                for offset, size in zip(video.frames.offset[frames], video.frames.size[frames], strict=True):
                    file.seek(video.offset + int(offset) + int(size) // 2)
                    flipped = bytes(byte ^ 0xFF for byte in file.read(16))
                    file.seek(-16, 1)
                    file.write(flipped)
    return Split(folder)


def test_what_a_batch_holds(numbered):
    with Loader(numbered.intra, SMALL, batch_size=5, seed=0) as loader:
        assert loader.steps_per_epoch == 5
        batches = list(loader.batches(count=5))
    assert sorted(len(b.keys) for b in batches) == [4, 5, 5, 5, 5]
    pairs = set()
    for b in batches:
        n = len(b.keys)
        assert b.frames.shape == (5, 3, 3, 32, 32) and b.frames.dtype == torch.float32
        assert b.frame_mask.shape == b.frame_numbers.shape == (5, 3) and b.frame_mask.dtype == torch.bool
        assert b.valid.tolist() == b.caption_mask.flatten().tolist() == [True] * n + [False] * (5 - n)
        assert not b.frames[n:].any() and not b.frame_mask[n:].any() and not b.tokens[n:].any()
        assert (b.frame_numbers[n:] == -1).all()
        assert torch.equal(b.tokens[:n], clips_tokenizer()(b.captions, 12))
        for key, caption, (video, which) in zip(b.keys, b.captions, b.pairs.tolist(), strict=True):
            assert numbered.intra.video(video).key == key and caption == f"caption {which} of {key}"
            pairs.add((key, which))
    assert len(pairs) == numbered.intra.caption_counts.sum() == 24


def test_batches_are_made_ahead_of_the_step(numbered):
    with Loader(numbered.intra, replace(SMALL, prefetch=3), batch_size=4, seed=0) as loader:
        queued = []
        for batch in itertools.islice(loader.batches(), 4):
            queued.append(batch.stats.queued)
            until(lambda: loader._prefetch.waiting == 3)
        assert queued == [0, 3, 3, 3]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_batch_that_is_done_with_is_free_at_once_and_its_memory_is_used_again(numbered, profile):
    gc.disable()  # which would free what refers to itself in a circle, too, at some time
    try:
        with Loader(getattr(numbered, profile), SMALL, batch_size=4, seed=0) as loader:
            places = {batch.frames.data_ptr() for batch in loader.batches(count=24)}
        assert len(places) <= SMALL.prefetch + 4
    finally:
        gc.enable()


def test_the_wait_of_a_step_is_measured(numbered, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    assert [batch.wait_s for batch in run(numbered.intra, 5)] == [1.0] * 5  # looked at before the queue and after it


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come; the test's own time-out says if it does not."""
    while not true():
        time.sleep(0.01)


def test_no_more_is_made_ahead_than_asked_for(numbered, monkeypatch):
    made = []
    make = loader_module._Batching.__call__
    monkeypatch.setattr(loader_module._Batching, "__call__", lambda self, *at: made.append(at) or make(self, *at))
    with Loader(numbered.intra, replace(SMALL, prefetch=2), batch_size=4, seed=0) as loader:
        next(loader.batches())
        until(lambda: len(made) == 4)
        time.sleep(0.2)
        assert len(made) == 4  # one handed over, two waiting, one that found no room


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rule", ["uniform", "segment"])
def test_a_run_goes_on_exactly_from_any_step(numbered, profile, rule):
    split, config = getattr(numbered, profile), replace(SMALL, sampling=rule)
    unbroken = run(split, 14, config=config)
    assert [(b.epoch, b.step) for b in unbroken] == [(e, s) for e in range(3) for s in range(6)][:14]
    for at in (3, 5, 6, 12):
        resumed = run(split, 14 - at, start=divmod(at, 6), config=config)
        assert len(resumed) == 14 - at
        assert all(map(same, resumed, unbroken[at:]))
    assert not same(unbroken[0], run(split, 1, seed=1, config=config)[0])
    assert not same(unbroken[0], replace(unbroken[6], epoch=0, step=0))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_global_batch_is_the_same_for_any_number_of_ranks(numbered, profile):
    split = getattr(numbered, profile)
    config = replace(SMALL, sampling="segment")
    for size, worlds in ((8, (1, 2, 8)), (6, (1, 3))):
        options = {"batch_size": size, "config": config}
        by_world = {w: [run(split, 7, rank=r, world=w, **options) for r in range(w)] for w in worlds}
        for step in range(7):
            whole = joined([by_world[1][0][step]])
            for world in worlds[1:]:
                parts = [ranks[step] for ranks in by_world[world]]
                assert {len(p.frames) for p in parts} == {size // world}
                assert equal(joined(parts), whole)


def test_ranks_without_rows_get_padding(numbered):
    with pytest.warns(UserWarning, match="batches hold 12 pairs instead of 32"):
        parts = [run(numbered.intra, 2, batch_size=32, rank=r, world=4) for r in range(4)]
    for step in range(2):
        assert [int(p[step].valid.sum()) for p in parts] == [8, 4, 0, 0]
        assert all(p[step].frames.shape[0] == 8 for p in parts)


def test_a_batch_size_that_ranks_cannot_share_is_refused(numbered):
    with pytest.raises(ValueError, match="does not divide by 4 ranks: use 4 or 8"):
        Loader(numbered.intra, SMALL, batch_size=6, seed=0, rank=0, world=4)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_damaged_video_is_replaced_and_reported_once(numbered, profile, tmp_path):
    bad = "long_25"
    split = damage(getattr(numbered, profile), [bad], tmp_path / "split")
    listed = tmp_path / "quarantine.jsonl"
    healthy = run(getattr(numbered, profile), 18)
    with pytest.warns(UserWarning) as caught:
        batches = run(split, 18, quarantine=listed)
    assert len([w for w in caught if "long_25 cannot be used and is replaced: crc32c" in str(w.message)]) == 1
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["key"] == bad and entry["split"] == str(split.path) and "the shard is damaged" in entry["reason"]
    replaced = 0
    for before, after in zip(healthy, batches, strict=True):
        assert after.valid.all() and bad not in after.keys
        assert len(set(after.keys)) == 4
        for row, key in enumerate(before.keys):
            if key == bad:
                replaced += 1
                assert after.captions[row].endswith(f"of {after.keys[row]}")
                assert torch.equal(after.tokens[row], clips_tokenizer()([after.captions[row]], 12)[0])
                assert after.frames[row][after.frame_mask[row]].any()
            else:
                assert after.keys[row] == key and torch.equal(after.frames[row], before.frames[row])
    assert replaced == 6
    with pytest.warns(UserWarning, match="long_25 cannot be used"):
        resumed = run(split, 8, start=(1, 4), quarantine=listed)
    assert all(map(same, resumed, batches[10:])), "what replaces it does not depend on what was seen before"
    assert len(listed.read_text().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_replacements_are_the_same_for_any_number_of_ranks(numbered, tmp_path):
    bad = ["long_25", "short", "mpegts", "wide_30"]
    split = damage(numbered.intra, bad, tmp_path / "split")
    config = replace(SMALL, max_bad_fraction=1.0)
    by_world = {w: [run(split, 12, rank=r, world=w, config=config) for r in range(w)] for w in (1, 2, 4)}
    padded = 0
    for step in range(12):
        whole = joined([by_world[1][0][step]])
        assert len(set(whole["keys"])) == len(whole["keys"]) and not set(bad) & set(whole["keys"])
        padded += 4 - len(whole["keys"])
        for world in (2, 4):
            assert equal(joined([ranks[step] for ranks in by_world[world]]), whole)
    assert padded < 5


@pytest.mark.filterwarnings("ignore:batches hold")
def test_a_row_that_nothing_can_replace_becomes_padding(numbered, tmp_path):
    split = damage(numbered.intra, ["short"], tmp_path / "split")
    with pytest.warns(UserWarning, match="short cannot be used"):
        batches = run(split, 3, batch_size=16)  # a batch holds all twelve videos
    for batch in batches:
        assert len(batch.keys) == 11 and batch.valid.tolist() == [True] * 11 + [False] * 5
        assert torch.equal(batch.tokens[:11], clips_tokenizer()(batch.captions, 12))


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_too_many_bad_videos_end_the_run(numbered, tmp_path):
    split = damage(numbered.copy, ["short", "one_frame"], tmp_path / "split")
    with pytest.raises(ShardError, match=r"1 of \d+ samples read from .*split are bad.*max_bad_fraction=0\.0 allows"):
        run(split, 6, config=replace(SMALL, max_bad_fraction=0.0))
    # a fraction counts from a thousand samples on, so that an early one does not end a run
    with pytest.raises(ShardError, match=r"3 of \d+ samples .*=0\.002 .*Last: (short|one_frame): .*c4c\.shard verify"):
        run(split, 60, config=replace(SMALL, max_bad_fraction=0.002))
    # and from then on of all that was read: here one in twelve
    few = damage(numbered.intra, ["short"], tmp_path / "few")
    config = replace(SMALL, num_frames=1, image_size=16)
    assert len(run(few, 150, batch_size=8, config=replace(config, max_bad_fraction=0.09))) == 150
    with pytest.raises(ShardError, match=r"more than data\.max_bad_fraction=0\.07 allows"):
        run(few, 150, batch_size=8, config=replace(config, max_bad_fraction=0.07))
    all_bad = damage(numbered.intra, [numbered.intra.video(i).key for i in range(12)], tmp_path / "all")
    with pytest.raises(ShardError, match=r"step 0 of epoch 0: no video of .*all can be read"):
        run(all_bad, 1, config=replace(SMALL, max_bad_fraction=1.0))


def test_an_error_in_the_thread_reaches_the_step(numbered, monkeypatch):
    def broken(tokenizer, captions, max_words):
        raise KeyError("no such word")

    monkeypatch.setattr("pipelines.tokens.Tokenizer.__call__", broken)
    with pytest.raises(KeyError, match="no such word"):
        run(numbered.intra, 3)


def own_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("c4c")}


def test_close_ends_the_threads_even_while_the_queue_is_full(numbered):
    others = own_threads()
    loader = Loader(numbered.copy, replace(SMALL, prefetch=1), batch_size=4, seed=0)
    batches = loader.batches()
    next(batches)
    until(lambda: loader._prefetch.waiting == 1)
    time.sleep(0.3)  # by now the thread waits for room
    assert "c4c-loader" in {t.name for t in own_threads() - others}
    loader.close()
    loader.close()
    assert list(batches) == [], "and whoever still iterates comes to an end"
    until(lambda: own_threads() - others == set())
    Loader(numbered.copy, SMALL, batch_size=4, seed=0).close()  # never started


def test_a_loader_runs_once(numbered):
    with Loader(numbered.intra, SMALL, batch_size=4, seed=0) as loader:
        assert len(list(loader.batches(count=1))) == 1
        with pytest.raises(RuntimeError, match="already running"):
            next(loader.batches())


def test_what_a_loader_cannot_do_is_said(numbered):
    split = numbered.intra
    for options in ({"rank": 5, "world": 4}, {"rank": -1, "world": 4}):
        with pytest.raises(ValueError, match=r"must be from 0 to 3, as world=4"):
            Loader(split, SMALL, batch_size=4, seed=0, **options)
        with pytest.raises(ValueError, match=r"must be from 0 to 3, as world=4"):
            EvalLoader(split, SMALL, **options)
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        Loader(split, SMALL, batch_size=0, seed=0)
    for place in (str(split.path), split.path):
        with pytest.raises(TypeError, match=r"is a path: open it first, with shards\.split\.Split"):
            Loader(place, SMALL, batch_size=4, seed=0)
        with pytest.raises(TypeError, match="is a path"):
            EvalLoader(place, SMALL)
    with Loader(split, SMALL, batch_size=4, seed=0) as loader:
        for where in ({"step": -1}, {"step": loader.steps_per_epoch}, {"epoch": -1}):
            with pytest.raises(ValueError, match=f"an epoch has {loader.steps_per_epoch} steps, counted from 0"):
                next(loader.batches(**where))


@pytest.mark.parametrize("world", [1, 2, 3, 13])
def test_evaluation_sees_every_video_once(numbered, world):
    whole = {}
    config = replace(SMALL, eval_batch_size=2)
    readers = [EvalLoader(numbered.intra, config, rank=rank, world=world) for rank in range(world)]
    assert {len(reader) for reader in readers} == {{1: 6, 2: 3, 3: 2, 13: 1}[world]}
    for reader in readers:
        batches = list(reader)
        assert len(batches) == len(reader)
        for indices, frames, mask in batches:
            assert len(indices) == len(frames) == len(mask) <= 2
            assert frames.shape[1:] == (3, 3, 32, 32) and mask.shape[1:] == (3,)
            for index, clip in zip(indices.tolist(), frames, strict=True):
                assert index not in whole
                whole[index] = clip
        reader.close()
    assert sorted(whole) == list(range(12))
    if world > 1:
        (reader,) = [EvalLoader(numbered.intra, replace(SMALL, eval_batch_size=12))]
        ((indices, frames, _),) = reader
        reader.close()
        assert all(torch.equal(whole[i], clip) for i, clip in zip(indices.tolist(), frames, strict=True))


@pytest.mark.parametrize("profile", PROFILES)
def test_evaluation_refuses_a_damaged_video(numbered, profile, tmp_path):
    split = damage(getattr(numbered, profile), ["short"], tmp_path / "split")
    reader = EvalLoader(split, SMALL)
    with pytest.raises(ShardError, match="split: short cannot be evaluated: crc32c"):
        list(reader)
    reader.close()


def test_a_healthy_run_warns_of_nothing(numbered, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(numbered.copy, 6, quarantine=tmp_path / "quarantine.jsonl")
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sampling": "middle"}, "data.sampling must be one of uniform, head, tail, segment, random, .*; got 'middle'"),
        ({"lane": "fast"}, "data.lane must be one of auto, video, intra; got 'fast'"),
        ({"num_frames": 0}, "data.num_frames=0: must be at least 1"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"resize": 100, "image_size": 224}, "data.resize=100 is smaller than data.image_size=224"),
        ({"max_words": 2}, "data.max_words=2"),
        ({"mean": (0.5, 0.5)}, "data.mean and data.std"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)
    assert DataConfig().filled().short_side == 224 and DataConfig(resize=256).short_side == 256


def test_a_paragraph_is_one_pair_a_video(numbered):
    split = numbered.intra
    config = replace(SMALL, paragraph=True)
    batches = run(split, -(-len(split) // 4), config=config)
    seen = {key: text for batch in batches for key, text in zip(batch.keys, batch.captions, strict=True)}
    assert len(seen) == sum(len(batch.keys) for batch in batches) == len(split)
    for index in range(len(split)):
        assert seen[split.video(index).key] == " ".join(c["text"] for c in split.captions(index))

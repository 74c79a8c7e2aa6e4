"""Batches of clips of narrated videos: frames of the clip and no others in every lane and rule, and bags of captions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.config import CacheConfig, ClipsConfig, DataConfig
from pipelines.loader import Loader
from pipelines.narration import Clip, clip_of_pair
from pipelines.tokens import Tokenizer, clips_tokenizer
from shards.annotations import Caption, Item
from shards.concat import Concat
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests import vocabularies
from tests.pipelines.conftest import pack_videos
from tests.videos import encode, number_in

pytestmark = pytest.mark.slow  # imports DALI

FPS, FRAMES = 10, 120
DATA = DataConfig(num_frames=3, image_size=64, max_words=12, threads=1)
CLIPS = ClipsConfig(cut=True, min_s=3, bag=3)
# out of order, overlapping, beyond the end, without times, ended before it started
SAID = [(6.0, 7.0), (0.5, 4.0), (3.0, 5.0), (11.5, 30.0), (None, None), (9.0, 8.0)]


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, Split]:
    """The same four narrated videos in shards of both kinds, and one that nobody speaks about."""
    folder, out = tmp_path_factory.mktemp("narrated"), {}
    for i in range(4):
        (folder / f"v{i}.mp4").write_bytes(encode(FRAMES, FPS, (96, 64), options={"bf": "2", "g": "30"}))
    items = [
        Item(f"v{i}", folder / f"v{i}.mp4", tuple(Caption(f"video {i} says {j}", a, b) for j, (a, b) in enumerate(SAID)))
        for i in range(4)
    ]  # fmt: skip
    for name in ("intra", "copy"):
        profile = Profile(name=name, short_side=64, fps=5)
        pack(items, folder / name, dataset="tests", split="train", profile=profile, workers=1)
        out[name] = Split(folder / name)
    silent = {"silent.mp4": encode(30, FPS, (96, 64)), "still.mp4": encode(40, FPS, (96, 64))}
    return out | {"silent": pack_videos(folder / "silent", silent, "intra")}


def epoch(split, data: DataConfig = DATA, clips: ClipsConfig = CLIPS, **options) -> list:
    options = {"batch_size": 4, "seed": 3, "raw": True} | options
    with Loader(split, data, clips=clips, **options) as loader:
        return list(loader.batches(count=loader.steps_per_epoch))


def rows(batches: list):
    """(batch, row, video, caption) of all pairs."""
    return [(b, i, *pair) for b in batches for i, pair in enumerate(b.pairs.tolist())]


@pytest.mark.parametrize("rule", ["uniform", "head", "tail", "segment", "random"])
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_every_rule_shows_frames_of_the_clip_only(splits, profile, rule):
    split, seen = splits[profile], set()
    for b, i, video, caption in rows(epoch(split, replace(DATA, sampling=rule))):
        clip = clip_of_pair(split.captions(video), caption, FRAMES / FPS, CLIPS)
        shown = [number_in(b.frames[i, k].numpy()) for k in range(3) if b.frame_mask[i, k]]
        assert shown == b.frame_numbers[i, : len(shown)].tolist()
        assert shown == sorted(shown) and len(shown) == 3
        assert clip.start * FPS <= shown[0] and shown[-1] < clip.end * FPS
        seen.add(caption)
    assert seen == set(range(len(SAID)))


def test_the_rule_spans_the_clip(splits):
    """A clip of 3 s at 5 stored frames a second holds 15; uniform and head take one a second from its beginning."""
    of = {c: b.frame_numbers[i].tolist() for b, i, v, c in rows(epoch(splits["intra"])) if v == 0}
    assert of[0] == [50, 60, 70]  # 6.0 to 7.0 becomes 5.0 to 8.0
    assert of[2] == [26, 36, 46]  # 3.0 to 5.0 becomes 2.5 to 5.5; the first stored frame in it is number 26
    assert of[3] == [90, 100, 110]  # what is said beyond the end is of the last seconds
    assert of[4] == [0, 50, 110]  # whole


@pytest.mark.parametrize("world", [1, 2])
def test_bags_hold_the_drawn_caption_and_those_nearest(splits, world):
    split = splits["intra"]
    parts = [epoch(split, rank=rank, world=world) for rank in range(world)]
    found = [row for part in parts for row in rows(part)]
    assert len({(v, c) for _, _, v, c in found}) == len(found) == 24
    sizes = set()
    for b, i, video, caption in found:
        texts = clip_of_pair(split.captions(video), caption, 12.0, CLIPS).texts
        assert texts[0] == f"video {video} says {caption}" == b.captions[i]
        expected = torch.zeros(3, 12, dtype=torch.int64)
        expected[: len(texts)] = clips_tokenizer()(list(texts), 12)
        assert torch.equal(b.tokens[i], expected)
        assert b.caption_mask[i].tolist() == [k < len(texts) for k in range(3)]
        sizes.add(len(texts))
    assert sizes == {1, 3}, "captions without times stand alone"
    assert all(b.tokens.shape == (4 // world, 3, 12) for part in parts for b in part)


@pytest.mark.parametrize("bag", [1, 3])
def test_captions_go_through_the_tokenizer_that_is_given(splits, tmp_path, bag):
    """One that pads with its end token, for a text tower that needs the full length."""
    folder = vocabularies.sentencepiece(tmp_path, pads_with_end=True)
    tokenizer = Tokenizer({"kind": "hf", "name": folder, "context_length": 40, "fixed_length": True})
    split, clips = splits["intra"], replace(CLIPS, bag=bag)
    with pytest.warns(UserWarning, match="batches hold 4 pairs instead of 5"):  # so that there is padding
        batches = epoch(split, clips=clips, tokenizer=tokenizer, batch_size=5)
    for b, i, video, caption in rows(batches):
        texts = clip_of_pair(split.captions(video), caption, 12.0, clips).texts
        expected = torch.stack([tokenizer.missing(12)] * bag)
        expected[: len(texts)] = tokenizer(list(texts), 12)
        assert torch.equal(b.tokens[i], expected if bag > 1 else expected[0]) and b.tokens.shape[-1] == 40
        assert b.caption_mask[i].tolist() == [k < len(texts) for k in range(bag)]
    padding = [b for b in batches if not b.valid.all()]
    assert len(padding) == len(batches) and all((b.tokens[~b.valid] == tokenizer.missing(12)).all() for b in padding)
    assert not any(b.caption_mask[~b.valid].any() for b in padding)


def test_captions_in_any_order_are_a_track():
    captions = [{"text": str(i), "start": a, "end": b} for i, (a, b) in enumerate(SAID)]
    clip = clip_of_pair(captions, 2, 12.0, ClipsConfig(cut=True, min_s=0, bag=4))
    assert clip == Clip(3.0, 5.0, ("2", "0", "1", "3"))
    assert clip_of_pair(captions, 5, 12.0, CLIPS) == Clip(0, 12.0, ("5",))


def test_frames_drawn_do_not_depend_on_ranks_or_where_the_run_began(splits):
    data = replace(DATA, sampling="random")
    whole = epoch(splits["intra"], data)
    assert len({tuple(b.frame_numbers[i]) for b, i, v, c in rows(whole)}) > 12
    with Loader(splits["intra"], data, clips=CLIPS, batch_size=4, seed=3, raw=True, rank=1, world=2) as loader:
        for half, b in zip(loader.batches(0, 2, 3), whole[2:5], strict=True):
            assert np.array_equal(half.frame_numbers, b.frame_numbers[2:]) and torch.equal(half.frames, b.frames[2:])


def test_sets_with_and_without_narration_mix(splits):
    mixed = Concat([splits["silent"], splits["intra"]])
    data = replace(DATA, train=("a", "b"), weights=(1.0, 3.0))
    batches = epoch(mixed, data)
    silent = [(b, i) for b, i, v, c in rows(batches) if v < 2]
    assert silent and len(rows(batches)) > len(silent)
    for b, i in silent:
        assert b.frame_numbers[i, 0] == 0  # from its beginning
        assert b.caption_mask[i].tolist() == [True, False, False], "a bag of one"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": CacheConfig(frames=24)}, "cache.dir or cache.frames cannot be used together"),
        ({"config": replace(DATA, paragraph=True)}, "clips.cut and data.paragraph"),
        ({"split": "silent"}, "have no start and end"),
    ],
)
def test_what_does_not_go_with_clips(splits, options, said):
    options = {"split": "intra", "config": DATA, **options}
    split = splits[options.pop("split")]
    with pytest.raises(ValueError, match=said):
        Loader(split, clips=CLIPS, batch_size=2, seed=0, **options)


def test_settings_that_are_none():
    for bad in ({"bag": 0}, {"bag": 3}, {"min_s": -1}):
        with pytest.raises(ValueError, match=r"clips\."):
            ClipsConfig(**bad)

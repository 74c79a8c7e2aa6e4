"""Several captions a row: every caption once an epoch, whatever the ranks; and captions that repeat one of their video."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.captions import CaptionGroups, groups_of, texts_of
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.mixture import order_of
from pipelines.pair_order import Order, rank_rows
from pipelines.tokens import clips_tokenizer
from shards.annotations import Caption, Item
from shards.concat import Concat
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI

SMALL = DataConfig(num_frames=2, image_size=32, max_words=12, threads=1)
DROP = replace(SMALL, drop_duplicate_captions=True)
COUNTS = [7, 1, 3, 5, 4]
TEXTS = {0: ["One dog", "a cat", "one  DOG", "a bird", "a cat ", "a dog runs", "one dog"], 1: ["a cat"], 3: ["x"] * 5}
LEFT = {0: [0, 1, 3, 5], 3: [0]}  # of those with duplicates


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return packed(tmp_path_factory.mktemp("captions"), 0)


def packed(folder, first: int) -> Split:
    data, items = encode(4, size=(64, 64)), []
    for video, captions in enumerate(COUNTS):
        name = f"video{first + video}"
        (folder / f"{name}.mp4").write_bytes(data)
        texts = TEXTS.get(video) or [f"caption {i} of {name}" for i in range(captions)]
        items.append(Item(name, folder / f"{name}.mp4", tuple(map(Caption, texts))))
    pack(items, folder / "packed", dataset="tests", split="train", profile=Profile(short_side=64), workers=1)
    return Split(folder / "packed")


def captions_of(batches) -> Counter:
    """(video, caption) of all rows, read back from the tokens."""
    found: Counter = Counter()
    for batch in batches:
        for row, key in enumerate(batch.keys):
            for tokens in batch.tokens[row][batch.caption_mask[row]]:
                found[key, tuple(tokens.tolist())] += 1
    return found


def wanted(split: Split, left: dict[int, list[int]]) -> Counter:
    all_of: Counter = Counter()
    for video in range(len(split)):
        texts = [caption["text"] for caption in split.captions(video)]
        texts = [texts[i] for i in left.get(video, range(len(texts)))]
        all_of.update((split.video(video).key, tuple(tokens.tolist())) for tokens in clips_tokenizer()(texts, 12))
    return all_of


@pytest.mark.parametrize(("config", "left"), [(SMALL, {}), (DROP, LEFT)], ids=["all", "distinct"])
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_an_epoch_shows_every_caption_once(split, config, left, size):
    with Loader(split, config, batch_size=3, seed=4, captions_per_video=size) as loader:
        batches = list(loader.batches(count=2 * loader.steps_per_epoch))
    for batch in batches:
        assert len(set(batch.keys)) == len(batch.keys), "no video twice in a batch"
        assert batch.caption_mask.shape == (3, size)
        assert batch.tokens.shape == ((3, size, 12) if size > 1 else (3, 12))
        assert torch.equal(batch.caption_mask.any(dim=1), batch.valid)
        batch.tokens = batch.tokens.reshape(3, size, 12)
        assert torch.equal(batch.tokens[batch.valid, 0], clips_tokenizer()(batch.captions, 12))
    for epoch in (0, 1):
        own = [batch for batch in batches if batch.epoch == epoch]
        assert captions_of(own) == wanted(split, left)
    rows = [len(left.get(v, range(n))) for v, n in enumerate(COUNTS)]
    assert loader.pairs == sum(-(-n // size) for n in rows)
    assert loader.captions_a_row == pytest.approx(sum(rows) / loader.pairs)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("config", [SMALL, DROP, replace(SMALL, paragraph=True)], ids=["all", "dropped", "joined"])
def test_a_batch_says_which_caption_each_is(split, size, config):
    """Of all captions of its video, those that are left out counted too."""
    with Loader(split, config, batch_size=3, seed=4, captions_per_video=size) as loader:
        batches = list(loader.batches(count=2 * loader.steps_per_epoch))
    for batch in batches:
        assert batch.caption_numbers.shape == (3, size)
        assert np.array_equal(batch.caption_numbers >= 0, batch.caption_mask.numpy())
        for row, (video, _) in enumerate(batch.pairs):
            texts = [
                texts_of(split, int(video), config)[number] for number in batch.caption_numbers[row] if number >= 0
            ]
            tokens = batch.tokens.reshape(3, size, -1)[row][batch.caption_mask[row]]
            assert tokens.tolist() == clips_tokenizer()(texts, config.max_words).tolist()
            assert batch.captions[row] == texts[0]
    rows = [len(LEFT.get(v, range(n))) if config is DROP else n for v, n in enumerate(COUNTS)]
    shown = sum(int((batch.caption_numbers >= 0).sum()) for batch in batches)
    assert shown == 2 * (len(COUNTS) if config.paragraph else sum(rows))


def test_groups_are_even_and_others_each_epoch(split):
    groups = CaptionGroups(split, SMALL, 3, 4)
    epochs = [[groups.texts(0, number, epoch) for number in range(3)] for epoch in range(6)]
    for epoch in epochs:
        assert sorted(map(len, epoch)) == [2, 2, 3]
        assert sorted(text for group in epoch for text in group) == sorted(TEXTS[0])
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 6
    assert epochs == [[CaptionGroups(split, SMALL, 3, 4).texts(0, n, epoch) for n in range(3)] for epoch in range(6)]
    assert epochs[0] != [CaptionGroups(split, SMALL, 3, 5).texts(0, n, 0) for n in range(3)]
    assert groups.texts(2, 0, 0) == tuple(f"caption {i} of video2" for i in range(3))  # one group: nothing to shuffle


def test_group_counts_do_not_overflow_small_numbers():
    assert groups_of(np.array([250, 255, 1], np.uint8), 1000).tolist() == [1, 1, 1]
    assert groups_of(np.array([250, 255, 1], np.uint8), 2).tolist() == [125, 128, 1]


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_share_the_batches_of_one(split, size):
    def rows(rank: int, world: int) -> list:
        with Loader(split, DROP, batch_size=4, seed=1, rank=rank, world=world, captions_per_video=size) as loader:
            batches = list(loader.batches(count=2 * loader.steps_per_epoch))
        return [
            [
                (k, t[m].tolist())
                for k, t, m in zip(b.keys, b.tokens.reshape(4 // world, size, -1), b.caption_mask, strict=False)
            ]
            for b in batches
        ]

    alone, halves = rows(0, 1), (rows(0, 2), rows(1, 2))
    assert [a + b for a, b in zip(*halves, strict=True)] == alone


def test_a_loader_goes_on_where_another_stopped(split):
    def texts(start: int, count: int) -> list:
        with Loader(split, SMALL, batch_size=3, seed=4, captions_per_video=2) as loader:
            epoch, step = divmod(start, loader.steps_per_epoch)
            return [batch.tokens.tolist() for batch in loader.batches(epoch, step, count)]

    whole = texts(0, 9)
    assert texts(5, 4) == whole[5:]


def test_several_sets_have_groups_of_their_own(split, tmp_path):
    both = Concat([split, packed(tmp_path, 10)])
    groups = CaptionGroups(both, DROP, 2, 0)
    assert groups.sizes == [2 + 1 + 2 + 1 + 2] * 2 and groups.captions_a_row == 13 / 8
    assert groups.texts(5, 0, 3) != groups.texts(0, 0, 3) or groups.texts(5, 1, 3) != groups.texts(0, 1, 3)
    assert groups.texts(7, 0, 0)[0].endswith("of video12")
    order = order_of(both, DROP, 4, 0, False, groups)
    assert order.pairs == 16
    assert [note.partition(" in ")[0] for note in groups.notes] == [
        "data.drop_duplicate_captions: 7 of 20 captions"
    ] * 2


def test_each_set_shows_its_captions_once_in_each_of_its_own_epochs(split, tmp_path):
    """Nine rows of groups of three in each set, of which a step takes three of the one and one of the other."""
    other = packed(tmp_path, 10)
    config = replace(SMALL, train=("a", "b"), weights=(3.0, 1.0))
    with Loader(Concat([split, other]), config, batch_size=4, seed=0, captions_per_video=3) as loader:
        assert loader.steps_per_epoch == 5
        batches = list(loader.batches(count=18))
    for first in range(0, 18, 3):
        found = captions_of(batches[first : first + 3])
        keys = {split.video(i).key for i in range(5)}
        assert Counter({pair: n for pair, n in found.items() if pair[0] in keys}) == wanted(split, {})
    for first in (0, 9):
        found = captions_of(batches[first : first + 9])
        assert Counter({pair: n for pair, n in found.items() if pair[0] not in keys}) == wanted(other, {})


def test_what_is_dropped_is_told(split):
    with Loader(split, DROP, batch_size=3, seed=4) as loader:
        (note,) = loader.notes
    assert (
        note
        == f"data.drop_duplicate_captions: 7 of 20 captions in {split.path} repeat one of their video and are left out"
    )
    with Loader(split, SMALL, batch_size=3, seed=4) as loader:
        assert loader.notes == [] and loader.captions_a_row == 1


def test_the_order_of_groups_is_an_order_of_as_many_captions():
    counts = np.array([7, 1, 3, 5, 4] * 20, np.uint8)
    groups = Order(counts, 16, 42, together=3)
    plain = Order(groups_of(counts, 3), 16, 42)
    for step in range(groups.steps_per_epoch):
        assert np.array_equal(groups.batch(2, step), plain.batch(2, step))
        parts = [groups.batch(2, step)[rank_rows(16, rank, 4)] for rank in range(4)]
        assert np.array_equal(np.concatenate(parts), plain.batch(2, step))


def test_messages_speak_of_groups():
    with pytest.warns(UserWarning, match=r"a video has 5 groups of 4 captions, no batch"):
        Order([20] * 3, 8, 0, together=4)
    with pytest.raises(ValueError, match=r"keep apart the 5 groups of 4 captions of one video"):
        Order([20] * 3, 8, 0, drop_last=True, together=4)

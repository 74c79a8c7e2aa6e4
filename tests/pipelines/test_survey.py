"""Warnings before a run: captions that are cut, pictures that are scaled up, test videos that are training videos."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import open_clip
import pytest

from pipelines.config import DataConfig
from pipelines.lengths import Lengths, token_count
from pipelines.survey import lengths, notes
from pipelines.tokens import Tokenizer, clips_tokenizer
from shards.concat import open_splits
from shards.split import Split
from tests import vocabularies
from tests.pipelines.conftest import SIDE, pack_videos
from tests.pipelines.test_tokens import CAPTIONS
from tests.videos import encode

PLAIN = DataConfig(image_size=SIDE)
LETTERS = "abcdefghij XYZ0123456789'-,.&;<>\t\n" + "éüß中文字一个男人🎬İſﬁ½…“”‘’ÃÂ©\u00a0\u200b\u3000ＡＢ\u0301\x1b"
WORDS = (
    "it's they're DON'T I'LL <start_of_text> <END_OF_TEXT> &amp;lt; &quot; aaaaaaaa hello-world 12345 caf\u00c3\u00a9"
)


@pytest.mark.slow
def test_tokens_are_counted_as_open_clip_makes_them():
    tokenizer, rng, words = open_clip.tokenizer.SimpleTokenizer(), random.Random(3), WORDS.split()
    texts = [*CAPTIONS, "x" * 190]
    texts += ["".join(rng.choices(LETTERS, k=rng.randrange(80))) for _ in range(1500)]
    texts += [" ".join(rng.choices(words, k=rng.randrange(20))) for _ in range(500)]
    for text in texts:
        assert token_count(text) == 2 + len(tokenizer.encode(text)), text
    assert token_count("x" * 100_000) > 10_000, "in no time"


@pytest.mark.slow
def test_captions_above_the_limit_are_counted(numbered):
    split = numbered.intra
    every = [c["text"] for v in range(len(split)) for c in split.captions(v)]
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    tokens = [2 + len(tokenizer.encode(text)) for text in every]
    limit = sorted(tokens)[len(tokens) // 2]
    assert lengths(split, replace(PLAIN, max_words=limit), clips_tokenizer()) == Lengths(
        limit, len(every), sum(n > limit for n in tokens), max(tokens)
    )
    cut = sum(n > limit for n in tokens)
    assert notes(split, None, replace(PLAIN, max_words=limit)) == [
        f"{split.path}: {cut} of {len(every)} captions are cut at data.max_words={limit} tokens (CLIP's tokenizer, start and "
        f"end included; the longest has {max(tokens)})"
    ]
    assert notes(split, None, replace(PLAIN, max_words=max(tokens))) == []
    assert lengths(split, replace(PLAIN, paragraph=True), clips_tokenizer()).captions == len(split)


@pytest.mark.slow
def test_a_large_set_is_looked_at_for_a_second(numbered):
    ticks = count(step=0.4)
    found = lengths(numbered.intra, replace(PLAIN, max_words=3), clips_tokenizer(), now=lambda: next(ticks))
    assert found.captions == 6 and found.cut == 6
    assert len(numbered.intra) > 3


def test_stored_pictures_that_are_smaller_are_a_warning(numbered):
    (note,) = notes(numbered.intra, numbered.copy, replace(PLAIN, image_size=48, resize=96))
    assert note == (
        f"{numbered.intra.path} was packed with a short side of {SIDE} pixels, and data.resize=96 scales it up 1.50 times: "
        f"pack it with --short-side 96, or set data.resize={SIDE}"
    )
    (note,) = notes(None, numbered.intra, replace(PLAIN, image_size=96))
    assert note.endswith("data.image_size=96 scales it up 1.50 times: pack it with --short-side 96")
    assert notes(numbered.intra, numbered.copy, replace(PLAIN, image_size=48, resize=SIDE)) == []


def test_more_frames_a_second_than_are_stored_are_a_warning(numbered, tmp_path):
    split = numbered.intra
    for train, test, sampling in (
        (split, None, "uniform"),
        (split, None, "tail_by_frame"),
        (None, split, "head"),
        (None, split, "random"),
    ):
        (note,) = notes(train, test, replace(PLAIN, fps=10, sampling=sampling))
        assert note == (
            f"{split.path} was packed with --fps 3, and data.fps=10 asks for more frames a second than it stores: clips repeat frames, "
            "unevenly. Set data.fps=3, or pack it with --fps 10"
        )
    for sampling in ("segment", "random"):
        assert notes(split, None, replace(PLAIN, fps=10, sampling=sampling)) == []
    assert notes(split, None, replace(PLAIN, fps=3)) == notes(numbered.copy, None, replace(PLAIN, fps=10)) == []
    slow = pack_videos(tmp_path / "slow", {"a.mp4": encode(9, 3)}, "intra")
    assert notes(slow, None, replace(PLAIN, fps=10)) == [], "it has all frames of its videos"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_test_set_that_is_trained_on_is_a_warning(numbered, tmp_path: Path, mixed):
    other = Path(shutil.copytree(numbered.intra.path, tmp_path / "copy of it"))
    train = open_splits([numbered.copy.path, numbered.intra.path] if mixed else numbered.intra.path)
    (note,) = notes(train, Split(other), PLAIN)
    assert note == (
        f"data.test={other} holds the same videos and captions as data.train={numbered.intra.path}: its metrics say nothing "
        "about new videos"
    )
    (note,) = notes(train, numbered.intra, PLAIN)
    assert note.startswith(f"data.test={numbered.intra.path} holds the same videos and captions as data.train: ")
    assert notes(train, numbered.copy, PLAIN) == [] or mixed


def test_captions_are_counted_by_the_runs_own_tokenizer(numbered, tmp_path):
    tokenizer = Tokenizer({"kind": "hf", "name": vocabularies.sentencepiece(tmp_path), "context_length": 8})
    split = numbered.intra
    tokens = [tokenizer.count(c["text"]) for v in range(len(split)) for c in split.captions(v)]
    cut = sum(n > 8 for n in tokens)
    assert cut > 0 and cut != sum(token_count(c["text"]) > 8 for v in range(len(split)) for c in split.captions(v))
    assert notes(split, None, replace(PLAIN, max_words=8), tokenizer) == [
        f"{split.path}: {cut} of {len(tokens)} captions are cut at data.max_words=8 tokens, all that the text tower takes "
        f"({tmp_path}'s tokenizer, start and end included; the longest has {max(tokens)})"
    ]

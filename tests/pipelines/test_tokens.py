import open_clip
import pytest
import torch

from pipelines.tokens import clips_tokenizer

CAPTIONS = [
    "a man is driving a car",
    "",
    "Two  DOGS\t play\n in the   snow ",
    "salt &amp;amp; pepper &lt;3 caf\u00e9",
    "the l\u00c3\u00a9gende, mis-decoded",
    "someone explains " + "the very long " * 40 + "recipe",
    "\u4e00\u4e2a\u4eba \U0001f600",
]


@pytest.mark.parametrize("max_words", [3, 8, 32, 77])
def test_tokens_are_clips_own(max_words):
    tokens = clips_tokenizer()(CAPTIONS, max_words)
    assert tokens.shape == (len(CAPTIONS), max_words) and tokens.dtype == torch.int64
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32")(CAPTIONS, context_length=max_words))


def test_start_and_end_are_always_there_and_the_rest_is_zero():
    start, end = 49406, 49407
    for max_words in (3, 12, 32):
        for row in clips_tokenizer()(CAPTIONS, max_words).tolist():
            last = row.index(end)
            assert row[0] == start and row.count(end) == 1
            assert all(row[1:last]) and not any(row[last + 1 :])
    assert clips_tokenizer()([CAPTIONS[5]], 32)[0, -1] == end, "kept where the caption is cut"


def test_text_is_cleaned_first():
    plain = clips_tokenizer()(["salt & pepper in a café"], 32)
    assert torch.equal(clips_tokenizer()(["  SALT &amp;amp;\n pepper   in a caf\u00c3\u00a9 "], 32), plain)
    assert clips_tokenizer()(["a man is driving a car"], 8).tolist() == [[49406, 320, 786, 533, 4161, 320, 1615, 49407]]


def test_no_captions_give_no_rows():
    assert clips_tokenizer()([], 16).shape == (0, 16)

"""Captions to token ids, by CLIP's own tokenizer (open_clip's)."""

from functools import lru_cache

import torch
from open_clip.tokenizer import SimpleTokenizer


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(captions: list[str], max_words: int) -> torch.Tensor:
    """int64 [captions, max_words]: start, the words' pieces cut to fit, end (always kept), zeros.

    The text is repaired (ftfy), HTML-unescaped, put on single spaces and in lower case first, as CLIP does.
    """
    if not captions:
        return torch.zeros(0, max_words, dtype=torch.int64)
    return _tokenizer()(captions, context_length=max_words)

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
    return torch.stack([_row(caption, max_words) for caption in captions])


@lru_cache(maxsize=100_000)  # every epoch shows the same captions; a row takes about 1 kB
def _row(caption: str, max_words: int) -> torch.Tensor:
    return _tokenizer()([caption], context_length=max_words)[0].clone()

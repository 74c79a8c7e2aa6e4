"""Captions that say the same in other words' endings: failures that may be none."""

import re
from collections.abc import Iterable

_WORDS = re.compile(r"\w+")
_EMPTY = frozenset(
    ("a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "am", "some", "this", "that", "there")
)
_SHORTEST = 4  # words that two captions need if one of them has a word more


def normal(text: str) -> tuple[str, ...]:
    """The words of a caption, in order, in lower case, without articles and forms of "to be", and without endings."""
    words = (word for word in _WORDS.findall(text.lower()) if word not in _EMPTY)
    return tuple(_stem(word) for word in words)


def _stem(word: str) -> str:
    """An English word without -ing, -ed, -es, -s or a last e, roughly; rides and riding become one."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and not word.endswith("ss") and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            if ending in ("ing", "ed") and len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def nearly_equal(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two captions (as `normal` gives them) have the same words in the same order, but for one word that only one of
    them has. The order counts: from left to right is not from right to left."""
    if one == other:
        return bool(one)
    short, long = sorted((one, other), key=len)
    if len(long) != len(short) + 1 or len(short) < _SHORTEST:
        return False
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[same:] == long[same + 1 :]


def find(query: tuple[str, ...], captions: Iterable[tuple[str, ...]]) -> int | None:
    """The place of the first caption that is nearly equal to the query; None if none is."""
    return next((i for i, caption in enumerate(captions) if nearly_equal(query, caption)), None)

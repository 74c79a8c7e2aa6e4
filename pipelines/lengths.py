"""How many tokens captions have, counted without torch: packing and `info` count them, too.

The tokenizer is CLIP's, as `pipelines.tokens` has it from open_clip, whose vocabulary is read here and nothing else.
"""

import gzip
import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

TOKENIZER = "CLIP's tokenizer"
CONTEXT = 77  # tokens that CLIP's text tower takes
USUAL = 32  # tokens that CLIP4Clip's own recipe takes
_MERGES = 48894  # lines of the vocabulary that CLIP uses
_PARTS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # what is a token at most
_LONG = 200  # bytes of a word without spaces, above which its tokens are counted by its halves
_SPECIAL = ("<start_of_text>", "<end_of_text>")


@dataclass
class Lengths:
    """Of captions in tokens, start and end included: how many there are, how many are above a limit, and the longest.

    of_caption: counts those of one; CLIP's.
    """

    limit: int
    captions: int = 0
    cut: int = 0
    longest: int = 0
    of_caption: Callable[[str], int] = field(default_factory=lambda: token_count, repr=False, compare=False)

    def add(self, texts: Iterable[str]) -> None:
        """Count these captions, too."""
        for text in texts:
            tokens = self.of_caption(text)
            self.captions += 1
            self.cut += tokens > self.limit
            self.longest = max(self.longest, tokens)


def token_count(text: str) -> int:
    """Tokens of a caption, start and end included."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to clean
        from ftfy import fix_text

        text = html.unescape(html.unescape(fix_text(text)))
    return 2 + sum(map(_of_chunk, text.lower().split()))


@lru_cache(maxsize=200_000)
def _of_chunk(chunk: str) -> int:
    """Tokens of a text without spaces."""
    import regex

    return sum(_of_part(part) for part in regex.findall(_PARTS, chunk, regex.IGNORECASE))


def _of_part(part: str) -> int:
    if part in _SPECIAL:
        return 1
    letters, ranks = _vocabulary()
    data = part.encode(errors="replace")
    if len(data) > _LONG:  # the time that merging takes grows with the square of this
        return _of_part(part[: len(part) // 2]) + _of_part(part[len(part) // 2 :])
    pieces = [letters[byte] for byte in data]
    pieces[-1] += "</w>"
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, _MERGES), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == _MERGES:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return len(pieces)


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[list[str], dict[tuple[str, str], int]]:
    """The letter that stands for each byte, and the rank of each pair that is merged, the first one first."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    package = find_spec("open_clip")  # not imported, which takes seconds
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    folder = package.submodule_search_locations[0]
    with gzip.open(Path(folder) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + _MERGES]
    pairs = (line.split() for line in lines)
    return letters, {(first, second): rank for rank, (first, second) in enumerate(pairs)}

"""What people search for: sentences as they are typed, clips and pictures; and what a person should know of a sentence.

Imports nothing heavy: mistakes are found before the text tower is loaded.
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from c4c.retrieval.index.store import Hit
    from c4c.retrieval.search.searcher import Searcher
    from pipelines.tokens import Tokenizer

LONGEST = 100_000  # characters
_MULTILINGUAL = (
    100_000  # entries of a vocabulary that was made for many languages: XLM-R 250 002, mT5 250 100, Gemma 256 000
)
_SHARE = 0.05  # of a smaller vocabulary that must be of a script: BERT's Chinese one has 0.35 of Chinese, its English one 0.02
_FOREIGN = 0.25  # of a sentence's letters, above which it is told
_LATIN = "Latin"
# how Unicode's names of letters begin, where that is not the name of the script
_NAMES = {"Cjk": "Chinese", "Hiragana": "Japanese", "Katakana": "Japanese", "Hangul": "Korean"}


@dataclass(frozen=True)
class Query:
    """One of the things that a command is asked for: a sentence, or a file of `kind` video or image. text: it, or the file's name."""

    text: str
    kind: str = "sentence"

    def ask(self, searcher: "Searcher", k: int, how: dict[str, Any]) -> "tuple[list[Hit], str]":
        """(results, a note on the query or ''). how: as `Searcher.search` takes it. Raises ValueError and OSError."""
        if self.kind == "video":
            return searcher.by_video(self.text, k, **how), ""
        if self.kind == "image":
            return searcher.by_image(self.text, k, **how), ""
        return searcher.search([self.text], k, **how)[0], searcher.note(self.text)


def choose_queries(
    sentences: Sequence[str], file: str | None = None, video: Path | None = None, image: Path | None = None,
    checkpoint: str | None = None,
) -> list[Query]:  # fmt: skip
    """What the words of a command ask for; file: of a sentence a line, `-` for standard input; checkpoint: --ckpt, which only an
    example needs. Raises ValueError, OSError."""
    given = [
        name
        for name, value in (("sentences", sentences), ("--queries", file), ("--video", video), ("--image", image))
        if value
    ]
    if not given:
        raise ValueError(
            "there is nothing to search for: write a sentence, or name a file with --queries, --video or --image"
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: search for one of them at a time")
    if video or image:
        path = video or image
        if path is not None and not path.is_file():
            raise ValueError(f"--{'video' if video else 'image'} {path}: there is no such file")
        return [Query(str(path), "video" if video else "image")]
    if checkpoint:
        raise ValueError(
            f"--ckpt {checkpoint} is for --video and --image: sentences need the index alone, so leave it out"
        )
    texts = _lines(file) if file else list(sentences)
    for number, text in enumerate(texts, 1):
        try:
            clean(text)
        except ValueError as error:
            raise ValueError(f"{f'query {number} of {len(texts)}: ' if len(texts) > 1 else ''}{error}") from error
    return [Query(text.encode("utf-8", "replace").decode()) for text in texts]


def unquoted(sentences: Sequence[str]) -> str:
    """A note where the sentences of a command look like one without quotes; else ''."""
    if len(sentences) < 2 or any(len(sentence.split()) > 1 for sentence in sentences):
        return ""
    return f'each of the {len(sentences)} words is searched for by itself; a sentence stands in quotes: "{" ".join(sentences)}"'


def _lines(file: str) -> list[str]:
    """The sentences in a file, without empty lines."""
    from shards.annotations.text import encoding_of

    named = "standard input" if file == "-" else f"--queries {file}"
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode(encoding_of(data[:4]))
    except UnicodeDecodeError as error:
        kind = encoding_of(data[:4]).removesuffix("-sig").upper()
        raise ValueError(f"{named} is not {kind} text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{named} cannot be read: {error.strerror}") from error
    if not (lines := [line.strip() for line in text.split("\n") if line.strip()]):
        raise ValueError(f"{named} holds no sentence")
    return lines


def clean(sentence: str) -> str:
    """The sentence on single spaces, without control characters and what is no text. Raises ValueError if nothing is left, or
    it is longer than 100 000 characters."""
    if len(sentence) > LONGEST:
        raise ValueError(f"a query of {len(sentence)} characters: {LONGEST} are the most")
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cs", "Cn", "Co") else char for char in sentence)
    text = " ".join(text.split())
    if not any(unicodedata.category(char)[0] in "LNPSM" for char in text):
        raise ValueError(f"the query {sentence[:30]!r} is empty: write what the video shows")
    return text


def note(sentence: str, tokenizer: "Tokenizer", max_words: int) -> str:
    """What a person should know of how the text tower takes a sentence that `clean` gave; '' if there is nothing."""
    notes = []
    if unknown := foreign(sentence, tokenizer):
        notes.append(
            f"the query is in {' and '.join(unknown)} letters, which this model's text tower was not trained on: the results "
            "may mean little. Write it in English, or index with a multilingual model"
        )
    if (tokens := tokenizer.count(sentence)) > max_words:
        notes.append(
            f"the query has {tokens} tokens, and the model reads the first {max_words}: the rest does not count"
        )
    return "; ".join(notes)


def foreign(sentence: str, tokenizer: "Tokenizer") -> list[str]:
    """Scripts that make up a quarter of the sentence's letters or more, of which the tokenizer's vocabulary has next to nothing."""
    known = scripts_of(tokenizer)
    return [] if known is None else other_scripts(sentence, known)


def other_scripts(sentence: str, known: frozenset[str] = frozenset([_LATIN])) -> list[str]:
    """Scripts that are not among the `known` ones, where they make up a quarter of the sentence's letters or more, sorted."""
    scripts = letters([sentence])
    unknown = {script: count for script, count in scripts.items() if script not in known}
    if sum(unknown.values()) < _FOREIGN * scripts.total() or not unknown:
        return []
    return sorted(unknown)


def letters(texts: Iterable[str]) -> Counter[str]:
    """How many letters of each script there are."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_script(char) for char in unicodedata.normalize("NFKC", text) if char.isalpha())
    return counts


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "OTHER").split()[0].split("-")[0].title()
    return _NAMES.get(name, name)


@lru_cache(maxsize=8)
def scripts_of(tokenizer: "Tokenizer") -> frozenset[str] | None:
    """Scripts that a tokenizer's vocabulary was made for; None: any. CLIP's was made of English text."""
    pieces = tokenizer.vocabulary()
    if pieces is None:
        return frozenset([_LATIN])
    if len(pieces) >= _MULTILINGUAL:
        return None
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(letters([piece]).keys())
    return frozenset([_LATIN, *(script for script, count in counts.items() if count >= _SHARE * len(pieces))])

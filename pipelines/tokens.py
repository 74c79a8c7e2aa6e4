"""Captions to token ids, by the tokenizer that a text tower was trained with (open_clip's classes)."""

import json
import os
import tempfile
import threading
from collections import OrderedDict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from pipelines.hub import mind_the_network
from pipelines.lengths import CONTEXT, token_count
from pipelines.lengths import TOKENIZER as CLIP_NAME
from shards import first_line

CLIPS: dict[str, Any] = {
    "kind": "clip", "name": "", "context_length": CONTEXT, "kwargs": {}, "mode": None, "fixed_length": False,
}  # fmt: skip
_ONE_AT_A_TIME = threading.Lock()  # a fast tokenizer fails where two threads use it
_CACHED = 100_000  # captions: every epoch shows the same ones; a row takes about 1 kB
_MARKS = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """Turns captions into rows of token ids, as open_clip's tokenizer of the same text tower does.

    about: which one, as `spec["tokenizer"]` says (c4c.models.tokenizer_spec makes it); None: CLIP's.
      kind            clip (open_clip's SimpleTokenizer) or hf (its HFTokenizer)
      name            of an hf tokenizer: its id on the Hugging Face hub, or a folder
      context_length  tokens of a row, at most
      kwargs, mode    what open_clip's class takes beside
      fixed_length    the text tower's features depend on the padding: every row has the context length
      files           a folder with a copy of the files of an hf tokenizer, if there is one: it is read instead of `name`

    name: what to call it. pad_id: the token that fills a row.

    Raises ValueError for a tokenizer that cannot be had, and says what to fetch.
    """

    def __init__(self, about: dict[str, Any] | None = None):
        about = CLIPS | (about or {})
        self.context_length: int = about["context_length"]
        self._clips = about["mode"] == "clips"
        self._plain = about["kind"] == "clip" and not about["kwargs"]
        self._cut: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._open_clip: Any
        self.name, self.pad_id, self._pads_left = CLIP_NAME, 0, False
        if about["kind"] == "hf":
            self._open_clip = _from_hub(about)
            hf = self._open_clip.tokenizer
            self.name, self.pad_id = f"{about['name']}'s tokenizer", int(hf.pad_token_id)
            self._pads_left = hf.padding_side == "left"
        elif about["kind"] == "clip":
            self._open_clip = _simple(about)
        else:
            raise ValueError(f"the tokenizer's kind must be clip or hf; got {about['kind']!r}")
        # where padding stands in front, its length moves every word
        self.fixed_length = bool(about["fixed_length"]) or self._clips or self._pads_left

    def length(self, max_words: int) -> int:
        """Tokens of a row. Raises ValueError for a limit that the tokenizer cannot keep."""
        if self.fixed_length and max_words > self.context_length:
            raise ValueError(
                f"data.max_words={max_words} is longer than the {self.context_length} tokens that the text tower takes"
            )
        if self._clips and max_words < self.context_length:
            raise ValueError(
                f"data.max_words={max_words}: {self.name} sets a token behind the padding, where its text tower looks for it, so "
                f"captions cannot be cut shorter. Set data.max_words={self.context_length}"
            )
        return self.context_length if self.fixed_length else max_words

    def __call__(self, captions: list[str], max_words: int) -> torch.Tensor:
        """int64 [captions, length(max_words)]: a caption's tokens, cut to `max_words` with the end kept, and padding.

        Texts are cleaned first as the text tower was trained: CLIP's repairs them (ftfy), unescapes HTML, and puts them on
        single spaces and in lower case.
        """
        length = self.length(max_words)
        if not captions:
            return torch.zeros(0, length, dtype=torch.int64)
        with _ONE_AT_A_TIME:
            if new := [text for text in dict.fromkeys(captions) if (text, max_words) not in self._cut]:
                for text, row in zip(new, self._rows(new, max_words, length), strict=True):
                    self._cut[text, max_words] = row.clone()
            rows = torch.stack([self._cut[text, max_words] for text in captions])
            for text in captions:
                self._cut.move_to_end((text, max_words))
            while len(self._cut) > _CACHED:
                self._cut.popitem(last=False)
        return rows

    def _rows(self, texts: list[str], max_words: int, length: int) -> torch.Tensor:
        rows = self._open_clip(texts, context_length=max_words)
        if length == max_words:
            return rows
        padding = rows.new_full((len(rows), length - max_words), self.pad_id)
        return torch.cat([padding, rows] if self._pads_left else [rows, padding], dim=1)

    def missing(self, max_words: int) -> torch.Tensor:
        """int64 [length(max_words)]: the row where there is no caption. Towers make numbers of it, which mean nothing.

        Padding alone would not do: a tower that masks it is left with no word to look at, and gives NaN.
        """
        if self._plain and not self.fixed_length:
            return torch.zeros(self.length(max_words), dtype=torch.int64)
        return self(["none"], max_words)[0]

    def count(self, text: str) -> int:
        """Tokens of a caption that is not cut, start and end included."""
        if self._plain:
            return token_count(text)
        if isinstance(self._open_clip, SimpleTokenizer):
            return 2 + len(self._open_clip.encode(text))
        with _ONE_AT_A_TIME:
            text = self._open_clip.clean_fn(text)
            ids = self._open_clip.tokenizer(text, add_special_tokens=not self._clips, verbose=False)["input_ids"]
        return len(ids) + 3 * self._clips  # its start, end and class token

    def vocabulary(self) -> list[str] | None:
        """The pieces of text that an hf tokenizer knows; None for CLIP's."""
        return list(self._open_clip.tokenizer.get_vocab()) if isinstance(self._open_clip, HFTokenizer) else None

    def save(self, folder: Path) -> None:
        """Write the files of an hf tokenizer, as open_clip takes them from a `local-dir:` folder. CLIP's has none."""
        if not isinstance(self._open_clip, HFTokenizer):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as unfinished:
            self._open_clip.save_pretrained(unfinished)
            for file in sorted(Path(unfinished).iterdir()):
                os.replace(file, folder / file.name)  # a run that is killed here leaves no half of a file


def _simple(about: dict[str, Any]) -> SimpleTokenizer:
    _check(about)
    try:
        return _clips_own() if not about["kwargs"] else SimpleTokenizer(**about["kwargs"])
    except (TypeError, AssertionError, OSError) as error:
        raise ValueError(f"the tokenizer cannot be made with {about['kwargs']}: {error}") from error


@cache
def _clips_own() -> SimpleTokenizer:
    return SimpleTokenizer()


def _from_hub(about: dict[str, Any]) -> HFTokenizer:
    _check(about)
    copy = about.get("files", "")
    source = copy if copy and Path(copy).is_dir() else about["name"]
    if not Path(source).is_dir():
        mind_the_network()
    try:
        return _loaded(source, about["mode"], json.dumps(about["kwargs"], sort_keys=True))
    except Exception as error:  # of transformers, tokenizers, huggingface_hub, whichever
        raise ValueError(_cannot_be_had(about, source, error)) from error


@lru_cache(maxsize=4)  # large vocabularies take seconds
def _loaded(source: str, mode: str | None, kwargs: str) -> HFTokenizer:
    tokenizer = HFTokenizer(source, tokenizer_mode=mode, **json.loads(kwargs))
    if tokenizer.tokenizer.pad_token_id is None:
        raise ValueError("it has no token for padding")
    tokenizer(["none"])  # what it lacks else (an end token, say) fails here, not in the first step
    return tokenizer


def _cannot_be_had(about: dict[str, Any], source: str, error: Exception) -> str:
    """Why there is no such tokenizer, and what to do."""
    reason = first_line(error).rstrip(".")
    if not Path(source).is_absolute() and not Path(source).is_dir():
        return (
            f"the tokenizer {source} cannot be had ({reason}): with a network it is fetched by itself. Without, run "
            f"`hf download {source} --include '*.json' --include '*.model' --include '*.txt'` on a machine that has one, and copy "
            "its ~/.cache/huggingface to this machine's (HF_HOME); or put those files into a folder with open_clip_config.json "
            "and the weights, and name the backbone local-dir:FOLDER"
        )
    if not Path(source).is_dir():
        reason = "there is no such folder"
    elif not any((Path(source) / name).is_file() for name in _MARKS):
        reason = "the folder has none"
    whose = f" of {about['hub']}" if about.get("hub") else ""
    return (
        f"the tokenizer {source} cannot be had ({reason}): the files{whose} belong there, as open_clip takes the tokenizer of a "
        f"local-dir: backbone from its folder: {', '.join(_MARKS)}, and spiece.model, vocab.txt or the like where the hub "
        "has one"
    )


def _check(about: dict[str, Any]) -> None:
    kwargs = about["kwargs"]
    if kwargs.get("reduction_mask"):
        raise ValueError(
            f"tokenizer_kwargs.reduction_mask={kwargs['reduction_mask']!r} draws at random which words of a long caption "
            "stay, so that no number could be had twice: take it out of open_clip_config.json"
        )
    if kwargs.get("trust_remote_code"):
        raise ValueError(
            "tokenizer_kwargs.trust_remote_code runs code from the hub: take it out of open_clip_config.json, and name a "
            "tokenizer that needs none"
        )


@cache
def clips_tokenizer() -> Tokenizer:
    """CLIP's."""
    return Tokenizer()

"""What to know of splits before they are trained on or evaluated: what a run would do to them without a word."""

import time
from collections.abc import Callable

from pipelines.config import DataConfig
from pipelines.lengths import TOKENIZER, Lengths
from shards.dataset import Dataset
from shards.split import Split

_SECONDS = 1.0  # for the captions of a split; of a larger one the first are looked at


def notes(train: Dataset | None, test: Split | None, config: DataConfig) -> list[str]:
    """Warnings: the same videos in training and test, pictures that are scaled up, captions that are cut."""
    trained = [] if train is None else train.parts
    tested = [] if test is None else [test]
    warnings = [
        f"data.test={one.path} holds the same videos and captions as data.train"
        f"{'' if str(one.path) == str(other.path) else f'={other.path}'}: its metrics say nothing about new videos"
        for one in tested
        for other in trained
        if one.digest == other.digest
    ]
    splits: dict[str, Split] = {}
    for split in (*trained, *tested):
        splits.setdefault(split.digest, split)
    for note in (_enlarged, _cut):
        warnings += filter(None, (note(split, config) for split in splits.values()))
    return warnings


def _enlarged(split: Split, config: DataConfig) -> str | None:
    stored, wanted = split.info["profile"].get("short_side"), config.short_side
    if stored is None or stored >= wanted:
        return None
    setting = "resize" if config.resize else "image_size"
    instead = f", or set data.resize={stored}" if stored >= config.image_size else ""
    return (
        f"{split.path} was packed with a short side of {stored} pixels, and data.{setting}={wanted} scales it up "
        f"{wanted / stored:.2f} times: pack it with --short-side {wanted}{instead}"
    )


def _cut(split: Split, config: DataConfig) -> str | None:
    return cut_note(
        lengths(split, config), str(split.path), f"data.max_words={config.max_words}", split.info["captions"]
    )


def lengths(split: Split, config: DataConfig, now: Callable[[], float] = time.monotonic) -> Lengths:
    """Of the split's captions, or of the first of them, as far as a second goes."""
    counted, end = Lengths(config.max_words), now() + _SECONDS
    for video in range(len(split)):
        texts = [caption["text"] for caption in split.captions(video)]
        counted.add([" ".join(texts)] if config.paragraph else texts)
        if now() > end:
            break
    return counted


def cut_note(counted: Lengths, where: str, limit: str, total: int) -> str | None:
    """How many captions are cut, None if none is."""
    if not counted.cut:
        return None
    of = f"{counted.captions}" if counted.captions >= total else f"the first {counted.captions}"
    return (
        f"{where}: {counted.cut} of {of} captions {'is' if counted.cut == 1 else 'are'} cut at {limit} tokens ({TOKENIZER}, "
        f"start and end included; the longest has {counted.longest})"
    )

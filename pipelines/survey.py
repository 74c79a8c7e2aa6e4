"""What to know of splits before they are trained on or evaluated: what a run would do to them without a word."""

import time
from collections.abc import Callable

from pipelines.config import DataConfig
from pipelines.geometry import enlarged
from pipelines.lengths import Lengths
from pipelines.tokens import Tokenizer, clips_tokenizer
from shards.dataset import Dataset
from shards.split import Split

_SECONDS = 1.0  # for the captions of a split; of a larger one the first are looked at
_VIDEOS = 100  # of a split whose frames are counted


def notes(
    train: Dataset | None, test: Split | None, config: DataConfig, tokenizer: Tokenizer | None = None
) -> list[str]:
    """Warnings: the same videos in training and test, pictures that are scaled up, frames that are wanted twice, captions that are cut.

    tokenizer: the run's; None: CLIP's.
    """
    tokenizer = tokenizer or clips_tokenizer()
    config = config.filled()
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
    warnings += filter(None, (enlarged(split, config) for split in splits.values()))
    warnings += filter(None, (_sparse(split, config, split in tested) for split in splits.values()))
    warnings += filter(None, (_cut(split, config, tokenizer) for split in splits.values()))
    return warnings


def _sparse(split: Split, config: DataConfig, testing: bool) -> str | None:
    """That the recipe asks for more frames a second than were kept of the videos; None if it does not."""
    stored, rule = split.info["profile"].get("fps"), config.sampling
    if stored is None or config.fps <= stored or rule.startswith("segment") or (rule == "random" and not testing):
        return None
    if all(video.source_frames <= len(video.frames) for video in map(split.video, range(min(len(split), _VIDEOS)))):
        return None  # they have no more
    return (
        f"{split.path} was packed with --fps {stored}, and data.fps={config.fps} asks for more frames a second than it stores: clips "
        f"repeat frames, unevenly. Set data.fps={stored}, or pack it with --fps {config.fps}"
    )


def _cut(split: Split, config: DataConfig, tokenizer: Tokenizer) -> str | None:
    """How many captions are cut, None if none is."""
    counted, total = lengths(split, config, tokenizer), split.info["captions"]
    if not counted.cut:
        return None
    of = f"{counted.captions}" if counted.captions >= total else f"the first {counted.captions}"
    most = ", all that the text tower takes" if config.max_words == tokenizer.context_length else ""
    return (
        f"{split.path}: {counted.cut} of {of} captions {'is' if counted.cut == 1 else 'are'} cut at data.max_words="
        f"{config.max_words} tokens{most} ({tokenizer.name}, start and end included; the longest has {counted.longest})"
    )


def lengths(
    split: Split, config: DataConfig, tokenizer: Tokenizer, now: Callable[[], float] = time.monotonic
) -> Lengths:
    """Of the split's captions, or of the first of them, as far as a second goes."""
    counted, end = Lengths(config.max_words, of_caption=tokenizer.count), now() + _SECONDS
    for video in range(len(split)):
        texts = [caption["text"] for caption in split.captions(video)]
        counted.add([" ".join(texts)] if config.paragraph else texts)
        if now() > end:
            break
    return counted

"""MSVD: raw-captions.pkl with train_list.txt, val_list.txt or test_list.txt; videos are YouTubeClips' .avi.

The files are those of the official CLIP4Clip repository's `msvd_data.zip`.
"""

import pickle
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from shards import ShardError
from shards.annotations import Caption, Counts, Item, Reading, add_annotations, conclude, unique, unknown
from shards.annotations.text import expect, published, read_json, read_lines, sentences, unreadable

PUBLISHED = {
    "train.list": Counts(1200, 48_774),
    "val.list": Counts(100, 4290),
    "test.list": Counts(670, 27_763),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    captions = "raw-captions.pkl (nothing in it is executed), or a json {video: [captions]}"
    add_annotations(parser, captions, "train_list.txt, val_list.txt or test_list.txt (all videos)")


def read(args: Namespace) -> Reading:
    """Videos in the order of the list, or of the captions."""
    if args.annotations.suffix == ".json":
        data = expect(read_json(args.annotations), dict, args.annotations, "an object of lists of captions")
        captions: dict[str, tuple[Caption, ...]] = {}
        for name, texts in data.items():  # with and without .avi it is one video
            id = name.removesuffix(".avi")
            captions[id] = captions.get(id, ()) + sentences(texts, f"{args.annotations}: {name}")
    else:
        captions = _pickled(args.annotations)
    ids, warnings = list(captions), list[str]()
    if args.split:
        ids, warnings = unique((name.removesuffix(".avi") for name in read_lines(args.split)), args.split.name)
        warnings += unknown(ids, captions, args.split, args.annotations)
    items = [Item(id, args.videos.find(id), captions.get(id, ())) for id in ids]
    return conclude(items, args.videos, published(PUBLISHED, args.split), warnings)


class _Plain(pickle.Unpickler):
    """Unpickles lists, tuples, dicts, strings and numbers; whatever would import a name or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which captions never need")


def _pickled(path: Path) -> dict[str, tuple[Caption, ...]]:
    """{id: captions} of a pickled {id: [[word, …], …]}, written by Python 2 or 3."""
    try:
        with open(path, "rb") as file:
            data = _Plain(file, encoding="bytes").load()  # Python 2's strings are bytes, in an encoding it does not say
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ShardError(f"{path} is not a plain pickle of captions ({error})") from error
    expect(data, dict, path, "a dict of lists of sentences")
    captions: dict[str, tuple[Caption, ...]] = {}
    for key, texts in data.items():
        id = _text(key, path)
        captions[id] = captions.get(id, ()) + tuple(_sentence(words, path) for words in _list(texts, path))
    return captions


def _sentence(words: object, path: Path) -> Caption:
    """A sentence, a list of words or already a string."""
    text = (
        _text(words, path) if isinstance(words, str | bytes) else " ".join(_text(w, path) for w in _list(words, path))
    )
    return Caption(" ".join(text.split()))


def _list(value: object, path: Path) -> list | tuple:
    return expect(value, list | tuple, path, "lists of words")  # type: ignore[arg-type]


def _text(value: object, path: Path) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    return expect(value, str, path, "words")

"""Values of a study's yaml file, each checked as it is read: an error names the entry and what would be right."""

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c4c.config import ConfigError
from c4c.files import parse_yaml
from c4c.study.config import LAUNCH
from c4c.study.words import as_text, flat, label_of

_OWN = {"run.dir": "the study names the folders", "run.seed": "write seeds: [42, 43]", "run.resume": "the study continues what is unfinished"}  # fmt: skip
MOST = 1024  # cells at once, or GPUs of one
_BASE = ("cfg", "set", "from")
_KEYS = {
    "study": ("title", "out", "launcher", "jobs", "gpus_per_cell", "slurm", "seeds", "cfg", "set", "recipes", "tables"),
    "recipe": _BASE,
    "table": ("name", "title", "about", *_BASE, "grid", "rows", "sweeps", "baseline", "plot"),
    "row": ("label", *_BASE, "evaluate"),
    "sweep": ("label", "key", "values", *_BASE, "plot", "baseline"),
    "value": ("label", "value", "set"),
    "plot": ("key", "log"),
}


def check_keys(entry: Any, kind: str, where: str) -> None:
    """Raise ConfigError if an entry is no mapping or has a key that its kind does not have."""
    known = _KEYS[kind]
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: a {kind} has keys and values ({', '.join(known)}); got {label_of(entry)[:200]}")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"a {kind} has the keys {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {str(key)[:200]}: {hint}")


def settings_of(tree: Any, where: str) -> dict[str, str]:
    """{key: text} of what `set` holds; a nested mapping counts as dotted keys."""
    settings: dict[str, str] = {}
    for name, value in mapping_of(tree, "set", where).items():
        own = {str(key): as_text(one) for key, one in flat({name: value}).items()}
        if twice := own.keys() & settings.keys():
            raise ConfigError(f"{where}: {min(twice)} is set twice, as a dotted key and inside another: leave one out")
        settings |= own
    for key in settings:
        if key in _OWN:
            raise ConfigError(f"{where}: {key} cannot be set: {_OWN[key]}")
    return settings


def command_line(words: Sequence[str]) -> dict[str, str]:
    """{key: text} of key=value words. Raises ConfigError."""
    out: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} on the command line: write it as key=value, for example train.epochs=1")
        if key in _OWN:
            raise ConfigError(f"{word} on the command line: {key} cannot be set: {_OWN[key]}")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{word!r} on the command line: the value is not YAML: {error}") from error
        out |= {name: as_text(one) for name, one in flat({key: value}).items()}
    return out


def cfg_of(name: Any, folder: Path, where: str) -> str:
    """The name of a recipe's file as launch/train.py finds it: beside the study's, else here, else in launch/cfg."""
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{where}: cfg must name the recipe that is trained, a file in launch/cfg or a path; got {name!r}"
        )
    beside = folder / name
    return str(beside) if beside.is_file() and folder.resolve() != LAUNCH / "cfg" else name


def text_of(entry: dict, key: str, where: str, default: str) -> str:
    """An entry's text. Raises ConfigError."""
    value = entry.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {key} must be text; got {label_of(value)}")
    return value


def label_in(entry: dict, where: str) -> str:
    """An entry's label: one line of text, since it stands in tables and above commands. Raises ConfigError."""
    label = entry.get("label")
    if not isinstance(label, str) or not label.strip():
        raise ConfigError(f"{where}: give it a label, in quotes if it looks like a number; got {label!r}")
    if not label.isprintable():
        raise ConfigError(f"{where}: a label is one line of characters that can be printed; got {label!r}")
    return label


def count_of(entry: dict, key: str, where: str, default: int, least: int) -> int:
    """An entry's whole number. Raises ConfigError."""
    value = entry.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: {key} must be a whole number, at least {least}; got {label_of(value)}")
    if value > MOST:
        raise ConfigError(f"{where}: {key} must be at most {MOST}; got {value}")
    return value


def mapping_of(value: Any, key: str, where: str) -> dict:
    """A mapping, empty if there is none. Raises ConfigError."""
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} must hold keys and values; got {label_of(value)[:200]}")
    return value or {}


def list_of(value: Any, key: str, where: str) -> list:
    """A list that is not empty. Raises ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {key} must be a list, and not empty; got {label_of(value)[:200]}")
    return value


def seeds_of(seeds: Any, where: str) -> tuple[int, ...]:
    """Seeds, each once. Raises ConfigError."""
    for seed in list_of(seeds, "seeds", where):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"{where}: seeds must be whole numbers, at least 0; got {label_of(seed)}")
        if seed >= 2**63:
            raise ConfigError(f"{where}: seeds must be below 2**63; got {seed}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: seeds names one twice: {label_of(seeds)}")
    return tuple(seeds)


def launcher_of(tree: dict, where: str) -> tuple[str, ...]:
    """The words that start launch/train.py. Raises ConfigError."""
    text = text_of(tree, "launcher", where, "deepspeed")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{where}: launcher {text!r}: {error}") from error
    if not words:
        raise ConfigError(f"{where}: launcher is empty: write python, deepspeed, or torchrun --nproc_per_node 8")
    return tuple(words)

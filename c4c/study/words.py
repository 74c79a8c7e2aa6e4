"""Settings as key=value words, and as flat mappings."""

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from c4c.files import parse_yaml


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} as {a.b: 1}; an empty mapping stays one."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out


def as_text(value: Any) -> str:
    """A value as it stands behind the = of a word, so that reading the word gives the value again."""
    if isinstance(value, date):  # which YAML made of a text; no setting takes one
        return value.isoformat()
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    try:
        return value if parse_yaml(value) == value else json.dumps(value, ensure_ascii=False)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)


def short_key(key: str, among: tuple[str, ...] = ()) -> str:
    """The last part of a key, if no other key of `among` ends with it."""
    last = key.rpartition(".")[2]
    return key if any(other != key and other.rpartition(".")[2] == last for other in among) else last


def label_of(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def sentence(error: Exception) -> str:
    """What an error says, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

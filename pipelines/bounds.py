"""The values that settings may hold: their kinds, and the bounds of numbers."""

import math
import sys
import types
import typing
from typing import Any

MONTH_S = 30 * 86400  # the longest that anything is waited for
COUNT = 10**9  # the most of anything that is counted and has no bound of its own
WRONG_KIND = object()


def check_values(group: str, settings: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError, which names the key, for a value of a dataclass that is not of the kind its field says, or a number
    that is not finite or not in its `bounds`, least and most.

    A whole number without bounds is COUNT at most, either way.
    """
    kinds = typing.get_type_hints(type(settings))
    for name, value in vars(settings).items():
        if convert(kinds[name], value) is WRONG_KIND:
            raise ValueError(f"{group}.{name}={value!r}: must be {kind_name(kinds[name])}")
        key = f"{group}.{name}={value}"
        if not all(math.isfinite(part) for part in _numbers(value)):
            raise ValueError(f"{key}: must be a finite number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = bounds.get(name, (-COUNT, COUNT) if isinstance(value, int) else (-math.inf, math.inf))
        if value < least:
            raise ValueError(f"{key}: must be at least {least}")
        if value > most:
            raise ValueError(f"{key}: must be at most {most}")


def convert(kind: Any, value: Any, yaml: bool = False) -> Any:
    """A value as one of an annotation (`int`, `float | None`, `tuple[str, ...]`), or WRONG_KIND. `yaml`: a number may be
    text, as YAML 1.1 reads 1e-4."""
    if isinstance(kind, types.UnionType):
        converted = (convert(option, value, yaml) for option in typing.get_args(kind))
        return next((one for one in converted if one is not WRONG_KIND), WRONG_KIND)
    if kind is type(None):
        return None if value is None else WRONG_KIND
    if kind is float and isinstance(value, str) and yaml:
        try:
            return float(value)
        except ValueError:
            return WRONG_KIND
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else WRONG_KIND
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parts = [convert(item, v, yaml) for v in value] if isinstance(value, list | tuple) else [WRONG_KIND]
        return WRONG_KIND if WRONG_KIND in parts else tuple(parts)
    if kind is int and isinstance(value, bool):
        return WRONG_KIND
    return value if isinstance(value, kind) else WRONG_KIND


def kind_name(kind: Any) -> str:
    """An annotation in words: `a whole number or null`."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(names.get(option, "a list") for option in options)


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [part for part in values if isinstance(part, float)]

"""The numbers that settings may hold."""

import math

MONTH_S = 30 * 86400  # the longest that anything is waited for
COUNT = 10**9  # the most of anything that is counted and has no bound of its own


def check_numbers(group: str, settings: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError, which names the key, for a number that is not finite or not in its `bounds`, least and most.

    A whole number without bounds is COUNT at most, either way.
    """
    for name, value in vars(settings).items():
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


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [part for part in values if isinstance(part, float)]

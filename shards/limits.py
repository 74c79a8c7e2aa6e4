"""Which numbers an option takes: said once, for the command line and for those who call from Python."""

import argparse
import math

from shards import ShardError

_LARGEST_SEED = 2**63 - 1


class Limits:
    """Whole numbers from `low` to `high`, or numbers above `low` and below `high`; as the `type` of an argparse option it
    parses them.
    """

    def __init__(self, kind: type[int] | type[float], low: float, high: float = math.inf):
        self._kind, self.low, self.high = kind, low, high

    def __str__(self) -> str:
        if self._kind is float:
            return f"a number above {self.low:g}" + (f" and below {self.high:g}" if self.high < math.inf else "")
        if self.high == math.inf:
            return f"a whole number of at least {self.low:g}"
        high = "2**63 - 1" if self.high == _LARGEST_SEED else f"{self.high:g}"
        return f"a whole number from {self.low:g} to {high}"

    def __call__(self, text: str) -> float:
        """The number that `text` is. Raises ArgumentTypeError, which says the range, for anything else."""
        try:
            value: float = self._kind(text)
        except ValueError:
            value = math.nan
        if value not in self:
            raise argparse.ArgumentTypeError(f"{text[:100]}: must be {self}")
        return value

    def __contains__(self, value: float) -> bool:
        if self._kind is float:
            return self.low < value < self.high
        return self.low <= value <= self.high

    def check(self, option: str, value: float, where: str = "") -> None:
        """Raises ShardError if the option may not have this value; `where`: what else that depends on."""
        if value not in self:
            raise ShardError(f"{option} {value}: must be {self}{where}")


POSITIVE = Limits(int, 1)
SEED = Limits(int, 0, _LARGEST_SEED)

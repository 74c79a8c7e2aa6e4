"""Checks of options that several commands have. Imports nothing heavy: mistakes are reported before what takes long to import."""

import re
from collections.abc import Iterable


def require_device(device: str | None) -> None:
    """Raise ValueError if --device has the form of no device that torch has; None: the option is not given."""
    if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: must be cpu, cuda or cuda:N")


def require_not_empty(options: Iterable[tuple[str, str | None]]) -> None:
    """Raise ValueError if the value of an option (its name without --, its value) is an empty text; None: it is not given."""
    for name, value in options:
        if value == "":
            raise ValueError(f"--{name} is empty: is a variable of the shell not set?")

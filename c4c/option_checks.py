"""Checks of options that several commands have. Imports nothing heavy: mistakes are reported before what takes long to import."""

import os
import re
from collections.abc import Iterable


def require_device(device: str | None) -> None:
    """Raise ValueError if --device is empty, or has the form of no device that torch has; None: the option is not given."""
    require_not_empty([("device", device)])
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: must be cpu, cuda or cuda:N")


def require_not_empty(options: Iterable[tuple[str, str | None]]) -> None:
    """Raise ValueError if the value of an option (its name without --, its value) is an empty text; None: it is not given."""
    for name, value in options:
        if value == "":
            raise ValueError(f"--{name} is empty: is a variable of the shell not set?")


def require_checkpoint(name: str | None) -> None:
    """Raise ValueError if --ckpt names a path where nothing is; None, TAG:BACKBONE and the like are for others to judge."""
    from c4c.files import looked_in

    require_not_empty([("ckpt", name)])
    if name is not None and ":" not in name and not os.path.exists(name):
        raise ValueError(f"--ckpt {name}: there is no such file or folder{looked_in(name)}")

"""How many of the machine's cores a process may use."""

import os

SHARE = "C4C_CORES"  # of all ranks of a run together, where several runs share the machine; unset: all


def cores() -> int:
    """Cores of this rank: an equal part of the machine's, or of what C4C_CORES leaves to the run; at least 1.

    Raises ValueError if C4C_CORES is no whole number above 0.
    """
    share = os.environ.get(SHARE, "")
    if share and (not share.isdecimal() or int(share) < 1):
        raise ValueError(f"{SHARE}={share} in the environment: must be a whole number, at least 1, or unset")
    of_run = int(share) if share else os.cpu_count() or 1
    return max(1, of_run // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

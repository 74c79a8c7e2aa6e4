"""The folder in which this program keeps what may be deleted at any time."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """`c4c` in the user's cache folder, made when something is written; in the temporary folder for a user who has no home, such as
    one that a container knows by number alone."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "c4c"
    try:
        return Path.home() / ".cache" / "c4c"
    except RuntimeError:
        return own_temporary("c4c-cache")


def own_temporary(name: str) -> Path:
    """A folder of this user in the temporary one, the same at each call; what lies there is executed, so nobody else may have made it."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))

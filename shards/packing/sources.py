"""Source videos on disk: which are there when packing begins, and whether they stay."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from shards import ShardError, storage
from shards.annotations import Item

ABSENT = -1  # instead of a size: there is no such file
_VANISHED = 3  # source files in a row that existed when packing began
_GO_ON = "Committed shards are kept: bring the files back, and run the same command again to go on."


class SourceWatch:
    """Watches that source videos stay where they are: a file that vanished must not be rejected as missing.

    `folders`: for each of the `items` whose file existed when packing began, the inode of its folder (see `folders_of`).
    """

    def __init__(self, items: Sequence[Item], folders: dict[int, int]):
        self._items, self._folders, self._vanished = items, folders, 0

    def read(self) -> None:
        """A file could be read."""
        self._vanished = 0

    def rejected(self, number: int) -> None:
        """A video was rejected. Raises ShardError if that is because its folder is gone, or files vanish one after another."""
        if number not in self._folders:  # the file never existed, or is on a server
            return
        path = local_path(self._items[number].path)
        try:
            folder = os.stat(path.parent).st_ino
        except OSError:
            folder = None
        gone = not _exists(path)
        if folder is None or (gone and folder != self._folders[number]):
            raise ShardError(
                f"{path.parent}, a folder of source videos, is gone or was replaced (unmounted?): it held {path.name} when "
                f"packing began. {_GO_ON}"
            )
        if not gone:
            self.read()
            return
        self._vanished += 1
        paths = [local_path(self._items[n].path) for n in self._folders]
        away = sum(not _exists(path) for path in paths)
        if self._vanished >= _VANISHED or 1 < len(paths) < 2 * away:
            raise ShardError(
                f"source videos vanish while they are packed: {away} of the {len(paths)} files of this shard that existed when "
                f"packing began are gone, one of them {path}. {_GO_ON}"
            )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def local_path(path) -> Path:
    """The `Path` of a `UPath` of a local file, or the `Path` itself."""
    return Path(getattr(path, "path", path))


def folders_of(items: Sequence[Item]) -> dict[int, int]:
    """{position of an item whose file exists: inode of its folder}. Each folder is listed once, and of its files only
    links are looked at; items on servers are left out."""
    listed: dict[Path, tuple[int, frozenset[str]]] = {}
    inodes = {}
    for number, item in enumerate(items):
        if storage.is_remote(item.path):
            continue
        path = local_path(item.path)
        if path.parent not in listed:
            listed[path.parent] = _listed(path.parent)
        inode, names = listed[path.parent]
        if path.name in names:
            inodes[number] = inode
    return inodes


def _listed(folder: Path) -> tuple[int, frozenset[str]]:
    try:
        with os.scandir(folder) as entries:
            names = frozenset(e.name for e in entries if not e.is_symlink() or os.path.exists(e.path))
        return os.stat(folder).st_ino, names
    except (OSError, ValueError):
        return 0, frozenset()


def source_size(path) -> int | None:
    """Bytes of the file at `path`; ABSENT if there is none; None if that is not known (a URL, a folder)."""
    if storage.is_remote(path):
        return None
    try:
        status = os.stat(getattr(path, "path", path))
    except FileNotFoundError:
        return ABSENT
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None

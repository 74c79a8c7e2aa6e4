"""The video files under a folder or a URL, listed once and then found by name."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from shards import ShardError
from shards.datasets import examples

# Of two files that differ in nothing but the extension, the one that stands first here is taken.
EXTENSIONS = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp", ".3g2",
    ".mts", ".m2ts", ".mod", ".vob", ".asf", ".divx", ".f4v", ".qt",
)  # fmt: skip
_RANK = {extension: rank for rank, extension in enumerate(EXTENSIONS)}


class Files:
    """All video files below `root`, a local folder or a URL that fsspec can list (s3://, gs://, hf://, https://).

    The tree is listed once and no file is looked at. `beside` are further extensions to remember (".txt"). A link that
    leads out of a local folder is not followed unless `follow_links`. Keeps a few hundred bytes a file in memory.
    Raises ShardError when there is no such folder, or it cannot be listed.
    """

    def __init__(self, root: str | Path, *, follow_links: bool = False, beside: tuple[str, ...] = ()):
        self.absent: set[str] = set()  # names that were asked for and are not there
        self._links: set[str] = set()  # paths of links that lead out
        self._spelled: dict[str, str] = {}  # how a URL spells a path, where that differs
        self._count = 0
        self._beside: set[str] = set()
        self._by_stem: dict[str, str | list[str]] = {}  # one path for most: ten million lists are a gigabyte
        if "://" in str(root):
            paths = self._list(str(root))
        else:
            self.root = Path(root)
            if not self.root.is_dir():
                raise ShardError(f"--videos {root}: there is no such folder")
            paths = self._walk(follow_links)
        for path in paths:
            stem, extension = os.path.splitext(path.rpartition("/")[2])
            if extension.lower() in _RANK:
                self._add(stem, path)
            elif extension.lower() in beside:
                self._beside.add(path)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Paths relative to the root, sorted."""
        found = (p for paths in self._by_stem.values() for p in ([paths] if isinstance(paths, str) else paths))
        return iter(sorted(found))

    def find(self, *names: str, anywhere: bool = True) -> Path:
        """The file that goes by one of `names`, the first that is there; else a path at which nothing is, remembered in
        `absent`, for packing to reject as missing.

        A name may have folders before it and an extension or not. Taken is the file at exactly that path; else one
        with that name, then one with another extension, in any folder. With `anywhere` false only the path itself
        counts, with or without extension. Raises ShardError if files in several folders are meant equally, or if the
        name leads out of the root.
        """
        for name in names:
            check_name(name, self.root)
            if path := self._match(name, anywhere):
                return self.at(path)
            if self._links and not self._links.isdisjoint(_prefixes(name)):
                raise ShardError(
                    f"the video name {name!r} leads out of {self.root}, by a link: --follow-links allows that"
                )
        self.absent.add(names[0])
        return self.root / names[0]

    def beside(self, path: str, extension: str) -> Path | None:
        """The file called like the video at `path` (relative), but with this extension."""
        there = os.path.splitext(path)[0] + extension
        return self.at(there) if there in self._beside else None

    def unclear(self, name: str) -> list[str]:
        """The files, more than one, that `name` without its extension stands for at its place."""
        found = [path for path in self._called(name.rpartition("/")[2]) if os.path.splitext(path)[0] == name]
        return sorted(found) if len(found) > 1 else []

    def warnings(self) -> list[str]:
        if not self._links:
            return []
        return [f"{examples(sorted(self._links), 'link')} out of --videos not followed (--follow-links follows them)"]

    def _match(self, name: str, anywhere: bool) -> str | None:
        last = name.rpartition("/")[2]
        stem, extension = os.path.splitext(last)
        named = extension.lower() in _RANK
        alike = self._called(stem) if named else []
        bare = self._called(last)
        for path in alike:
            if path == name:
                return path
        exact = [path for path in bare if os.path.splitext(path)[0] == name]
        if not anywhere:
            return exact[0] if len(exact) == 1 else None
        if exact:
            return min(exact, key=_rank)
        return (
            self._one(name, [path for path in alike if _ends(path, name)])
            or self._one(name, [path for path in bare if _ends(os.path.splitext(path)[0], name)])
            or self._one(name, [p for p in alike if _ends(os.path.splitext(p)[0], os.path.splitext(name)[0])])
        )

    def _one(self, name: str, paths: list[str]) -> str | None:
        if len({os.path.splitext(path)[0] for path in paths}) > 1:
            raise ShardError(
                f"{name!r} may be {' or '.join(sorted(paths)[:2])} under {self.root}: "
                "give --videos the folder that is meant, or remove one"
            )
        return min(paths, key=_rank, default=None)

    def _called(self, stem: str) -> list[str]:
        found = self._by_stem.get(stem, [])
        return [found] if isinstance(found, str) else found

    def _add(self, stem: str, path: str) -> None:
        self._count += 1
        there = self._by_stem.setdefault(stem, path)
        if there is not path:
            self._by_stem[stem] = [*([there] if isinstance(there, str) else there), path]

    def at(self, path: str) -> Path:
        """The file at `path`, relative to the root as iterating gives it."""
        return self.root / self._spelled.get(path, path)

    def _list(self, url: str) -> Iterator[str]:
        """Paths relative to the URL, of all files below it."""
        from upath import UPath  # here, since few need it and it takes its time

        try:
            self.root = UPath(url)
            found = self.root.fs.find(self.root.path)
        except (ImportError, OSError, ValueError) as error:
            raise ShardError(f"--videos {url} cannot be listed: {error or type(error).__name__}") from error
        if not found:
            raise ShardError(f"--videos {url}: no files are listed there")
        start = self.root.path.rstrip("/") + "/"
        for spelled in (path.removeprefix(start) for path in found):
            path = unquote(spelled) if url.startswith("http") else spelled
            if path != spelled:
                self._spelled[path] = spelled
            yield path

    def _walk(self, follow_links: bool) -> Iterator[str]:
        """Paths relative to the root, of files, in no order."""
        home = os.path.realpath(self.root)
        todo, seen = [""], {home}
        while todo:
            folder = todo.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    real = os.path.realpath(entry.path) if entry.is_symlink() else None
                    if real and not follow_links and os.path.commonpath([home, real]) != home:
                        self._links.add(path)
                    elif not entry.is_dir():
                        yield path
                    elif (real := real or os.path.realpath(entry.path)) not in seen:  # links may run in circles
                        seen.add(real)
                        todo.append(path)


def check_name(name: str, root: object) -> None:
    """Raises ShardError if `name`, which came with the data, is no path below `root`."""
    if not name or "\0" in name or name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise ShardError(f"the video name {name!r} leads out of {root}")


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a/b` and `a/b/c` of `a/b/c`."""
    parts = path.split("/")
    return ("/".join(parts[:n]) for n in range(1, len(parts) + 1))


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("/" + name)


def _rank(path: str) -> tuple[int, str]:
    return _RANK[os.path.splitext(path)[1].lower()], path

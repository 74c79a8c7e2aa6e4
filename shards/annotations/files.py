"""The video files under a folder or a URL, listed once and then found by name."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from shards import ShardError
from shards.annotations import examples

# Of two files that differ in nothing but the extension, the one that stands first here is taken.
EXTENSIONS = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp", ".3g2",
    ".mts", ".m2ts", ".mod", ".vob", ".asf", ".divx", ".f4v", ".qt", ".mp4v", ".ogm", ".m2v", ".m1v", ".mpv", ".mpe",
    ".m2t", ".mxf", ".rm", ".rmvb", ".dv", ".nut", ".ivf", ".y4m", ".h264", ".h265", ".hevc", ".gif",
)  # fmt: skip
_RANK = {extension: rank for rank, extension in enumerate(EXTENSIONS)}
# Also videos, or what may become one; too much like the end of a name (clip.264), or a download that did not finish.
_UNUSUAL = (".264", ".265", ".apng", ".m4s", ".part", ".crdownload")
# Files that often lie beside videos and are not videos. They are not remembered: there can be one for each video.
_NO_VIDEO = frozenset((
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".html", ".pdf", ".log", ".srt", ".vtt", ".ass",
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".wav", ".mp3", ".m4a", ".aac", ".flac", ".opus", ".npy", ".npz", ".pkl",
    ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".tar", ".gz", ".zip", ".idx", ".md5", ".sha256", ".py", ".sh",
))  # fmt: skip
_DOTS = re.compile(r"(^|/)\.{0,2}(/|$)")  # what a path need not have: `.`, `..`, `//`, a slash at an end


class Files:
    """All video files below `root`, a local folder or a URL that fsspec can list (s3://, gs://, hf://, https://).

    The tree is listed once and no file is looked at. `beside` are further extensions to remember (".txt"). A link that
    leads out of a local folder is not followed unless `follow_links`. Keeps a few hundred bytes a file in memory.
    Raises ShardError when there is no such folder, or it cannot be listed.
    """

    def __init__(self, root: str | Path, *, follow_links: bool = False, beside: tuple[str, ...] = ()):
        self.root: Path  # or UPath
        self.absent: set[str] = set()  # names that were asked for and not found, as `name` writes them
        self._links: set[str] = set()  # paths of links that lead out
        self._spelled: dict[str, str] = {}  # how a URL spells a path, where that differs
        self._count = 0
        self._beside: dict[str, list[str]] = {}  # by path, the extension in small letters
        self._captions = beside
        self._named: set[str] = set()  # of the others those that were
        self._taken: set[str] = set()  # videos that were asked for
        self._others: dict[str, str] = {}  # files of other extensions, by path: they are found if they are named
        self._by_stem: dict[str, str | list[str]] = {}  # one path for most: ten million lists are a gigabyte
        if "://" in str(root):
            self._starts = [str(root).rstrip("/") + "/"]
            paths = self._list(str(root))
        else:
            self.root = Path(root)
            if not self.root.is_dir():
                raise ShardError(f"--videos {root}: there is no such folder")
            folders = (os.path.normpath(root), os.path.abspath(root), os.path.realpath(root))
            self._starts = [folder.rstrip("/") + "/" for folder in dict.fromkeys(folders) if folder != "."]
            paths = self._walk(follow_links)
        for path in paths:
            stem, extension = os.path.splitext(path.rpartition("/")[2])
            extension = extension.lower()
            if extension in _RANK:
                self._add(_composed(stem), path)
            elif extension in beside:
                self._beside.setdefault(_composed(os.path.splitext(path)[0]) + extension, []).append(path)
            elif extension not in _NO_VIDEO:
                self._others[path] = path
                self._others.setdefault(_composed(path), path)

    def __len__(self) -> int:
        return self._count + len(self._named)

    def __iter__(self) -> Iterator[str]:
        """Paths relative to the root, sorted."""
        return iter(sorted(self._all()))

    def _all(self) -> Iterator[str]:
        return (p for paths in self._by_stem.values() for p in ([paths] if isinstance(paths, str) else paths))

    def name(self, written: str) -> str:
        """`written`, a name that came with the data, as a path relative to the root.

        `./v.mp4`, `a//v.mp4`, `a/../v.mp4`, and the path with the root before it, from `/` or as --videos has it, become
        `v.mp4`, `a/v.mp4`, … Raises ShardError if the name leads out of the root.
        """
        if not written or "\0" in written:
            raise ShardError(f"the video name {written!r} leads out of {self.root}")
        local = "://" not in self._starts[0]
        path = written if local else written.removeprefix(self._starts[0])
        if not _DOTS.search(path):
            absolute = False
        else:
            path = re.sub("^//", "/", os.path.normpath(path))
            absolute = path.startswith(("/", "../"))
        for start in self._starts if local else ():
            if path.startswith(start) and (absolute or not self._match(path, anywhere=False)):
                return path[len(start) :]
        if path.startswith("/") and local:  # there may be links on the way
            root, real = (os.path.realpath(p) for p in (self.root, path))
            if real.startswith(root + "/"):
                return real[len(root) + 1 :]
        if absolute or path in (".", ".."):
            raise ShardError(f"the video name {written!r} leads out of {self.root}")
        return path

    def find(self, *names: str, anywhere: bool = True) -> Path:
        """The file that goes by one of `names`, the first that is there; else a path at which nothing is, remembered in
        `absent`, for packing to reject as missing.

        A name may have folders before it and an extension or not; see `name` for its other forms. Taken is the file at
        exactly that path; else one with that name, then one with another extension, in any folder. With `anywhere`
        false only the path itself counts, with or without extension. A file whose extension is not one of a video is
        found by its exact path only. Accents may be composed or not (macOS writes them in two characters). Raises
        ShardError if files in several folders are meant equally, or if the name leads out of the root.
        """
        plain = [self.name(name) for name in names]
        for name in plain:
            if path := self._match(name, anywhere):
                (self._named if path in self._others else self._taken).add(path)
                return self.at(path)
            if self._links and not self._links.isdisjoint(_prefixes(name)):
                raise ShardError(
                    f"the video name {name!r} leads out of {self.root} through a link; --follow-links allows that"
                )
        self.absent.add(_composed(plain[0]))
        return self.root / _composed(plain[0])

    def holds(self, written: str) -> bool:
        """Whether there is a file at exactly this path, with or without its extension."""
        try:
            return self._match(self.name(written), anywhere=False) is not None
        except ShardError:
            return False

    def lacks(self, written: str) -> bool:
        """Whether `find` was asked for this name and found nothing."""
        return _composed(self.name(written)) in self.absent

    def beside(self, path: str, extension: str) -> list[Path]:
        """The files called like the video at `path` (relative), but with this extension: `.txt` and `.TXT` are two."""
        stem = os.path.splitext(path)[0]
        paths = self._beside.get(_composed(stem) + extension, [])
        return [self.at(p) for p in sorted([p for p in paths if os.path.splitext(p)[0] == stem] or paths)]

    def unclear(self, name: str) -> list[str]:
        """The files, more than one, that `name` without its extension stands for at its place."""
        paths = [
            p for p in self._called(name.rpartition("/")[2]) if _composed(os.path.splitext(p)[0]) == _composed(name)
        ]
        return sorted(paths) if len(paths) > 1 else []

    def previews(self) -> list[str]:
        """The .gif files beside another video of the same name: probably previews of it. Sorted."""
        gifs = sorted(path for path in self._all() if path.lower().endswith(".gif"))
        return [p for p in gifs if any(not v.lower().endswith(".gif") for v in self._alike(os.path.splitext(p)[0]))]

    def unasked(self) -> list[str]:
        """The videos that `find` was not asked for, without previews. Sorted."""
        if len(self._taken) == self._count:
            return []
        previews = set(self.previews())
        return sorted(path for path in self._all() if path not in self._taken and path not in previews)

    def passed_over(self) -> list[str]:
        """Notes about files that were not taken for videos, which name some of them."""
        unusual, owned = [], set()
        for path in dict.fromkeys(self._others.values()):
            stem, extension = os.path.splitext(path)
            captions = {_composed(stem) + e for e in self._captions} & self._beside.keys()
            if extension.lower() in _UNUSUAL or (captions and not self._alike(stem)):
                unusual.append(path)
                owned |= captions
        alone = [key for key in self._beside if key not in owned and not self._alike(os.path.splitext(key)[0])]
        notes = []
        if unusual:
            notes.append(
                f"{examples(sorted(unusual), 'file')} not packed: the extension is not one of a video. "
                "Name such files in --captions to pack them"
            )
        if alone:
            notes.append(
                f"{examples(sorted(p for key in alone for p in self._beside[key]), 'caption file')} without a video of the "
                "same name beside"
            )
        return notes

    def warnings(self) -> list[str]:
        """Notes about links that were not followed, and about names that were not found but are nearly those of files."""
        notes = []
        if self._links:
            links = examples(sorted(self._links), "link")
            notes.append(f"{links} out of --videos not followed (--follow-links follows them)")
        if meant := self._meant():
            notes.append(
                f"{examples(sorted(meant), 'video')} not found. Did you mean "
                + ", ".join(repr(path) for _, path in sorted(meant.items())[:2])
                + (", …?" if len(meant) > 2 else "?")
            )
        return notes

    def _meant(self) -> dict[str, str]:
        """{name that was not found: the one file that was probably meant}. That differs in letter case, extension or
        slashes, or is in another folder."""
        wanted: dict[str, list[str]] = {}
        for name in self.absent:
            last = name.replace("\\", "/").rpartition("/")[2].lower()
            for key in {last, os.path.splitext(last)[0]}:
                wanted.setdefault(key, []).append(name)
        if not wanted:
            return {}
        near: dict[str, list[str]] = {}
        for stem in self._by_stem:
            for name in wanted.get(stem.lower(), ()):
                near.setdefault(name, []).extend(self._called(stem))
        meant = {}
        for name, paths in near.items():
            plain = name.replace("\\", "/").lower()
            same = [p for p in paths if _composed(p).lower() == plain]
            stems = (plain, os.path.splitext(plain)[0])
            same = same or [p for p in paths if os.path.splitext(_composed(p))[0].lower() in stems]
            same = same or (paths if "/" not in plain else [])
            if len(same) == 1:
                meant[name] = same[0]
        return meant

    def _match(self, name: str, anywhere: bool) -> str | None:
        last = name.rpartition("/")[2]
        stem, extension = os.path.splitext(last)
        named = extension.lower() in _RANK
        alike = self._called(stem) if named else []
        bare = self._called(last)
        plain = _composed(name)
        other = (self._others.get(name) or self._others.get(plain)) if self._others else None
        if not alike and not bare:
            return other
        for path in alike:
            if path == name:
                return path
        same = [path for path in alike if _composed(path) == plain]
        if len(same) == 1:
            return same[0]
        exact = [path for path in bare if os.path.splitext(path)[0] == name]
        exact = exact or [path for path in bare if os.path.splitext(_composed(path))[0] == plain]
        if not anywhere:
            return exact[0] if len(exact) == 1 else None if exact else other
        if exact:
            return min(exact, key=_rank)
        return (
            other
            or self._one(name, [path for path in alike if _ends(_composed(path), plain)])
            or self._one(name, [path for path in bare if _ends(os.path.splitext(_composed(path))[0], plain)])
            or self._one(
                name,
                [p for p in alike if _ends(os.path.splitext(_composed(p))[0], os.path.splitext(plain)[0])],
            )
        )

    def _one(self, name: str, paths: list[str]) -> str | None:
        if len({os.path.splitext(path)[0] for path in paths}) > 1:
            raise ShardError(
                f"{name!r} may be {' or '.join(sorted(paths)[:2])} under {self.root}: "
                "give --videos the folder that is meant, or remove one"
            )
        return min(paths, key=_rank, default=None)

    def _called(self, stem: str) -> list[str]:
        paths = self._by_stem.get(_composed(stem), [])
        return [paths] if isinstance(paths, str) else paths

    def _alike(self, stem: str) -> list[str]:
        """The videos at the path `stem`, whatever their extension."""
        stem = _composed(stem)
        return [p for p in self._called(stem.rpartition("/")[2]) if os.path.splitext(_composed(p))[0] == stem]

    def _add(self, stem: str, path: str) -> None:
        self._count += 1
        known = self._by_stem.setdefault(stem, path)
        if known is not path:
            self._by_stem[stem] = [*([known] if isinstance(known, str) else known), path]

    def at(self, path: str) -> Path:
        """The file at `path`, relative to the root as iterating gives it."""
        return self.root / self._spelled.get(path, path)

    def _list(self, url: str) -> Iterator[str]:
        """Paths relative to the URL, of all files below it."""
        from upath import UPath  # here, since few need it and it takes its time

        try:
            root = UPath(url)
            listing = root.fs.find(root.path)
        except (ImportError, OSError, ValueError) as error:
            raise ShardError(f"--videos {url} cannot be listed: {error or type(error).__name__}") from error
        if not listing:
            raise ShardError(f"--videos {url}: no files are listed there")
        self.root = cast(Path, root)
        start = root.path.rstrip("/") + "/"
        for spelled in (path.removeprefix(start) for path in listing):
            path = unquote(spelled) if url.startswith("http") else spelled
            if path != spelled:
                self._spelled[path] = spelled
            yield path

    def _walk(self, follow_links: bool) -> Iterator[str]:
        """Paths relative to the root, of files, in no order."""
        root = os.path.realpath(self.root)
        todo, seen = [""], {root}
        while todo:
            folder = todo.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    real = os.path.realpath(entry.path) if entry.is_symlink() else None
                    if real and not follow_links and os.path.commonpath([root, real]) != root:
                        self._links.add(path)
                    elif not _is_folder(entry):
                        yield path
                    elif (real := real or os.path.realpath(entry.path)) not in seen:  # links may run in circles
                        seen.add(real)
                        todo.append(path)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: reading it says so
        return False


def _composed(text: str) -> str:
    """The text with each accent and its letter as one character, where there is one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a/b` and `a/b/c` of `a/b/c`."""
    parts = path.split("/")
    return ("/".join(parts[:n]) for n in range(1, len(parts) + 1))


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("/" + name)


def _rank(path: str) -> tuple[int, str]:
    return _RANK[os.path.splitext(path)[1].lower()], path

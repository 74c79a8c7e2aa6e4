"""What is to be indexed: the videos of folders and of packed splits, compared with what an index holds."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from c4c.option_checks import require_not_empty
from c4c.retrieval.index.rows import FILE, SHARD, Failure, Known
from shards import count, first_few
from shards.annotations.files import EXTENSIONS
from shards.digest import fingerprint
from shards.schema import Video
from shards.split import Split
from shards.storage import is_remote, place
from shards.summary import is_of_packing


@dataclass(frozen=True)
class ListedVideo:
    """A video as it was listed. name: relative to its folder, or its id in its split; path: absolute, or SPLIT_FOLDER::key; both are valid text.

    place: what opens it: a path of the file system, or a row of the split. size: bytes; mtime_ns: of a file, and of a packed video
    its `state_of`, so that both tell whether it has changed."""

    name: str
    path: str
    source: str
    root: str
    size: int
    mtime_ns: int
    place: str | int


@dataclass(frozen=True)
class IndexJob:
    """A video that is to be indexed, by the name that it has in the index. changed: it is not what the index holds under that name."""

    video: str
    listed: ListedVideo
    changed: bool = True


@dataclass(frozen=True)
class Renamed:
    """Rows under the key of a packed video, as earlier versions wrote them, whose video is indexed again as `video`. They go once it
    is; changed: also if it cannot be."""

    old: Known
    video: str
    changed: bool


@dataclass
class IndexPlan:
    """What an indexing does. before: {video: written} of jobs whose video the index holds already; renamed: rows that stand under another
    name than their job; unchanged: how many stay as they are; coded: those of them that have a key for a name; vanished: what the index
    holds and is not there any more; failed: what could not be read before, and is as it was; forgiven: paths of failures that are none
    any more; doubled: rows under a name that another file has, or of a file that has another."""

    jobs: list[IndexJob] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    renamed: list[Renamed] = field(default_factory=list)
    unchanged: int = 0
    coded: int = 0
    vanished: list[Known] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    forgiven: list[str] = field(default_factory=list)
    doubled: list[Known] = field(default_factory=list)


class VideoSources:
    """The folders, files and splits that --videos names. Raises ValueError for what is none of these."""

    def __init__(self, names: Sequence[str], index: str):
        self.skipped: list[str] = []  # files that are no videos
        self.unlisted: list[tuple[str, str]] = []  # folders that cannot be read, and why
        self.splits: dict[str, Split] = {}
        self._roots: list[str] = []
        self._index = index
        require_not_empty(("videos", name) for name in names)
        for name in names:
            folder = place(name)
            if is_remote(folder):
                self.splits[name.rstrip("/")] = Split(name)
            elif is_of_packing(Path(name)):
                self.splits[os.path.abspath(name)] = Split(name)
            elif os.path.exists(name):
                self._roots.append(os.path.abspath(name))
            else:
                raise ValueError(f"--videos {name}: there is no such file or folder")

    def list(self) -> list[ListedVideo]:
        """All videos, each once, sorted by path. Raises ValueError if there is none."""
        found = {one.path: one for root in self._roots for one in self._files(root)}
        for path, split in self.splits.items():
            found |= {one.path: one for one in _of_split(path, split)}
        if not found:
            names = first_few([*self._roots, *self.splits])
            others = f" ({count(len(self.skipped), 'other file')})" if self.skipped else ""
            raise ValueError(
                f"there is no video in {names}{others}; videos are files that end in {first_few(EXTENSIONS, 8)}"
            )
        return [found[path] for path in sorted(found)]

    def owns(self, path: str) -> bool:
        """Whether a video of an index lies in one of these folders or splits."""
        if "::" in path and path.rpartition("::")[0] in self.splits:
            return True
        return any(path == text_of(root) or path.startswith(text_of(root) + "/") for root in self._roots)

    def _files(self, root: str) -> Iterator[ListedVideo]:
        if not os.path.isdir(root):
            yield from _listed(root, os.path.dirname(root))
            return
        seen, names = {_identity(root)}, list[str]()
        for folder, folders, files in os.walk(root, followlinks=True, onerror=self._cannot_list):
            kept = []
            for name in sorted(folders):
                path = os.path.join(folder, name)
                if name.startswith(".") or path == self._index or (identity := _identity(path)) in seen:
                    continue  # a folder that links lead to again holds the same videos
                seen.add(identity)
                kept.append(name)
            folders[:] = kept
            names += [os.path.join(folder, name) for name in files if not name.startswith(".")]
        present = set(names)
        for path in sorted(names):
            stem, extension = os.path.splitext(path)
            preview = extension.lower() == ".gif" and any(stem + other in present for other in EXTENSIONS[:5])
            if extension.lower() in EXTENSIONS and not preview:
                yield from _listed(path, root)
            else:
                self.skipped.append(text_of(path))

    def _cannot_list(self, error: OSError) -> None:
        self.unlisted.append((text_of(str(error.filename)), f"the folder cannot be listed ({error.strerror})"))


def _listed(path: str, root: str) -> Iterator[ListedVideo]:
    size, mtime_ns = 0, 0
    try:
        status = os.stat(path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
    except OSError:
        if not os.path.islink(path):  # it has gone since; a link that leads nowhere is listed as unreadable
            return
    yield ListedVideo(text_of(os.path.relpath(path, root)), text_of(path), FILE, root, size, mtime_ns, path)


def _of_split(path: str, split: Split) -> Iterator[ListedVideo]:
    for index in range(len(split)):
        video = split.video(index)
        yield ListedVideo(video.id, f"{path}::{video.key}", SHARD, path, video.size, state_of(video), index)


def state_of(video: Video) -> int:
    """What changes with a packed video, 63 bits: with its bytes, and with which of their frames are its own and when they are shown."""
    return int.from_bytes(fingerprint(video)[:8], "little") >> 1


def _identity(folder: str) -> tuple[int, int] | str:
    try:
        status = os.stat(folder)
    except OSError:
        return folder
    return status.st_dev, status.st_ino


def compare(
    listed: Sequence[ListedVideo], known: Sequence[Known], failures: Sequence[Failure], sources: VideoSources, *,
    refresh: bool = False, retry: bool = False,
) -> IndexPlan:  # fmt: skip
    """What is new or changed. refresh: all of it counts as changed; retry: what could not be read is tried again."""
    plan = IndexPlan()
    by_name: dict[str, Known] = {}
    names: dict[str, str] = {}
    for old in sorted(known, key=lambda old: old.written):
        other = by_name.get(old.video, old)
        # two processes gave two files one name, or one file two
        if other.path != old.path or names.setdefault(old.path, old.video) != old.video:
            plan.doubled.append(old)
        else:
            by_name[old.video] = old
    by_path = {old.path: old for old in by_name.values()}
    bad = {failure.path: failure for failure in failures}
    present, given = {one.path for one in listed}, set[str]()
    for one in listed:
        before, failure = by_path.get(one.path), bad.get(one.path)
        if failure and not (retry or refresh) and (failure.size, failure.mtime_ns) == (one.size, one.mtime_ns):
            plan.failed.append(failure)
        elif before and not refresh and (before.size, before.mtime_ns) == (one.size, one.mtime_ns):
            plan.unchanged += 1
            plan.coded += before.video in _coded_names(one)
            if failure:
                plan.forgiven.append(one.path)
        else:
            coded = _by_key(one, before, by_name, sources)
            name = before.video if before and not coded else _name(one, given, by_name, sources)
            given.add(name)
            same = before is not None and (before.size, before.mtime_ns) == (one.size, one.mtime_ns)
            plan.jobs.append(IndexJob(name, one, changed=not same))
            if coded:
                plan.renamed.append(Renamed(coded, name, changed=before is not None and not same))
            if name in by_name:
                plan.before[name] = by_name[name].written
    again = {job.video for job in plan.jobs}
    for old in by_name.values():
        if old.path not in present and old.video not in again and sources.owns(old.path) and _has_gone(old):
            plan.vanished.append(old)
    plan.forgiven += [path for path in bad if path not in present and sources.owns(path) and not _exists(path)]
    return plan


def _name(one: ListedVideo, given: set[str], by_name: dict[str, Known], sources: VideoSources) -> str:
    """A name that no other video has; that of a video that has been moved here is free, once. given: names of this plan's jobs."""
    for name in _names(one, one.name):
        other = by_name.get(name)
        if name not in given and (other is None or _is_moved(other, one, sources)):
            return name
    return one.path


def _names(one: ListedVideo, name: str) -> tuple[str, str, str]:
    """What a video may be called, the shortest first. name: its own, without its folder's."""
    folder = text_of(os.path.basename(one.root)) or "root"
    digest = hashlib.sha256(one.path.encode()).hexdigest()[:8]
    return name, f"{folder}/{name}", f"{folder}~{digest}/{name}"


def _coded_names(one: ListedVideo) -> tuple[str, ...]:
    """What earlier versions called a packed video, where that was another name: by its key, `sub%2Fred` of `sub/red`."""
    key = one.path.rpartition("::")[2]
    return () if one.source != SHARD or key == one.name else _names(one, key)


def _by_key(one: ListedVideo, before: Known | None, by_name: dict[str, Known], sources: VideoSources) -> Known | None:
    """The rows of a video under such a name, where the video is now or where it was before it was moved. before: what the index holds
    of the path."""
    if before:
        return before if before.video in _coded_names(one) else None
    others = (by_name.get(name) for name in _coded_names(one))
    return next((old for old in others if old and _is_moved(old, one, sources)), None)


def _is_moved(old: Known, one: ListedVideo, sources: VideoSources) -> bool:
    """Whether a video that the index holds by this name is the one that was listed, at its place before. Another split, or another
    folder that is away for now, may have a video of this name; its rows stay."""
    if old.source != one.source or old.size != one.size:
        return False
    if old.source != SHARD:
        return _has_gone(old)
    split = old.path.rpartition("::")[0]
    away = split not in sources.splits and not is_remote(place(split)) and not _exists(split)
    return old.mtime_ns == one.mtime_ns and away


def _has_gone(one: Known) -> bool:
    return one.source == SHARD or not _exists(one.path)


def _exists(path: str) -> bool:
    """Whether there is something at the path of a video; where that cannot be told, it is assumed."""
    try:
        os.lstat(os_path(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def text_of(path: str) -> str:
    """A path of the file system as text that any program can store. Bytes that are no UTF-8 become a backslash, x and two digits."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def os_path(text: str) -> str:
    """The path that `text_of` wrote, for opening the file."""
    if "\\x" not in text or os.path.lexists(text):
        return text
    pieces = text.split("\\x")
    raw = pieces[0].encode()
    for piece in pieces[1:]:
        try:
            raw += bytes([int(piece[:2], 16)]) + piece[2:].encode()
        except ValueError:
            return text
    return os.fsdecode(raw)

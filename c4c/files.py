"""Small files of text: read with errors of one sentence. And files of any kind, written so that a kill or a full disk leaves the old
or the new one."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from yaml.composer import ComposerError

from pipelines.quarantine import json_object

_ROOM = 1 << 16  # bytes that have to be free where a command will write


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ValueError that names the file and what is wrong with it."""
    try:
        return parse_yaml(path.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


class _OnceOnly(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML would take the last in silence, and what contains itself."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise ComposerError(None, None, f"the key {key.value} stands twice", key.start_mark)
                known.add((key.tag, key.value))
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor
            if (node := self.anchors.get(anchor)) is not None and node.end_mark is None:
                mark = self.peek_event().start_mark
                raise ComposerError(None, None, f"the alias *{anchor} is inside what it stands for", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """Raises ValueError: what is wrong, and in which line. A key that stands twice in a mapping is wrong, too."""
    try:
        return yaml.load(text, _OnceOnly)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{problem}{line}") from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json_object(path: Path) -> dict:
    """What a JSON file holds. Raises ValueError that names the file if that is no object."""
    row = json_object(path.read_text(errors="replace"))
    if row is None:
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return row


def replace_text(files: Mapping[Path, Iterable[str]]) -> None:
    """Give each file its new text, or pieces of it. All are written beside first and then renamed, so a full disk changes none of them.

    Raises OSError that names the file.
    """
    beside = {path: path.with_name(f".{path.name}.tmp") for path in files}
    try:
        for path, text in files.items():
            _write(path, beside[path], text)
        for path, temporary in beside.items():
            os.replace(temporary, path)
    finally:
        for temporary in beside.values():
            discard(temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once all is written: a kill or a full disk leaves the old one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error
    finally:
        discard(temporary)


def discard(temporary: Path) -> None:
    """Delete a file, if it is there. That it cannot be deleted is no error beside the one that made it useless."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _write(path: Path, beside: Path, text: Iterable[str]) -> None:
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = " and stays as it was" if os.path.lexists(path) else ""
        raise OSError(error.errno, f"{path} could not be written{kept}: {error.strerror}") from error


def require_writable(named: str, path: Path, is_ours: Callable[[bytes], bool] | None = None) -> None:
    """Raise ValueError if a file at `path`, which a command writes at its end, cannot be written.

    named: the option and its value; is_ours: whether an existing file, given its first 64 kB, may be replaced.
    """
    if os.path.isdir(path):
        raise ValueError(f"{named} cannot be written: it is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):  # renaming would put a file in the place of a device
        raise ValueError(f"{named} cannot be written: it is a device or a pipe; name a file")
    if not os.path.lexists(path.parent):
        raise ValueError(f"{named}: there is no folder {path.parent}{looked_in(path)}. Make it first, or name another")
    _require_room(named, path.parent)
    if is_ours and os.path.isfile(path):
        with open(path, "rb") as file:
            if (start := file.read(1 << 16)) and not is_ours(start):
                raise ValueError(f"{named} would replace a file of another kind: name another, or delete it first")


def require_folder(named: str, path: Path) -> None:
    """Raise ValueError if nothing can be written into the folder `path`, which a command makes. Makes no folder."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{named} cannot be written: it is no folder; name one")
    _require_room(named, path)


def _require_room(named: str, folder: Path) -> None:
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    reason = f"{folder} is not a folder"
    if os.path.isdir(folder):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_ROOM))
            return
        except OSError as error:
            reason = f"{error.strerror} in {folder}"
    raise ValueError(f"{named} cannot be written: {reason}")


def with_usual_mode(path: Path) -> None:
    """Give a file the mode that files of this process get. safetensors makes its own readable to their owner alone."""
    status = Path("/proc/self/status").read_text()
    umask = next(int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    path.chmod(0o666 & ~umask)


def looked_in(path: str | Path) -> str:
    """For a message that a path is not there: which folder a relative one was looked for in."""
    return "" if Path(path).is_absolute() else f" (looked in {Path.cwd()})"


def lines_up_to(path: Path, step: int) -> Iterator[str]:
    """The lines of a JSON-lines file, with their ends, without torn ones and without those whose `step` is above `step`.

    One is read at a time: of a long run the file is larger than memory should be."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if _step(line) <= step:
                yield f"{line.rstrip(chr(10))}\n"


def is_up_to(path: Path, step: int) -> bool:
    """Whether those lines are all that the file holds."""
    with open(path, "rb") as file:
        pairs = zip_longest(file, lines_up_to(path, step))
        return all(kept is not None and kept.encode() == line for line, kept in pairs)


def _step(line: str) -> float:
    row = json_object(line)
    step = float("inf") if row is None else row.get("step", 0)
    return step if isinstance(step, (int, float)) else float("inf")

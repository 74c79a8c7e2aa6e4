"""Annotation files and videos to read, and what was read."""

from __future__ import annotations

import json
from pathlib import Path


def videos(root: Path, *names: str) -> Path:
    """A folder of (empty) files; readers do not look into videos."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def texts(read) -> dict[str, list[str]]:
    return {item.id: [caption.text for caption in item.captions] for item in read.items}


def paths(read, root: Path) -> list[str]:
    return [str(item.path.relative_to(root)) for item in read.items]


def notes(read) -> tuple[str, ...]:
    """What a reading warns of, but for videos that the captions do not name."""
    return tuple(text for text in read.warnings if " not packed: not in " not in text)

"""What updates are compared with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from shards.annotations import Caption, Item
from shards.video.profiles import Profile
from tests.shards.sets import COPY, files, packed


def updated(items: list[Item], out: Path, profile: Profile = COPY, **options) -> dict:
    return packed(items, out, profile, update=True, **options)


def said(item: Item, *texts: str) -> Item:
    return replace(item, captions=tuple(map(Caption, texts)))


def anew(items: list[Item], tmp_path: Path, profile: Profile = COPY, **options) -> dict[str, bytes]:
    out = tmp_path / "anew"
    shutil.rmtree(out, ignore_errors=True)
    packed(items, out, profile, **options)
    return files(out)

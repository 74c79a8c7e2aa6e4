"""Small packed splits, of videos that carry their frame numbers."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests.videos import encode

SIDE = 64  # short side that the intra shards store, pixels

# name: (frames, encode()'s arguments)
NUMBERED = {
    "b_frames_24": (150, {"fps": 24}),  # 3 B-frames, one keyframe at most in 250 frames
    "long_25": (421, {"fps": 25}),  # 12 segments of 35 frames
    "ntsc_portrait": (200, {"fps": Fraction(30000, 1001), "size": (120, 156)}),
    "wide_30": (100, {"fps": 30, "size": (212, 120)}),
    "open_gop": (160, {"options": {"x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}}),
    "short": (30, {"size": (120, 160)}),
    "one_frame": (1, {}),
    "hevc_ntsc": (130, {"codec": "libx265", "fps": Fraction(30000, 1001)}),
    "hevc_portrait": (70, {"codec": "libx265", "fps": 24, "size": (128, 160)}),
    "vp9_webm": (110, {"codec": "libvpx-vp9", "format": "webm", "options": {"cpu-used": "8", "deadline": "realtime"}}),
    "mpegts": (110, {"format": "mpegts", "fps": 30}),
    "mkv_square": (90, {"format": "matroska", "size": (128, 128)}),
}
EXTENSIONS = {"webm": "webm", "mpegts": "ts", "matroska": "mkv"}


def pack_videos(folder: Path, files: dict[str, bytes], profile: str, captions=2, **size: int) -> Split:
    """Pack {file name: bytes}; each video gets `captions` captions that name it."""
    folder.mkdir()
    items = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        stem = name.split(".")[0]
        items.append(Item(stem, folder / name, tuple(Caption(f"caption {i} of {stem}") for i in range(captions))))
    stored = Profile(name=profile, **size or {"short_side": SIDE})
    pack(items, folder / "packed", dataset="tests", split="train", profile=stored, workers=1)
    return Split(folder / "packed")


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> SimpleNamespace:
    """The numbered videos, packed as `copy` and as `intra`."""
    files = {}
    for name, (frames, options) in NUMBERED.items():
        files[f"{name}.{EXTENSIONS.get(options.get('format'), 'mp4')}"] = encode(frames, **options)
    folder = tmp_path_factory.mktemp("numbered")
    return SimpleNamespace(
        copy=pack_videos(folder / "copy", files, "copy"), intra=pack_videos(folder / "intra", files, "intra")
    )

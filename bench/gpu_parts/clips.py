"""The clips that the parts read, and how parts get at them."""

import os

from bench.gpu_parts.parts import FRAMES, Given
from bench.harness import ROOT
from bench.packing import make_clips
from pipelines.frame_sampling import choose
from pipelines.requests import ClipRequest
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile

SIDE = 224  # pixels
SOURCES = ROOT / "data/bench/packing"
_NAMES = 4  # of each clip where training reads it, so that a batch of 128 different videos comes of 64 clips
PROFILES = {
    "intra": Profile(),
    "intra240": Profile(short_side=240),
    "intra256": Profile(short_side=256),
    "h264": Profile(name="h264"),
    "copy": Profile(name="copy"),
}


def make(given: Given) -> None:
    """Make the clips and pack them, each profile once."""
    workers = os.cpu_count() or 1
    clips = make_clips(SOURCES, given.clips, workers)
    for name, profile in PROFILES.items():
        out = given.folder / f"{name}-{given.clips}"
        if not (out / "dataset.json").exists():
            items = [
                Item(f"{clip.stem}-{copy}", clip, (Caption(f"clip {clip.stem}"), Caption(f"name {copy}")))
                for copy in range(_NAMES if name in ("intra", "h264") else 1)
                for clip in clips
            ]
            pack(items, out, dataset="bench", split="train", profile=profile, workers=workers)


def split_of(given: Given, name: str) -> Split:
    """The clips, packed with that profile."""
    return Split(given.folder / f"{name}-{given.clips}")


def requests_of(split: Split, count: int) -> list[ClipRequest]:
    """What a loader asks for of the first `count` videos."""
    videos = [split.video(i) for i in range(min(count, len(split)))]
    return [ClipRequest(video, choose(video, "uniform", FRAMES)) for video in videos]

"""Small sets of real videos to pack, and the bytes of what is packed."""

from __future__ import annotations

from argparse import ArgumentParser
from fractions import Fraction
from pathlib import Path

from shards.annotations import Caption, Item, Reading, readers
from shards.annotations.files import Files
from shards.packing.pack import pack
from shards.video.profiles import Profile
from tests.videos import encode

INTRA = Profile(name="intra", fps=3, short_side=64)
COPY = Profile(name="copy")


def source(folder: Path) -> list[Item]:
    """Five videos of several containers, codecs, rates and shapes, under names that need escaping."""
    vp9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
    files = {
        "plain.mp4": encode(50, 25, options={"bf": "3", "g": "12"}),
        "portrait.mkv": encode(45, Fraction(30000, 1001), (120, 160), format="matroska"),
        "web.webm": encode(30, 24, (96, 64), "libvpx-vp9", "webm", vp9),
        "stream.ts": encode(30, 25, format="mpegts"),
        "HEVC.MP4": encode(40, 30, codec="libx265", options={"g": "12", "bf": "2"}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    captions = {
        "plain": (Caption("one, with a comma", 0.0, 1.5), Caption('zwei "quoted" — ü', 1.5)),
        "dir/por.trait": (Caption("three"),),
        "web": (Caption("four"), Caption("five"), Caption("six")),
        "ст рим": (Caption("seven"),),
        "長" * 60: (Caption("eight"),),  # 540 bytes in the tar
    }
    return [
        Item(id, folder / name, spoken, {"nth": i})
        for i, ((id, spoken), name) in enumerate(zip(captions.items(), files, strict=True))
    ]


def packed(items: list[Item], out: Path, profile: Profile = COPY, **options) -> dict:
    options = {"shard_videos": 2, "workers": 2, **options}
    return pack(items, out, dataset="set", split="train", profile=profile, **options)


def files(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of all files but the lock."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def reading(name: str, videos: Path | str, *options: object, follow_links: bool = False) -> Reading:
    """What the reader of data set `name` makes of these command-line options."""
    module = readers()[name]
    parser = ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args([str(option) for option in options])
    args.videos = Files(videos, follow_links=follow_links, beside=getattr(module, "BESIDE", ()))
    return module.read(args)

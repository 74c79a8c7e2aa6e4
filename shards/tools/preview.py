"""A split at a glance: one HTML page that needs nothing but itself."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from shards import ShardError, VideoError, count
from shards.limits import Limits
from shards.schema import Video
from shards.split import Split
from shards.tar import write_atomic
from shards.tools.info import title
from shards.video.random_access import checked, pick_frames

COUNT, WIDTH = Limits(int, 1, 10_000), Limits(int, 16, 10_000)  # of videos and of pictures; pixels
_CAPTIONS = 20  # shown of one video

# no script, no address: the page can be opened from anywhere and shown to anyone
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em; color: #222; background: #fafafa }}
article {{ background: #fff; border: 1px solid #ddd; border-radius: 6px; margin: 1em 0; padding: .8em 1em }}
h3 {{ font-size: 1em; margin: 0 0 .4em; overflow-wrap: anywhere }}
.facts {{ color: #666; font-weight: normal; overflow-wrap: anywhere }}
h1, li {{ overflow-wrap: anywhere }}
.frames {{ display: flex; flex-wrap: wrap; gap: 4px }}
.bad {{ color: #b00 }}
ul {{ margin: .5em 0 0; padding-left: 1.2em }}
</style></head><body>
{body}
</body></html>
"""


def preview(
    paths: Sequence[Path],
    out: Path,
    *,
    count: int = 24,
    seed: int | None = None,
    frames: int = 4,
    width: int = 240,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the page `out` with `count` videos of each split: the first ones, or with `seed` a random choice.

    Each shows `frames` pictures of at most `width` pixels, from the middles of equal parts, and its captions. Returns
    how many of the videos could not be shown (the page says why).
    """
    COUNT.check("--count", count)
    COUNT.check("--frames", frames)
    WIDTH.check("--width", width)
    splits = [Split(p) for p in paths]
    chosen = [_choose(len(s), count, seed) for s in splits]
    total, bad, body = sum(map(len, chosen)), 0, []
    on_video(0, total)
    done = 0
    for split, indices in zip(splits, chosen, strict=True):
        body.append(_head(split, len(indices), seed))
        for index in indices:
            video = split.video(index)
            pictures, why = _pictures(split, video, frames, width)
            bad += why is not None
            body.append(_card(video, split.captions(index), pictures, why))
            done += 1
            on_video(done, total)
    heading = ", ".join(title(s.info["name"], s.info["split"]) for s in splits)
    write_atomic(out, _PAGE.format(title=escape(heading), body="\n".join(body)).encode(errors="replace"))
    return bad


def _choose(videos: int, count: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(min(count, videos)))
    return sorted(np.random.default_rng(seed).choice(videos, min(count, videos), replace=False).tolist())


def _pictures(split: Split, video: Video, count: int, width: int) -> tuple[list[tuple[float, str]], str | None]:
    """(seconds, data URI) of some stored frames, and why there are none if they cannot be decoded."""
    low, high = video.inside
    wanted = sorted({low + (2 * i + 1) * (high - low) // (2 * count) for i in range(count)})
    try:
        pictures = pick_frames(video, checked(video, lambda at, size: split.read(video, at, size)), wanted)
    except (VideoError, ShardError) as error:
        return [], str(error)
    return [(float(video.frames.time[i]), _data_uri(pictures[i], width)) for i in wanted], None


def _data_uri(picture: np.ndarray, width: int) -> str:
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((width, 4 * width))
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _head(split: Split, shown: int, seed: int | None) -> str:
    how = "the first" if seed is None else f"drawn with seed {seed}:"
    profile = ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in split.info["profile"].items())
    name = escape(title(split.info["name"], split.info["split"]))
    return (
        f"<h1>{name}</h1><p class=facts>{count(len(split), 'video')}, {count(split.info['captions'], 'caption')}; {how} {shown}. "
        f"Profile {escape(profile)}. Digest {escape(split.digest)}.</p>"
    )


def _card(video: Video, captions: list[dict], pictures: list[tuple[float, str]], why: str | None) -> str:
    facts = (
        f"{video.duration:.2f} s, {float(video.fps):.4g} fps, {video.width}×{video.height}, {video.codec}, "
        f"{len(video.frames)} of {video.source_frames} frames stored, {video.size / 1e3:.1f} kB, shard {video.shard}"
    )
    images = "".join(f'<img src="{uri}" title="{time:.2f} s" alt="frame at {time:.2f} s">' for time, uri in pictures)
    shown = f"<div class=frames>{images}</div>" if why is None else f"<p class=bad>{escape(why)}</p>"
    lines = "".join(f"<li dir=auto>{escape(c['text'])}{_times(c)}</li>" for c in captions[:_CAPTIONS])
    if len(captions) > _CAPTIONS:
        lines += f"<li class=facts>and {len(captions) - _CAPTIONS} more</li>"
    name = escape(video.id)
    return f"<article><h3>{name} <span class=facts>{escape(facts)}</span></h3>{shown}<ul>{lines}</ul></article>"


def _times(caption: dict) -> str:
    if caption["start"] is None and caption["end"] is None:
        return ""
    start, end = ("" if t is None else f"{t:.2f}" for t in (caption["start"], caption["end"]))
    return f" <span class=facts>[{start} to {end} s]</span>"

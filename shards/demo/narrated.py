"""The demo's large, noisy set: longer videos of several events each, and someone who speaks about them, not too carefully.

Of what is said, a part stands beside another event than the one it speaks of, a part speaks of an event of another video,
and a part of nothing at all. What happens in a video, and when, is in its item's meta. No event of the small set's test
videos is shown, in either direction.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

from shards.annotations import Caption, Item
from shards.demo.scenes import VERSION as SCENES_VERSION
from shards.demo.scenes import Scene, scenes
from shards.demo.shapes import claim, encoded, render, write

VERSION = 1  # of what a seed stands for: raise it with every change to pictures, speech or encoder settings

FPS = Fraction(12)
EVENTS = 5  # of a video
SECONDS = 3  # an event lasts
SAID = 2  # sentences about an event, on average and with chatter
LATE_S = 2.2  # standard deviation of when something is said, around the middle of its event, seconds
WRONG = 0.2  # share of what is said that is true of another video's event
CHATTER = 0.15  # share of what is said that is about nothing
_MOST_SCENES = 1500  # that one draw gives
CHATTER_LINES = (
    "so let us have a look at this one", "as you can see here", "and now on to the next", "thank you for watching",
    "do not forget to subscribe", "this is my favourite part", "i will show you how it works", "okay here we go",
    "just like that", "wait a moment", "that is really nice", "we are almost done",
)  # fmt: skip


@dataclass(frozen=True)
class Narrated:
    """One video: its events in order, and what is said when."""

    key: str
    events: tuple[Scene, ...]
    captions: tuple[Caption, ...]

    @property
    def meta(self) -> dict:
        """What each event shows and when: [start, end, caption], seconds."""
        shown = [[i * SECONDS, (i + 1) * SECONDS, scene.captions[0]] for i, scene in enumerate(self.events)]
        return {"shown": shown}


def generate(
    out: Path,
    *,
    seed: int = 0,
    videos: int = 600,
    small: tuple[int, int] = (200, 200),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Item]:
    """Write OUT/KEY.mp4 and return the items in order. small: training and test videos of the demo set beside it.

    Files that are there are kept; the bytes do not depend on `workers`. `progress` is called with videos done and in all.
    Raises FileExistsError when OUT holds a set made with other arguments.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    about = {"version": [VERSION, SCENES_VERSION], "seed": seed, "videos": videos, "small": list(small)}
    claim(out / "demo.json", json.dumps(about) + "\n")
    clips = narrated(seed, videos, small)
    todo = [video for video in clips if not (out / f"{video.key}.mp4").exists()]
    done = len(clips) - len(todo)
    for video, data in zip(todo, encoded(todo, encode, workers), strict=True):
        write(out / f"{video.key}.mp4", data)
        done += 1
        if progress:
            progress(done, len(clips))
    return [Item(video.key, out / f"{video.key}.mp4", video.captions, video.meta) for video in clips]


def narrated(seed: int, videos: int, small: tuple[int, int] = (200, 200)) -> list[Narrated]:
    """The videos of the set, the same for the same arguments."""
    rng = random.Random(f"narrated {seed}")
    hidden = {scene.event for scene in scenes(seed, *small)["test"]}
    events = list(itertools.islice(_events(seed, hidden), videos * EVENTS))
    rng.shuffle(events)
    out = []
    for i in range(videos):
        drawn, portrait = events[i * EVENTS : (i + 1) * EVENTS], rng.random() < 0.5
        shown = tuple(replace(s, fps=FPS, frames=int(SECONDS * FPS), portrait=portrait) for s in drawn)
        out.append(Narrated(f"narrated{i:05d}", shown, _speech(rng, shown, events)))
    return out


def _events(seed: int, hidden: set) -> Iterator[Scene]:
    for draw in itertools.count(1):
        for scene in scenes(seed + 1000 * draw, _MOST_SCENES, 0)["train"]:
            if scene.event not in hidden:
                yield scene


def _speech(rng: random.Random, shown: tuple[Scene, ...], everything: list[Scene]) -> tuple[Caption, ...]:
    """What is said over a video, in order of time."""
    end, spoken = len(shown) * SECONDS, []
    for i, scene in enumerate(shown):
        for _ in range(SAID):
            kind = rng.random()
            about = rng.choice(everything) if kind < WRONG else scene
            text = rng.choice(CHATTER_LINES) if kind > 1 - CHATTER else rng.choice(about.captions)
            middle = rng.gauss((i + 0.5) * SECONDS, LATE_S)
            length = rng.uniform(1.0, 2.5)
            start = min(max(0.0, middle - length / 2), end - length)
            spoken.append((round(start, 2), Caption(text, round(start, 2), round(start + length, 2))))
    return tuple(caption for _, caption in sorted(spoken, key=lambda timed: timed[0]))


def encode(video: Narrated) -> bytes:
    """The video as an mp4 file of H.264. The same bytes on every call."""
    height, width = video.events[0].size
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        options = {"preset": "superfast", "crf": "23", "bf": "2", "g": "48", "threads": "1"}
        stream = file.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for i, picture in enumerate(itertools.chain.from_iterable(map(render, video.events))):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, 1 / FPS
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()

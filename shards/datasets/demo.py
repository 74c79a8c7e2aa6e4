"""The demo set: a small, seeded text-video retrieval data set of real H.264 files.

A video shows one event: a coloured shape moves, grows, appears, changes, turns over, or gives way to another, on a
textured background. Every event has a `before` and an `after`, and the same event played backwards is another event
with another caption (right and left, grows and shrinks, ...). About 30 % of each split are such pairs, whose members
show the same frames in opposite order: who ignores the order of frames can at best guess between the two.

All action stays inside the central 120x120 square, so that a centre crop loses nothing, and frames taken at one
a second show it.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from shards.datasets import Caption, Item

VERSION = 1  # of what a seed stands for: raise it with every change to the pictures, captions or encoder settings

RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))
SECONDS = (3, 12)
SIDE = 120  # of the central square that holds all action, in pixels; the frame is 160 the long way
GOP = 250
PAIRED = 0.3  # the share of videos that have a time-reversed twin

SIZES = {"small": 30, "medium": 42, "large": 56}  # pixels across; captions never say medium
COLOURS = {
    "red": (225, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 235, 40),
    "green": (20, 165, 45),
    "cyan": (40, 225, 235),
    "blue": (30, 50, 235),
    "pink": (250, 70, 200),
    "white": (250, 250, 250),
}
OUTLINE = (12, 12, 12)
KINDS = ("move", "resize", "show", "recolour", "morph", "turn", "then")
GRADUAL = ("move", "resize", "turn")  # the other kinds switch at half time
SWITCH_S = 0.2  # seconds a switch takes

SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
}
TURNING = ("triangle", "heart", "moon")  # the shapes that look different upside down
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "stripes": ("stripes", "a striped background"),
    "dots": ("dots", "a dotted background"),
    "checks": ("checks", "a checkered background"),
    "bricks": ("bricks", "a brick wall"),
    "waves": ("waves", "a wavy background"),
    "sand": ("sand", "a grainy background"),
}
VERBS: dict[str, tuple[str, ...]] = {  # opposite actions in the same order, so that twins are worded alike
    "right": ("moves right", "goes to the right", "slides from left to right"),
    "left": ("moves left", "goes to the left", "slides from right to left"),
    "down": ("moves down", "goes to the bottom", "slides from top to bottom"),
    "up": ("moves up", "goes to the top", "slides from bottom to top"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes tiny"),
    "appear": ("appears", "shows up", "comes into view"),
    "vanish": ("vanishes", "goes away", "drops out of view"),
    "over": ("turns upside down", "flips upside down", "rotates until it is upside down"),
    "upright": ("turns upright", "flips upright", "rotates until it is upright"),
}


@dataclass(frozen=True)
class Thing:
    """A shape as it is at one end of the event; x and y are its centre in the central square, angle in degrees."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    angle: int = 0


@dataclass(frozen=True)
class Scene:
    """One video, whole: `render` and `encode` are pure functions of it. `pair` is the name twins share, or None."""

    key: str
    kind: str
    before: Thing | None
    after: Thing | None
    background: str
    portrait: bool
    fps: Fraction
    frames: int
    seed: int
    pair: str | None = None
    captions: tuple[str, ...] = ()

    @property
    def action(self) -> str:
        """What happens, in one word that tells the event from the same event backwards where the looks do not."""
        a, b = self.before, self.after
        if self.kind == "show":
            return "appear" if a is None else "vanish"
        assert a is not None and b is not None
        if self.kind == "move":
            return ("right" if b.x > a.x else "left") if a.x != b.x else ("down" if b.y > a.y else "up")
        if self.kind == "resize":
            return "grow" if a.size == "small" else "shrink"
        if self.kind == "turn":
            return "over" if a.angle == 0 else "upright"
        return self.kind

    @property
    def combination(self) -> tuple[Any, ...]:
        """All that every caption of this video says, and nothing else."""
        return (self.kind, self.action, _look(self.before), _look(self.after), self.background)

    @property
    def event(self) -> frozenset[tuple[Any, ...]]:
        """The combination blind to order: the same for a scene and for its twin, whether or not that is in the set."""
        return frozenset({self.combination, reverse(self).combination})

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (160, SIDE) if self.portrait else (SIDE, 160)

    @property
    def meta(self) -> dict[str, Any]:
        """What the file's line says beside its captions; JSON types only."""
        looks = [_look(thing) for thing in (self.before, self.after) if thing]
        names = {"shape": 0, "colour": 1, "size": 2}
        attributes = {name: list(dict.fromkeys(look[i] for look in looks)) for name, i in names.items()}
        return {"kind": self.kind, "action": self.action, **attributes, "background": self.background,
                "pair": self.pair, "fps": str(self.fps), "frames": self.frames}  # fmt: skip


def _look(thing: Thing | None) -> tuple[str, str, str] | None:
    return thing and (thing.shape, thing.colour, thing.size)


def reverse(scene: Scene) -> Scene:
    """The same event backwards; its frames are the scene's frames in opposite order. Captions are made anew."""
    twin = replace(scene, before=scene.after, after=scene.before)
    return replace(twin, captions=tuple(_captions(twin, len(scene.captions))))


# ---- which videos ----


def scenes(seed: int, train: int, test: int) -> dict[str, list[Scene]]:
    """The videos of both splits: {"train": [...], "test": [...]}, the same for the same arguments.

    No event of test is in train in either direction, and no split has an event twice but for its pairs.
    Train videos have five captions, test videos one, that is true of no other test video.
    Raises ValueError for counts below 0 or above what the attributes can make.
    """
    if min(train, test) < 0 or train + test > 2000:
        raise ValueError(f"the demo set has 0 to 2000 videos in all, not train={train} and test={test}")
    taken: set[frozenset[tuple[Any, ...]]] = set()
    # test first: its videos then do not depend on how many train videos are asked for
    found = {name: _split(seed, name, count, taken) for name, count in (("test", test), ("train", train))}
    return {"train": found["train"], "test": found["test"]}


def _split(seed: int, name: str, count: int, taken: set[frozenset[tuple[Any, ...]]]) -> list[Scene]:
    rng = random.Random(f"demo {VERSION} {seed} {name}")
    pairs = round(PAIRED / 2 * count)
    drawn: list[Scene] = []
    for number in range(count - pairs):
        kind = KINDS[number % len(KINDS)]
        while (scene := _draw(rng, kind)).event in taken:
            pass
        taken.add(scene.event)
        scene = replace(scene, captions=tuple(_captions(scene, 1 if name == "test" else 5)))
        if number < pairs:
            scene = replace(scene, pair=f"{name}-pair{number:04d}")
            drawn.append(reverse(scene))
        drawn.append(scene)
    while True:
        rng.shuffle(drawn)
        if all(a.pair is None or a.pair != b.pair for a, b in itertools.pairwise(drawn)):
            return [replace(scene, key=f"{name}{i:05d}") for i, scene in enumerate(drawn)]


def _draw(rng: random.Random, kind: str) -> Scene:
    """A scene of this kind with everything else by chance, yet without key, pair and captions."""
    half = SIDE // 2

    def place(px: int) -> int:  # the centre of something px across, on one axis
        return rng.randint(px // 2 + 3, SIDE - px // 2 - 3)

    size = rng.choice(tuple(SIZE_WORDS))
    shape, other = rng.sample(TURNING if kind == "turn" else tuple(SHAPES), 2)
    colour, tint = rng.sample(tuple(COLOURS), 2)
    room = {"turn": 80, "resize": SIZES["large"]}.get(kind, SIZES[size])
    a = Thing(shape, colour, size, place(room), place(room))
    b: Thing | None = a
    if kind == "move":
        axis = rng.choice("xy")
        edge = SIZES[size] // 2 + 3
        a, b = replace(a, **{axis: edge}), replace(a, **{axis: SIDE - edge})
    elif kind == "resize":
        a, b = replace(a, size="small"), replace(a, size="large")
    elif kind == "show":
        b = None
    elif kind == "recolour":
        b = replace(a, colour=tint)
    elif kind == "morph":
        b = replace(a, shape=other)
    elif kind == "turn":
        b = replace(a, angle=180)
    else:
        # two things in places that do not overlap; which is where says nothing about which is first
        near, far = rng.sample((half - 30, half + 30), 2)
        spots = [(near, place(42)), (far, place(42))]
        if rng.random() < 0.5:
            spots = [(y, x) for x, y in spots]
        a, b = Thing(shape, colour, "medium", *spots[0]), Thing(other, tint, "medium", *spots[1])
    ends = (a, b) if rng.random() < 0.5 else (b, a)
    fps = rng.choice(RATES)
    seconds = SECONDS[0] + (SECONDS[1] - SECONDS[0]) * rng.betavariate(1, 2.6)  # 5.5 s in the mean
    return Scene(
        key="", kind=kind, before=ends[0], after=ends[1], background=rng.choice(tuple(BACKGROUNDS)),
        portrait=rng.random() < 0.5, fps=fps, frames=math.ceil(seconds * fps), seed=rng.getrandbits(32),
    )  # fmt: skip


# ---- captions ----


def _captions(scene: Scene, count: int) -> list[str]:
    """`count` different sentences that all say the scene's whole combination."""
    rng = random.Random(f"captions {scene.seed}")  # the twin has the same seed: it is worded alike
    found: dict[str, None] = {}
    while len(found) < count:
        found[_sentence(scene, rng)] = None
    return list(found)


def _sentence(scene: Scene, rng: random.Random) -> str:
    a, b = scene.before or scene.after, scene.after or scene.before
    assert a is not None and b is not None
    where = f"{rng.choice(('on', 'over', 'in front of'))} {rng.choice(BACKGROUNDS[scene.background])}"
    what = rng.choice(SIZE_WORDS[a.size]) + " " if a.size in SIZE_WORDS and scene.kind != "resize" else ""
    noun = {shape: rng.choice(words) for shape, words in SHAPES.items()}
    first = _article(f"{what}{a.colour} {noun[a.shape]}")
    if scene.kind == "recolour":
        did = rng.choice((
            f"{first} turns {b.colour}",
            f"{first} becomes {b.colour}",
            f"{_article(what + noun[a.shape])} changes from {a.colour} to {b.colour}",
        ))  # fmt: skip
    elif scene.kind == "morph":
        did = f"{first} {rng.choice(('turns into', 'becomes', 'changes into'))} {_article(noun[b.shape])}"
    elif scene.kind == "then":
        second = _article(f"{b.colour} {noun[b.shape]}")
        did = rng.choice((
            f"{first}, then {second}",
            f"first {first} and then {second}",
            f"{first} is followed by {second}",
            f"{first} gives way to {second}",
        ))  # fmt: skip
    else:
        did = f"{first} {rng.choice(VERBS[scene.action])}"
    return rng.choice((f"{did} {where}", f"{where}, {did}"))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---- pictures ----

# ((shape, rgb, pixels across, angle), x, y, weight of 16)
State = tuple[tuple[str, tuple[int, int, int], int, int], int, int, int]


def render(scene: Scene) -> Iterator[np.ndarray]:
    """The scene's frames in order: uint8 RGB [H, W, 3], not to be written to."""
    grounds = _grounds(scene)
    last = scene.frames - 1
    drawn: dict[Any, np.ndarray] = {}  # much of a scene that switches stands still
    for i in range(scene.frames):
        # the grain reads the same forwards and backwards, and sums are of integers: twins are exact reversals
        grain = min(i, last - i) * 5 % len(grounds)
        state = _state(scene, i)
        frame = drawn.get((grain, *state))
        if frame is None:
            frame = _draw_on(grounds[grain], state, scene.portrait)
            if scene.kind not in GRADUAL:
                drawn[grain, *state] = frame
        yield frame


def _draw_on(ground: np.ndarray, state: list[State], portrait: bool) -> np.ndarray:
    """A new frame, uint8 [H, W, 3]: the background with the shapes over it."""
    frame = ground.copy()
    if not state:
        return frame
    left, top = (0, 20) if portrait else (20, 0)
    placed = []  # alpha, ink, the sprite's first column and row, weight
    for what, x, y, weight in state:
        alpha, ink = _sprite(*what)
        placed.append((alpha, ink, x + left - len(alpha) // 2, y + top - len(alpha) // 2, weight))
    x0, x1 = min(x for _, _, x, _, _ in placed), max(x + len(alpha) for alpha, _, x, _, _ in placed)
    y0, y1 = min(y for _, _, _, y, _ in placed), max(y + len(alpha) for alpha, _, _, y, _ in placed)
    part = frame[y0:y1, x0:x1]
    change = np.zeros(part.shape, np.int32)
    for alpha, ink, x, y, weight in placed:
        at = np.s_[y - y0 : y - y0 + len(alpha), x - x0 : x - x0 + len(alpha)]
        change[at] += weight * (ink - alpha * part[at])
    part[:] = part + (change + 2048 >> 12)
    return frame


def _state(scene: Scene, i: int) -> list[State]:
    """What frame i shows: nothing, one shape, or two that are giving way to each other."""
    a, b, last = scene.before, scene.after, scene.frames - 1
    if scene.kind in GRADUAL:
        assert a is not None and b is not None
        now, end = i, last
        if scene.kind == "turn":  # in the middle half only: frames near the ends show it upright and upside down
            now, end = min(max(4 * i - last, 0), 2 * last), 2 * last

        def mix(p: int, q: int) -> int:
            return round((p * (end - now) + q * now) / end)

        what = (a.shape, COLOURS[a.colour], mix(SIZES[a.size], SIZES[b.size]), mix(a.angle // 6, b.angle // 6) * 6)
        return [(what, mix(a.x, b.x), mix(a.y, b.y), 16)]
    done = 8 + round(float(8 * (2 * i - last) / scene.fps / Fraction(SWITCH_S)))
    done = min(max(done, 0), 16)
    both = ((a, 16 - done), (b, done))
    return [((t.shape, COLOURS[t.colour], SIZES[t.size], t.angle), t.x, t.y, w) for t, w in both if t and w]


@cache
def _points(shape: str) -> np.ndarray:
    """The outline of a shape in the square from -1 to 1, y downwards: float [N, 2]."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    if shape in ("circle", "ring"):
        x, y = np.sin(turn), -np.cos(turn)
    elif shape == "square":
        x, y = np.array([-0.9, 0.9, 0.9, -0.9]), np.array([-0.9, -0.9, 0.9, 0.9])
    elif shape == "triangle":
        x, y = np.array([0, 1, -1]), np.array([-0.95, 0.85, 0.85])
    elif shape == "star":
        step = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.46, 1.05)
        x, y = radius * np.sin(step), 0.07 - radius * np.cos(step)
    elif shape == "cross":
        x = np.array([-1, -1, 1, 1, 3, 3, 1, 1, -1, -1, -3, -3]) / 3
        y = np.array([-1, -3, -3, -1, -1, 1, 1, 3, 3, 1, 1, -1]) / 3
    elif shape == "heart":
        x = np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 15 - 0.13
    else:  # moon: open at the top
        out, back = np.linspace(-2.3, 2.3, 40), np.linspace(1.83, -1.83, 40)
        x = np.concatenate([np.sin(out), 0.771 * np.sin(back)])
        y = np.concatenate([np.cos(out), 0.771 * np.cos(back) - 0.47]) - 0.1
    return np.stack([x, y], axis=1)


@lru_cache(maxsize=4096)
def _sprite(shape: str, rgb: tuple[int, int, int], pixels: int, angle: int) -> tuple[np.ndarray, np.ndarray]:
    """A shape `pixels` across: its alpha, int32 0..256 [S, S, 1], and its colours times alpha, int32 [S, S, 3]."""
    fine = 4  # drawn this much larger, then averaged
    reach = pixels if angle % 180 == 0 else pixels * 1.4
    side = 2 * math.ceil(reach / 2) + 4
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = _points(shape) @ np.array([[c, s], [-s, c]])
    middle = side * fine / 2

    def polygon(scale: float) -> list[tuple[float, float]]:
        return [(middle + x * scale, middle + y * scale) for x, y in points.tolist()]

    radius = pixels * fine / 2
    edges = [polygon(radius)] + ([polygon(radius * 0.5)] if shape == "ring" else [])
    outer = Image.new("L", (side * fine, side * fine))
    for nth, edge in enumerate(edges):  # the second is the hole of a ring
        ImageDraw.Draw(outer).polygon(edge, fill=0 if nth else 255)
    inner = outer.copy()
    for edge in edges:
        ImageDraw.Draw(inner).line([*edge, edge[0]], fill=0, width=2 * fine)  # an outline one pixel wide
    alpha, fill = (np.asarray(m.reduce(fine), np.int32)[..., None] * 256 // 255 for m in (outer, inner))
    return alpha, fill * np.array(rgb, np.int32) + (alpha - fill) * np.array(OUTLINE, np.int32)


def _grounds(scene: Scene) -> np.ndarray:
    """The scene's background under several draws of grain: uint8 [8, H, W, 3]."""
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    height, width = scene.size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + rng.uniform(0, 40), y + rng.uniform(0, 40)
    period = rng.uniform(15, 19)
    name = scene.background
    if name == "stripes":
        angle = np.pi / 4 * rng.choice([-1, 1]) + rng.uniform(-0.2, 0.2)
        tex = np.sign(np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period))
    elif name == "dots":
        tex = np.where(np.hypot(x % period - period / 2, y % period - period / 2) < 0.32 * period, 1.3, -0.5)
    elif name == "checks":
        tex = np.sign(np.sin(np.pi * x / period) * np.sin(np.pi * y / period))
    elif name == "bricks":
        shift = (y // period % 2) * period
        tex = np.where((y % period < 3) | ((x + shift) % (2 * period) < 3), 1.4, -0.4)
    elif name == "waves":
        tex = np.sin(2 * np.pi * (y + 5 * np.sin(2 * np.pi * x / (2.2 * period))) / period)
    else:
        tex = np.kron(rng.uniform(-1.2, 1.2, (height // 4, width // 4)), np.ones((4, 4)))
    tone = rng.uniform(75, 110) + rng.uniform(-14, 14, 3)  # muted: the shapes' colours are all far from it
    ground = tone + rng.uniform(22, 30) * tex[..., None] + rng.normal(0, 2, (height, width, 1))
    grain = rng.normal(0, 2, (8, height, width, 1))
    return np.clip(np.rint(ground + grain), 0, 255).astype(np.uint8)


def encode(scene: Scene) -> bytes:
    """The scene as an mp4 file: H.264 with B-frames, a keyframe every 250 frames. The same bytes on every call."""
    height, width = scene.size
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        # no extra keyframes at cuts; one thread, since the bytes depend on the number of threads
        options = {"preset": "superfast", "crf": "23", "bf": "2", "g": str(GOP), "sc_threshold": "0", "threads": "1"}
        stream = file.add_stream("libx264", rate=scene.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for i, rgb in enumerate(render(scene)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, 1 / scene.fps
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


# ---- files ----


def generate(
    out: Path,
    *,
    seed: int = 0,
    train: int = 1000,
    test: int = 200,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Item]]:
    """Write OUT/{train,test}/KEY.mp4 and OUT/{train,test}.jsonl, and return each split's items in order.

    Files that are there are kept, so that a killed run goes on where it was; the bytes do not depend on `workers`
    (default: all cores). `progress` is called with the videos done and the videos in all.
    Raises FileExistsError when OUT holds a demo set made with other arguments.
    """
    out = Path(out)
    splits = scenes(seed, train, test)
    for name in splits:
        (out / name).mkdir(parents=True, exist_ok=True)
    recipe = json.dumps({"version": VERSION, "seed": seed, "train": train, "test": test}) + "\n"
    _claim(out / "demo.json", recipe)

    todo = [(out / name / f"{s.key}.mp4", s) for name, some in splits.items() for s in some]
    total = len(todo)
    todo = [(path, scene) for path, scene in todo if not path.exists()]
    done = total - len(todo)
    if progress:
        progress(done, total)
    for (path, _), data in zip(todo, _encoded([scene for _, scene in todo], workers), strict=True):
        _write(path, data)
        done += 1
        if progress:
            progress(done, total)

    items: dict[str, list[Item]] = {}
    for name, some in splits.items():
        lines = [{"video": f"{name}/{s.key}.mp4", "captions": list(s.captions), "meta": s.meta} for s in some]
        if not (out / f"{name}.jsonl").exists():
            _write(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        items[name] = [
            Item(s.key, out / name / f"{s.key}.mp4", tuple(Caption(text) for text in s.captions), s.meta) for s in some
        ]
    return items


def _claim(path: Path, recipe: str) -> None:
    """Write what this folder is made of, or see that it is made of the same."""
    if not path.exists():
        _write(path, recipe.encode())
    elif (found := path.read_text()) != recipe:
        raise FileExistsError(
            f"{path.parent} holds another demo set ({found.strip()}, asked for: {recipe.strip()}): "
            "delete that folder or choose another"
        )


def _encoded(todo: Sequence[Scene], workers: int | None) -> Iterator[bytes]:
    """The files of the scenes, in order, made by `workers` processes; only the caller's process writes."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        yield from map(encode, todo)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(encode, todo, chunksize=4)
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end when the process that started it is killed, rather than wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)

"""What the demo set shows: which events, in which videos of which split, and the captions that say so. No pictures."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

VERSION = 2  # of what a seed stands for: raise it with every change to the pictures, captions or encoder settings

RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))
SECONDS = (3, 12)
SIDE = 120  # of the central square that holds all action, in pixels; the frame is 160 the long way
# the share of videos that have a time-reversed twin. In training all have one: nothing but order tells twins apart, and
# a caption's chance that its video's twin is in the batch is what order is learned from
PAIRED = {"train": 1.0, "test": 0.3}

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
KINDS = ("move", "resize", "show", "recolour", "morph", "turn", "then")
DRAWN = (*KINDS, "move")  # in turn: moves have four directions, what else has an opposite has two
GRADUAL = ("move", "resize", "turn")  # the other kinds switch at half time

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
    "right": ("moves right", "goes to the right", "slides rightwards"),
    "left": ("moves left", "goes to the left", "slides leftwards"),
    "down": ("moves down", "goes to the bottom", "slides downwards"),
    "up": ("moves up", "goes to the top", "slides upwards"),
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
    """One video: `render` and `encode` are pure functions of it. `pair` is the name twins share, or None."""

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
        looks = [look for look in (_look(self.before), _look(self.after)) if look]
        names = {"shape": 0, "colour": 1, "size": 2}
        attributes = {name: list(dict.fromkeys(look[i] for look in looks)) for name, i in names.items()}
        return {"kind": self.kind, "action": self.action, **attributes, "background": self.background,
                "pair": self.pair, "fps": str(self.fps), "frames": self.frames}  # fmt: skip


def _look(thing: Thing | None) -> tuple[str, str, str] | None:
    return (thing.shape, thing.colour, thing.size) if thing else None


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
    splits = {name: _split(seed, name, count, taken) for name, count in (("test", test), ("train", train))}
    return {"train": splits["train"], "test": splits["test"]}


def _split(seed: int, name: str, count: int, taken: set[frozenset[tuple[Any, ...]]]) -> list[Scene]:
    rng = random.Random(f"demo {VERSION} {seed} {name}")
    pairs = min(round(PAIRED[name] / 2 * count), count // 2) if count > 2 else 0  # twins are never neighbours
    drawn: list[Scene] = []
    for number in range(count - pairs):
        kind = DRAWN[number % len(DRAWN)]
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
        a, b = (replace(a, x=at) if axis == "x" else replace(a, y=at) for at in (edge, SIDE - edge))
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
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        sentences[_sentence(scene, rng)] = None
    return list(sentences)


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

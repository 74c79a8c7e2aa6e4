"""The demo set: a small, seeded text-video retrieval data set of real H.264 files.

A video shows one event: a coloured shape moves, grows, appears, changes, turns over, or gives way to another, on a
textured background. Every event has a `before` and an `after`, and the same event played backwards is another event
with another caption (right and left, grows and shrinks, ...). All training videos and 30 % of the test videos come in such
pairs, whose members show the same frames in opposite order: who ignores the order of frames can at best guess between the
two.

All action stays inside the central 120x120 square, so that a centre crop loses nothing, and frames taken at one
a second show it.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache, lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from shards.annotations import Caption, Item
from shards.demo.scenes import COLOURS, GRADUAL, SIZES, VERSION, Scene, scenes
from shards.interrupts import left_to_parent
from shards.tar import naming

GOP = 250
OUTLINE = (12, 12, 12)
SWITCH_S = 0.2  # seconds a switch takes

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
    claim(out / "demo.json", recipe)

    todo = [(out / name / f"{s.key}.mp4", s) for name, some in splits.items() for s in some]
    total = len(todo)
    todo = [(path, scene) for path, scene in todo if not path.exists()]
    done = total - len(todo)
    if progress:
        progress(done, total)
    for (path, _), data in zip(todo, encoded([scene for _, scene in todo], encode, workers), strict=True):
        write(path, data)
        done += 1
        if progress:
            progress(done, total)

    items: dict[str, list[Item]] = {}
    for name, some in splits.items():
        lines = [{"video": f"{name}/{s.key}.mp4", "captions": list(s.captions), "meta": s.meta} for s in some]
        if not (out / f"{name}.jsonl").exists():
            write(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        items[name] = [
            Item(s.key, out / name / f"{s.key}.mp4", tuple(Caption(text) for text in s.captions), s.meta) for s in some
        ]
    return items


def claim(path: Path, recipe: str) -> None:
    """Record what this folder is made of. Raises FileExistsError if it was made of something else."""
    if not path.exists():
        write(path, recipe.encode())
    elif (existing := path.read_text()) != recipe:
        raise FileExistsError(
            f"{path.parent} holds another demo set ({existing.strip()}, asked for: {recipe.strip()}): "
            "delete that folder or choose another"
        )


def encoded(todo: Sequence, encode: Callable[[Any], bytes], workers: int | None) -> Iterator[bytes]:
    """The files that `encode` makes of each, in order, made by `workers` processes; only the caller's process writes."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        yield from map(encode, todo)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            with left_to_parent():
                files = pool.map(encode, todo, chunksize=4)  # which starts the processes
            yield from files
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end when the process that started it is killed, rather than wait for work for ever."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with naming(path):
        part.write_bytes(data)
    part.replace(path)

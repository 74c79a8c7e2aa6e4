"""A small index of real videos that are told apart by their colour, and a searcher that knows colours by name: no model."""

import fnmatch
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from c4c.retrieval.index.rows import IndexedVideo
from c4c.retrieval.index.store import About, Store
from shards.video.writer import usual_priority

COLOURS = {
    "red": (200, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 210), "yellow": (220, 200, 40), "grey": (120, 120, 120),
    "white": (235, 235, 235),
}  # fmt: skip
WIDTH = 4
SEGMENT, STRIDE = 4.0, 2.0
FPS = 12


def film(
    path: Path,
    colours,
    seconds=2,
    size=(160, 120),
    codec="libx264",
    pix_fmt="yuv420p",
    sound=False,
    rotation=0,
    sizes=(),
):
    """A video that shows each colour for `seconds`, with a white bar that moves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"preset": "ultrafast", "threads": "1", "g": "12"} if codec == "libx264" else {"threads": "1"}
    with usual_priority(), av.open(path, "w") as file:
        stream = file.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        tone = file.add_stream("aac", rate=48000, layout="mono") if sound else None
        for i in range(int(len(colours) * seconds * FPS)):
            picture = np.zeros((size[1], size[0], 3), np.uint8)
            picture[:] = COLOURS[colours[int(i / FPS / seconds)]]
            picture[:, (i * 3) % size[0] :][:, :6] = 250
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if tone is not None:
            wave_of = np.sin(np.arange(int(48000 * len(colours) * seconds)) / 20).astype(np.float32)[None]
            for at in range(0, wave_of.shape[1], 1024):
                samples = av.AudioFrame.from_ndarray(wave_of[:, at : at + 1024].copy(), format="fltp", layout="mono")
                samples.rate, samples.pts, samples.time_base = 48000, at, Fraction(1, 48000)
                file.mux(tone.encode(samples))
            file.mux(tone.encode(None))
    return path


def vector(rgb) -> np.ndarray:
    values = np.array([*(np.asarray(rgb, np.float32) / 255 - 0.45), 0.15], np.float32)
    return values / np.linalg.norm(values)


def jpeg(rgb, size=(160, 120)) -> bytes:
    out = io.BytesIO()
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[:] = rgb
    picture[:, size[0] // 3 : size[0] // 3 + 6] = 250
    Image.fromarray(picture).save(out, "JPEG")
    return out.getvalue()


def indexed(root: Path, path: Path, colours, seconds=2) -> IndexedVideo:
    """A row a segment, each of the colour in its middle."""
    duration = float(len(colours) * seconds)
    starts = [float(s) for s in np.arange(0, max(STRIDE, duration - STRIDE), STRIDE)]
    middles = [COLOURS[colours[min(len(colours) - 1, int((s + 1) / seconds))]] for s in starts]
    status = path.stat()
    return IndexedVideo(
        video=str(path.relative_to(root)), path=str(path), source="file", size=status.st_size, mtime_ns=status.st_mtime_ns,
        duration=duration, width=160, height=120, starts=starts, ends=[min(duration, s + SEGMENT) for s in starts],
        vectors=np.stack([vector(rgb) for rgb in middles]), thumbnails=[jpeg(rgb) for rgb in middles],
    )  # fmt: skip


FILMS = {
    "scenes/red.mp4": (["red"], {"sound": True}),
    "scenes/blue.webm": (["blue"], {"codec": "libvpx-vp9"}),
    "old/green.avi": (["green", "green"], {"codec": "mpeg4"}),
    "old/yellow.mp4": (["yellow"], {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "long/all.mp4": (["red", "green", "blue", "yellow", "grey", "white"], {}),
    "odd/名前 ä&b#c.mp4": (["grey"], {}),
}  # fmt: skip


def make(folder: Path, films=FILMS) -> Path:
    """An index `my.index` in `folder`, of videos in its `videos`."""
    text = folder / "text"
    text.mkdir(parents=True)
    (text / "encoder.json").write_text("{}")
    about = About(
        identity={"checkpoint": "stand-in", "digest": "0" * 64}, late=False, width=WIDTH, num_frames=4, segment_s=SEGMENT,
        stride_s=STRIDE, runtime="torch", version="0",
    )  # fmt: skip
    store = Store.create(folder / "my.index", about, text)
    root = folder / "videos"
    store.append(
        [indexed(root, film(root / name, colours, **words), colours) for name, (colours, words) in films.items()]
    )
    return folder / "my.index"


class StandIn:
    """Searches by colour: the colours that a sentence names are mixed."""

    def __init__(self, index: Path):
        self.store = Store.open(index)
        self.batches: list[int] = []
        self.encoded: list[str] = []
        self.wait = None

    def encode(self, sentences):
        self.batches.append(len(sentences))
        self.encoded += sentences
        if self.wait is not None:
            self.wait()
        named = [[COLOURS[w] for w in sentence.lower().split() if w in COLOURS] for sentence in sentences]
        return [vector(np.mean(rgbs or [(128, 128, 128)], axis=0)) for rgbs in named]

    def find(self, features, k, *, path=None, min_duration=None, max_duration=None, per_video=True, **_):
        hits = self.store.search(np.asarray(features)[None], 10_000)[0]
        best = {}
        for hit in hits:
            if path and not fnmatch.fnmatch(hit.video, path):
                continue
            if (min_duration or 0) <= hit.duration <= (1e9 if max_duration is None else max_duration):
                best.setdefault(hit.video if per_video else hit.id, hit)
        return list(best.values())[:k]

    def similar(self, id, k, **filters):
        found = self.find(self.store.vectors_of([id])[id], k + 1, **filters)
        return [result for result in found if result.id != id][:k]

    def by_frames(self, file, k, **how):
        with np.load(file, allow_pickle=False) as arrays:
            return self.find(vector(arrays["pixels"][arrays["mask"]].mean(axis=(0, 1, 2))), k, **how)

    @property
    def example_settings(self):
        return {"num_frames": 4, "image_size": 64, "interpolation": "bicubic", "resize_mode": "shortest"}

    def note(self, sentence):
        return "" if sentence.isascii() else "The text tower was trained on Latin script, and this is another one."

    def thumbnail(self, id):
        return self.store.thumbnail(id)

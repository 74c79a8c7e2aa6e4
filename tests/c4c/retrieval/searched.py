"""Small indexes of random clips, and what a search of them must find, by looking at everything."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from c4c.retrieval.encoder import Encoder
from c4c.retrieval.index.rows import IndexedVideo
from c4c.retrieval.index.store import About, Store
from tests.c4c.retrieval.encoders import FRAMES, pixels

SEGMENT_S, STRIDE_S = 8.0, 4.0
# name: seconds; a segment every 4 s
VIDEOS = {
    "cooking/soup.mp4": 8.0, "cooking/it's [hot] 100%_.mp4": 20.0, "cooking/deep/cake.mp4": 40.0, "dogs/run.mp4": 12.0,
    "dogs/frisbee.mp4": 28.0, "Ünï/ü.mp4": 16.0, "long.mp4": 400.0,
}  # fmt: skip


def make(folder: Path, encoder: Encoder, videos: dict[str, float] = VIDEOS) -> Store:
    """An index in `folder`, of random pixels."""
    encoder.save(folder.parent / f"{folder.name}-text")
    about = About(
        identity=encoder.identity.to_dict(), late=encoder.late, width=encoder.identity.width, num_frames=FRAMES,
        segment_s=SEGMENT_S, stride_s=STRIDE_S, runtime="torch", version="1",
    )  # fmt: skip
    store = Store.create(folder, about, folder.parent / f"{folder.name}-text")
    store.append([row(encoder, name, seconds, seed) for seed, (name, seconds) in enumerate(videos.items())])
    return store


def row(encoder: Encoder, name: str, seconds: float, seed: int) -> IndexedVideo:
    starts = [STRIDE_S * i for i in range(round((seconds - SEGMENT_S) / STRIDE_S) + 1)]
    mask = np.ones((len(starts), FRAMES), bool)
    mask[0, 2:] = False
    clips = encoder.videos(encoder.clips(pixels(len(starts), FRAMES, seed=seed), mask), mask)
    return IndexedVideo(
        video=name, path=f"/videos/{name}", source="file", size=1, mtime_ns=1, duration=seconds, width=64, height=48, starts=starts,
        ends=[start + SEGMENT_S for start in starts], vectors=encoder.video_vectors(clips).numpy(),
        thumbnails=[jpeg(seed, i) for i in range(len(starts))], frames=clips.half().numpy() if encoder.late else None,
    )  # fmt: skip


def jpeg(red: int, green: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (red * 30 % 256, green * 10 % 256, 90)).save(out, "JPEG")
    return out.getvalue()


def everything(store: Store, encoder: Encoder, sentence: str) -> dict[str, float]:
    """The score of each segment with a sentence, by its id, best first."""
    ids = [hit.id for video in store.videos() for hit in store.segments_of(video)]
    texts = encoder.texts([sentence])
    if encoder.late:
        import torch

        frames = store.frames_of(ids)
        scores = encoder.score(texts, torch.from_numpy(np.stack([frames[id] for id in ids])))[0].tolist()
    else:
        vectors = store.vectors_of(ids)
        scores = (np.stack([vectors[id] for id in ids]) @ encoder.vectors(texts)[0].numpy()).tolist()
    return dict(sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0])))


def video_of(id: str) -> str:
    return id.rpartition("#")[0]


def best_of_each(scores: dict[str, float]) -> list[str]:
    """Ids of the best segment of each video, best first."""
    first: dict[str, str] = {}
    for id in scores:
        first.setdefault(video_of(id), id)
    return list(first.values())

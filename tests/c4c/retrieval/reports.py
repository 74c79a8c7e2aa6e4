"""A small packed split with an evaluation of it, for the tests of the report."""

import json
from pathlib import Path

import av
import numpy as np
import torch

from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.metrics import ranks, report
from pipelines.config import DataConfig
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile

SIDE, VIDEOS = 48, 12
HOSTILE = '</script><img src=x onerror="window.hacked=1">&amp;<!-- <script>alert(1)</script>'
CAPTIONS = [
    "a red square moves to the right",
    HOSTILE,
    "two people are playing chess in a park",
    "people playing chess in a park",
    "a dog runs",
    "الكلب يركض في الحديقة",
    "a very long caption of a video in which a man in a blue shirt explains at length how a bicycle is repaired",
    "a man rides a horse",
    "a cat sleeps on a warm windowsill",
    "someone is cutting an onion with a knife",
    "a train leaves the station at night",
    "children throw snowballs at each other",
]
WORST = [3, 4, 5, 6, 7]  # captions whose own videos come last; the others find theirs first


def colour(index: int) -> tuple[int, int, int]:
    """Of a video's square."""
    red, green, blue = np.random.default_rng(index).integers(60, 220, 3).tolist()
    return red, green, blue


def video(path: Path, rgb: tuple[int, int, int], seconds: float) -> Path:
    """A square of one colour, with a bar that moves."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=6)
        stream.width = stream.height = SIDE
        for i in range(round(6 * seconds)):
            frame = np.full((SIDE, SIDE, 3), rgb, np.uint8)
            frame[:, i % SIDE] = 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode(None))
    return path


def make_split(folder: Path) -> None:
    """FOLDER/test: twelve videos of 1 to 4 s, a caption each."""
    folder.mkdir(exist_ok=True)
    items = []
    for i, text in enumerate(CAPTIONS):
        items.append(Item(f"video{i}", video(folder / f"video{i}.mp4", colour(i), 1 + i % 4), (Caption(text),)))
    pack(items, folder / "test", dataset="small", split="test", profile=Profile(short_side=SIDE), workers=1)


def score(texts: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
    return texts @ videos.T


def evaluation(split: Split, **changes) -> Evaluation:
    """Caption 3 finds video 2, whose caption is nearly the same; those of WORST find their videos last."""
    n = len(split)
    video_features = torch.eye(n)
    text_features = 0.5 * torch.eye(n) + 0.1 * torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    for i in WORST:
        text_features[i, i] = -0.5
    text_features[3, 2] = 0.9
    owner = torch.arange(n)
    by_text, by_video = ranks(text_features, video_features, owner, score)
    data = DataConfig(num_frames=3, image_size=SIDE, resize=SIDE, max_words=32, fps=1).filled()
    fields = {
        "split": split, "data": data, "texts": CAPTIONS, "keys": [f"video{i}" for i in range(n)], "video_of_text": owner,
        "text_features": text_features, "video_features": video_features, "score": score, "by_text": by_text, "by_video": by_video,
        "metrics": report(by_text, by_video), "rows": {}, "timings": {"decode_wait": 1.5, "towers": 3.0, "captions": 0.5, "ranking": 0.1},
    }  # fmt: skip
    return Evaluation(**fields | changes)


def make_run(folder: Path) -> Path:
    """A run folder with the curves of 40 steps and two validations."""
    folder.mkdir()
    steps = [
        {"step": i, "train/loss": 5 / i, "train/lr": 1e-4 * i, "step_s": 0.5, "data/wait_s": 0.1} for i in range(1, 41)
    ]
    steps[9]["train/loss"] = None  # a step whose loss was not a number
    evals = [{"step": i, "val/t2v_R1_pct": i, "val/v2t_R1_pct": i / 2} for i in (20, 40)]
    for name, rows in (("metrics.jsonl", steps), ("eval.jsonl", evals)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "torn')
    return folder

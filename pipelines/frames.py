"""Single frames of a packed video as the loader decodes them: what a model is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.frame_sampling import RULES, choose, distinct
from pipelines.stages.fetch import BadSample, Reader
from pipelines.stages.graph import Graph, Plan
from shards import ShardError
from shards.schema import Video
from shards.split import Split
from shards.tar import naming


@dataclass(frozen=True)
class Written:
    """A picture that was written, and the row of the frame table it stands for."""

    file: Path
    position: int
    number: int  # of the frame in the source
    seconds: float


def write_frames(
    split: Split,
    name: str,
    out: Path,
    *,
    rule: str = "uniform",
    num_frames: int = 12,
    fps: int = 1,
    positions: Sequence[int] | None = None,
) -> list[Written]:
    """Write frames of the video called `name` (its id or key) as PNGs into `out`, before any resize.

    The frames are those that `data.sampling=rule` shows a model in testing, with `data.num_frames` and `data.fps`, or those
    at `positions` in the frame table. Files are called NUMBER_SECONDS.png after the frame in the source. Raises ShardError
    if there is no such video or frame, or if it does not decode.
    """
    if rule not in RULES:
        raise ShardError(f"--rule must be one of {', '.join(RULES)}; got {rule!r}")
    for flag, value in (("num-frames", num_frames), ("fps", fps)):
        if value < 1:
            raise ShardError(f"--{flag} {value}: must be at least 1")
    video = split.find(name)
    stored = len(video.frames)
    wanted = choose(video, rule, num_frames, fps) if positions is None else positions
    if not len(wanted) or min(wanted) < 0 or max(wanted) >= stored:
        raise ShardError(f"--positions: {name} has the stored frames 0 to {stored - 1}")
    wanted = distinct(np.asarray(wanted, np.int64))
    try:
        shown = pictures(split, video, wanted)
    except BadSample as error:
        raise ShardError(f"{split.path}: {video.id}: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for position, picture in zip(wanted.tolist(), shown, strict=True):
        number, seconds = int(video.frames.number[position]), float(video.frames.time[position])
        file = out / f"{number:06d}_{seconds:.3f}.png"
        with naming(file):
            Image.fromarray(picture).save(file)
        written.append(Written(file, position, number, seconds))
    return written


def pictures(split: Split, video: Video, positions: np.ndarray) -> list[np.ndarray]:
    """The stored frames at `positions` (increasing), each uint8 RGB [H, W, 3], as the loader decodes them on a CPU.

    Raises BadSample."""
    reader = Reader(split)
    if split.info["profile"]["name"] != "intra":
        return reader.pictures(video, positions).pieces
    pieces = reader.jpegs(video, positions).pieces
    graph = Graph(Plan("jpegs", resize=False, uncropped=True), 0, len(pieces), torch.device("cpu"), 1)
    graph.start(pieces, [])
    return list(graph.result())

"""The DALI graphs that a GPU runs, defined without one: DALI checks every operator and its arguments while it is."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from pipelines.config import CacheConfig, DataConfig
from pipelines.lanes import Lane
from pipelines.stages.graph import Graph, Plan
from tests.pipelines.conftest import SIDE

pytestmark = pytest.mark.slow  # imports DALI

CLIP = DataConfig(num_frames=4, image_size=SIDE)
AUGMENTED = replace(CLIP, random_crop=0.5, flip=0.5, colour=0.2)


@pytest.fixture(autouse=True)
def not_built(monkeypatch):
    """Building takes the device; what is checked is done by then."""
    monkeypatch.setattr(Pipeline, "build", lambda self: None)


@pytest.mark.parametrize(
    "config", [CLIP, replace(CLIP, image_size=SIDE // 2), AUGMENTED], ids=["same size", "resized", "augmented"]
)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_every_lane_of_a_gpu_defines_its_graphs(numbered, tmp_path, profile, cached, config):
    cache = CacheConfig(dir=str(tmp_path), max_gb=0.01) if cached else None
    lane = Lane(getattr(numbered, profile), config, torch.device("cuda", 0), 4, cache=cache, training=True)
    decoders = [lane._decoder, *([lane._augmenter] if lane._augmenter else [])]
    assert len(decoders) == 1 + (cached and config is AUGMENTED)
    for decoder in decoders:
        assert decoder._make()._pipeline.device_id == 0
    assert lane._decoder._plan.source == {"intra": "jpegs", "copy": "files"}[profile]
    lane.close()


@pytest.mark.parametrize(
    "plan", [Plan(*parts) for parts in product(("jpegs", "pictures", "files"), *[(False, True)] * 3)], ids=str
)
def test_every_plan_is_one_that_dali_knows(plan):
    Graph(plan, SIDE, 8, torch.device("cuda", 0), 2)


def test_an_argument_that_dali_does_not_know_is_told_without_a_device(monkeypatch):
    resize = fn.resize
    monkeypatch.setattr(
        "pipelines.stages.graph.fn.resize", lambda *inputs, **named: resize(*inputs, anti_alias=True, **named)
    )
    with pytest.raises(KeyError, match="anti_alias"):
        Graph(Plan("jpegs", resize=True), SIDE, 8, torch.device("cuda", 0), 2)


def test_frames_of_whole_videos_come_one_after_another(monkeypatch):
    """NVDEC gives a clip at a time; the cache and the augmenter take frames."""
    graph = Graph(Plan("files", resize=True, uncropped=True), SIDE, 8, torch.device("cuda", 0), 2)
    clips = [
        np.full((frames, 2, 2, 3), 10 * i, np.uint8) + np.arange(frames, dtype=np.uint8)[:, None, None, None]
        for i, frames in enumerate((3, 2))
    ]
    host = type("Host", (), {"__len__": lambda self: 2, "at": lambda self, i: clips[i]})()
    output = SimpleNamespace(as_cpu=lambda: host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(graph._pipeline, "outputs", lambda stream: (output,))
    assert [int(picture[0, 0, 0]) for picture in graph.result()] == [0, 1, 2, 10, 11]

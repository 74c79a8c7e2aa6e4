"""The DALI graphs that a GPU runs, defined and serialised without one: DALI checks every operator and its arguments meanwhile.

`python -m tests.pipelines.test_gpu_graphs` writes the golden file anew: read what differs in it.
"""

import json
import re
import struct
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.backend import GetSchema
from nvidia.dali.pipeline import Pipeline

from pipelines.config import CacheConfig, DataConfig
from pipelines.lanes import Lane
from pipelines.stages.graph import Graph, Plan
from tests.pipelines.conftest import SIDE

pytestmark = pytest.mark.slow  # imports DALI

CLIP = DataConfig(num_frames=4, image_size=SIDE)
AUGMENTED = replace(CLIP, random_crop=0.5, flip=0.5, colour=0.2)


GOLDEN = Path(__file__).parents[1] / "golden" / "gpu_graphs.json"
PLANS = [
    *(Plan(*parts) for parts in product(("jpegs", "pictures", "files"), *[(False, True)] * 3)),
    *(Plan("jpegs", False, augment=augment, roi=False) for augment in (False, True)),
    *(
        Plan(source, resize, augment=augment, fill=9)
        for source, resize, augment in product(("jpegs", "pictures", "files"), *[(False, True)] * 2)
    ),
    *(
        Plan(source, True, uncropped, interpolation="bilinear")
        for source, uncropped in product(("jpegs", "pictures", "files"), (False, True))
    ),
    Plan("files", True, fill=0, interpolation="bilinear"),
]


@pytest.fixture(autouse=True)
def not_built(monkeypatch):
    """Building takes the device; what is checked is done by then."""
    monkeypatch.setattr(Pipeline, "build", lambda self: None)
    monkeypatch.setattr("pipelines.probe.tried", lambda *_: None)


class WithoutDevice(Pipeline):
    """A pipeline with a GPU's operators that can be serialised where there is no GPU."""

    def __init__(self, **options):
        super().__init__(**options | {"device_id": None})

    def build(self) -> None:
        pass


def operators(plan: Plan, load: float = 0.0) -> list:
    """[name, {argument: value}, inputs with their devices] of each operator, as DALI's runtime is told of it."""
    graph = Graph(plan, SIDE, 8, torch.device("cuda", 0), 2, load)
    found = []
    for operator in (value for number, value in fields(graph._pipeline.serialize()) if number == 5):
        parts = fields(operator)
        ends = [
            " ".join(v.decode() for n, v in fields(part) if n in (1, 2)) for number, part in parts if number in (2, 3)
        ]
        arguments = dict(argument(part) for number, part in parts if number == 4)
        told = {name: value for name, value in arguments.items() if not name.startswith("_")}
        found.append(
            [next(v for n, v in parts if n == 1).decode(), told, [re.sub(r"__\w+?_\d+", "_", end) for end in ends]]
        )
    return found


def argument(part: bytes) -> tuple[str, object]:
    values = fields(part)
    name = next(v for n, v in values if n == 1).decode()
    nested = [argument(v)[1] for n, v in values if n == 7]
    (single,) = [v for n, v in values if n in (3, 4, 5, 6)][:1] or [None]
    if isinstance(single, bytes):
        kind = next(v for n, v in values if n == 2)
        single = round(struct.unpack("<f", single)[0], 6) if kind == b"float" else single.decode()
    return name, nested or single


def fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer."""
    out, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            value: int | bytes = varint()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or varint()
            value, at = message[at : at + size], at + size
        out.append((tag >> 3, value))
    return out


def written() -> str:
    lines = [f" {json.dumps(str(plan))}: {json.dumps(operators(plan))}" for plan in PLANS]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def test_what_dali_is_told_is_what_was_read(monkeypatch):
    monkeypatch.setattr("pipelines.stages.graph.Pipeline", WithoutDevice)
    assert json.loads(written()) == json.loads(GOLDEN.read_text())


def test_jpegs_on_a_gpu_are_decoded_as_the_settings_say(monkeypatch):
    monkeypatch.setattr("pipelines.stages.graph.Pipeline", WithoutDevice)
    (decoder,) = [
        told for name, told, _ in operators(Plan("jpegs", False), load=0.25) if name == "decoders__ImageSlice"
    ]
    assert decoder["device"] == "mixed" and decoder["hw_decoder_load"] == 0.25
    assert decoder["jpeg_fancy_upsampling"] and not decoder["affine"]
    whole = operators(Plan("jpegs", False, roi=False))
    assert sorted(name for name, _, _ in whole) == ["ExternalSource", "ExternalSource", "Slice", "decoders__Image"]
    assert all(told["device"] == "gpu" for name, told, _ in whole if name == "Slice")


def test_facts_that_the_graphs_rely_on():
    for name in ("decoders__Image", "decoders__ImageSlice", "decoders__Video"):
        assert "mixed" in GetSchema(name).GetSupportedBackends(), name
    for name in ("Resize", "Flip", "ColorTwist"):
        assert GetSchema(name).AllowsSequences() and "gpu" in GetSchema(name).GetSupportedBackends(), name
    assert GetSchema("decoders__Video").IsTensorArgument("frames")
    assert GetSchema("decoders__ImageSlice").IsTensorArgument("shape")


@pytest.mark.parametrize(
    "config",
    [CLIP, replace(CLIP, image_size=SIDE // 2), AUGMENTED, replace(CLIP, resize_mode="squash", interpolation="bilinear"),
     replace(CLIP, resize_mode="longest"), replace(AUGMENTED, resize_mode="longest", fill=9)],
    ids=["same size", "resized", "augmented", "squashed", "filled", "filled and augmented"],
)  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_every_lane_of_a_gpu_defines_its_graphs(numbered, tmp_path, profile, cached, config):
    cache = CacheConfig(dir=str(tmp_path), max_gb=0.01) if cached else None
    lane = Lane(getattr(numbered, profile), config, torch.device("cuda", 0), 4, cache=cache, training=True)
    decoders = [lane._decoder, *([lane._augmenter] if lane._augmenter else [])]
    assert len(decoders) == 1 + (cached and config.random_crop > 0)
    for decoder in decoders:
        assert decoder.make(decoder._plan)._pipeline.device_id == 0
    assert lane._decoder._plan.source == {"intra": "jpegs", "copy": "files"}[profile]
    lane.close()


@pytest.mark.parametrize("plan", PLANS, ids=str)
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
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(graph._pipeline, "outputs", lambda stream: (output,))
    assert [int(picture[0, 0, 0]) for picture in graph.result()] == [0, 1, 2, 10, 11]


if __name__ == "__main__":
    Graph.__init__.__globals__["Pipeline"] = WithoutDevice
    GOLDEN.write_text(written())

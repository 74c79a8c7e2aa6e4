"""What a GPU's decoders are given, and what becomes of their errors, without a GPU."""

import io
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from pipelines import lanes
from pipelines.chain import Stream
from pipelines.config import DataConfig
from pipelines.lanes import Lane
from pipelines.loader import Loader
from pipelines.requests import BatchPlan, ClipRequest
from pipelines.stages import decode, nvdec
from pipelines.stages.decode import Decoder
from pipelines.stages.fetch import BadSample, Source
from pipelines.stages.graph import DeviceError, Graph, GraphError, Plan
from pipelines.stages.nvdec import only_frames, why_not
from pipelines.stats import Stats
from shards.schema import Coding, FrameTable, Video
from tests.pipelines.test_loader import SMALL
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI

CUDA = torch.device("cuda", 1)


def video(frames: int = 20, low: int = 0, **other) -> Video:
    """A row of the sample table that NVDEC is good for, but for what is said."""
    numbers = np.arange(frames, dtype=np.int32) - low
    table = FrameTable(numbers, numbers / 25, np.arange(frames) * 9, np.full(frames, 9), numbers == 0, numbers)
    coding = Coding(pix_fmt="yuv420p", width=320, height=240)
    row = SimpleNamespace(
        index=0, id="v", ext="mp4", codec="h264", width=320, height=240, rotation=0, mirrored=False,
        source_frames=frames - low, coding=coding, frames=table, extradata=b"frames",
    )  # fmt: skip
    for name, value in other.items():
        if name in ("pix_fmt", "colorspace", "color_range", "color_trc"):
            row.coding = replace(row.coding, **{name: value})
        else:
            setattr(row, name, value)
    row.inside = Video.inside.fget(row)
    return row


ODD = {
    "turned": ({"rotation": 90}, "turned"),
    "mirrored": ({"mirrored": True}, "mirrored"),
    "an old codec": ({"codec": "mpeg4"}, "codec mpeg4"),
    "another container": ({"ext": "avi"}, "container avi"),
    "wide pixels": ({"width": 400}, "not square"),
    "ten bits": ({"pix_fmt": "yuv420p10le"}, "pixel format yuv420p10le"),
    "no subsampling": ({"pix_fmt": "yuv444p"}, "pixel format"),
    "BT.709": ({"colorspace": 1}, "BT.601"),
    "full range": ({"color_range": 2}, "limited range"),
    "HDR": ({"color_trc": 16}, "BT.601"),
    "an edit list": ({"low": 4}, "edit list"),
    "an edit list's end": ({"source_frames": 15}, "edit list"),
    "small HEVC": ({"codec": "hevc", "width": 160, "height": 120, "coding": Coding(pix_fmt="yuv420p", width=160, height=120)}, "160x120"),
    "large H.264": ({"width": 4098, "height": 240, "coding": Coding(pix_fmt="yuv420p", width=4098, height=240)}, "4098x240"),
    "not whole macroblocks": ({"height": 232, "coding": Coding(pix_fmt="yuv420p", width=320, height=232)}, "320x232"),
    "AV1": ({"codec": "av1"}, "codec av1"),
    "VP9": ({"codec": "vp9"}, "codec vp9"),
    "fields": ({"extradata": b"fields"}, "fields"),
    "unknown": ({"coding": None}, "size unknown"),
}  # fmt: skip


@pytest.fixture
def extradata_says(monkeypatch):
    monkeypatch.setattr(nvdec, "only_frames", lambda extradata: extradata == b"frames")


@pytest.mark.parametrize(("what", "said"), ODD.values(), ids=ODD)
def test_nvdec_is_given_no_odd_video(extradata_says, what, said):
    assert said in why_not(video(**what))


@pytest.mark.parametrize("what", [{}, {"codec": "hevc"}, {"ext": "mkv"}, {"colorspace": 6}, {"colorspace": 5}])
def test_nvdec_is_given_usual_videos(extradata_says, what):
    assert why_not(video(**what)) is None


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("pipelines.probe.tried", lambda *_: None)
    monkeypatch.setattr(Pipeline, "build", lambda self: None)


def test_odd_videos_come_from_the_cpu_ready(numbered, no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    lane = Lane(numbered.copy, SMALL, CUDA, 4, training=True)
    kinds = {}
    for index in range(len(numbered.copy)):
        stored = numbered.copy.video(index)
        request = ClipRequest(stored, np.zeros(1, np.int64))
        plan = BatchPlan(0, 1, 1)
        plan.add(request)
        kinds[stored.id] = lane._source(plan.samples[0]).ready
    lane.close()
    assert {name for name, ready in kinds.items() if not ready} == {"mkv_square"}, "the others are no whole macroblocks"


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({}, True),
        ({"profile": "baseline"}, True),
        ({"profile": "high", "preset": "slow", "level": "4.2"}, True),
        ({"x264-params": "interlaced=1"}, False),
    ],
    ids=["main", "baseline", "high", "interlaced"],
)
def test_fields_are_told_by_the_header(options, frames, format):
    data = encode(4, size=(320, 240), options=options, format=format)
    with av.open(io.BytesIO(data)) as file:
        assert only_frames(bytes(file.streams.video[0].codec_context.extradata)) == frames


@pytest.mark.parametrize("extradata", [b"", b"\1", b"\0\0\0\1\x67\x64", bytes(40), b"\1" + b"\xff" * 30])
def test_a_header_that_does_not_say_is_no(extradata):
    assert not only_frames(extradata)


class FakeGraph:
    """Makes a frame of each piece whose pixels are the piece's first byte. A byte of 13 it does not decode."""

    made: list["FakeGraph"]

    def __init__(self, plan: Plan, units: int):
        self.plan, self.units, self.runs = plan, units, []

    def start(self, pieces, views, sizes, positions):
        assert len(pieces) <= self.units and len(views) == len(pieces)
        self.runs.append(len(pieces))
        self._pieces, self._positions = pieces, positions

    def result(self):
        if self.plan.source == "files":
            if any(piece.flat[0] == 13 for piece in self._pieces):
                raise GraphError("13 is not a video")
            return [
                torch.full((len(p), 2, 2, 3), int(piece.flat[0]), dtype=torch.uint8)
                for piece, p in zip(self._pieces, self._positions, strict=True)
            ]
        return torch.stack([torch.full((2, 2, 3), int(piece.flat[0]), dtype=torch.uint8) for piece in self._pieces])


@pytest.fixture
def graphs(monkeypatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    def make(self, plan):
        units = self.units if plan == self._plan else 100
        made.append(FakeGraph(plan, units))
        return made[-1]

    monkeypatch.setattr(Decoder, "make", make)
    return made


def decoded(samples: list, otherwise=None, clips: int = 4) -> list:
    decoder = Decoder(
        Plan("files", True, augment=True), DataConfig(num_frames=3), clips, clips, CUDA, 2, otherwise=otherwise
    )
    stream = Stream(iter(samples), None, "read_s", Stats())
    out = []
    for group in decoder(stream):
        out += [
            (s.request.video.id, None if s.frames is None else int(s.frames[0].flatten()[0]), s.error) for s in group
        ]
    return out


def samples(*kinds: str, size: tuple[int, int] = (320, 240)) -> list:
    """f: a file, p: pictures, r: ready, x: a file that does not decode."""
    plan, positions = BatchPlan(0, len(kinds), len(kinds)), np.arange(3)
    for number, kind in enumerate(kinds):
        plan.add(ClipRequest(video(id=f"{number}{kind}", width=size[0], height=size[1]), positions))
        pixel = np.full((2, 2, 3), 13 if kind == "x" else number + 1, np.uint8)
        of_kind = {"f": [pixel], "x": [pixel], "p": [pixel] * 3, "r": [np.stack([pixel] * 3)]}
        plan.samples[-1].source = Source(of_kind[kind], positions, ready=kind == "r", pictures=kind == "p")
    return plan.samples


def test_files_and_pictures_of_a_group_keep_their_order(graphs):
    out = decoded(samples("f", "p", "r", "f", "p", "f"))
    assert [pixel for _, pixel, _ in out] == [1, 2, 3, 4, 5, 6]
    assert {graph.plan.source for graph in graphs} == {"files", "pictures"}
    assert all(graph.plan.augment for graph in graphs), "pictures are augmented alike"


def test_what_nvdec_rejects_is_decoded_by_the_cpu(graphs):
    def otherwise(sample):
        pixel = np.full((2, 2, 3), 77, np.uint8)
        return Source([pixel] * 3, sample.source.positions, pictures=True)

    out = decoded(samples("f", "x", "f"), otherwise)
    assert [(pixel, error) for _, pixel, error in out] == [(1, None), (77, None), (3, None)]


def test_a_gpu_that_decodes_nothing_is_no_fault_of_the_clips(graphs):
    with pytest.raises(
        DeviceError, match=r"the GPU decodes none of 8 clips: .*13 is not a video\. Try data\.decode=cpu"
    ):
        decoded(samples(*"xxxxxxxx"), clips=8)


@pytest.mark.parametrize("broken", [False, True])
def test_what_nvdec_says_of_broken_videos_too_counts_with_a_broken_gpu_only(monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("CUDA driver API error CUDA_ERROR_UNKNOWN (999)")

    graph = Graph(Plan("pictures", True), 8, 1, torch.device("cpu"), 1)
    graph._device = CUDA
    monkeypatch.setattr(Pipeline, "outputs", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if broken else lambda device: None)
    with pytest.raises(DeviceError if broken else GraphError):
        graph.result()


def test_a_video_that_nvdec_rejected_is_not_given_to_it_again(numbered, no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    lane = Lane(numbered.copy, SMALL, CUDA, 4, training=True)
    plan = BatchPlan(0, 1, 1)
    plan.add(ClipRequest(numbered.copy.find("mkv_square"), np.zeros(1, np.int64)))
    sample = plan.samples[0]
    sample.source = lane._source(sample)
    assert not sample.source.ready
    assert lane._decoded_on_cpu(sample).ready and lane._source(sample).ready
    lane.close()


def test_what_neither_decodes_is_bad(graphs):
    def otherwise(sample):
        raise BadSample("the CPU cannot either")

    out = decoded(samples("f", "x", "f"), otherwise)
    assert [pixel for _, pixel, _ in out] == [1, None, 3]
    assert [str(error) for _, _, error in out if error] == ["the CPU cannot either"]


def test_a_group_on_a_gpu_is_bounded_by_bytes(graphs, monkeypatch):
    monkeypatch.setattr(decode, "_GPU_BYTES", 2 * 3 * 1920 * 1080 * 3)  # two clips of three frames
    assert len(decoded(samples(*"fffff", size=(1920, 1080)))) == 5
    assert max(run for graph in graphs for run in graph.runs) == 2
    graphs.clear()
    decoded(samples(*"ffff", size=(320, 240)))
    assert max(run for graph in graphs for run in graph.runs) == 4, "small ones fill the graph"


ERRORS = [
    ("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", DeviceError),
    (
        "Critical error in pipeline:\nError in mixed operator `nvidia.dali.fn.decoders.image`\nCUDA allocation failed",
        DeviceError,
    ),
    ("Can't allocate 1048576 bytes on device 0.", DeviceError),
    ("CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700):\nan illegal memory access was encountered", DeviceError),
    ("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2)", DeviceError),
    ("std::bad_alloc", DeviceError),
    ("CUDA error: device-side assert triggered", DeviceError),
    ("Error in mixed operator\nError 801 CUDA_ERROR_NOT_SUPPORTED: this video's format", GraphError),
    ("Video is too small in at least one dimension. Provided: 32x32 vs supported: 144x144", GraphError),
    ("nvJPEG error: bad JPEG", GraphError),
]


@pytest.mark.parametrize(("text", "kind"), ERRORS)
def test_whose_fault_an_error_is(monkeypatch, text, kind):
    graph = Graph(Plan("pictures", True), 8, 1, torch.device("cpu"), 1)

    def fail(self, stream=None):
        raise RuntimeError(text)

    monkeypatch.setattr(Pipeline, "outputs", fail)
    with pytest.raises(kind) as caught:
        graph.result()
    assert type(caught.value) is kind


def test_an_error_of_the_device_blames_no_video(monkeypatch, numbered, tmp_path):
    def fail(self, stream=None):
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")

    monkeypatch.setattr(Pipeline, "outputs", fail)
    listed = tmp_path / "quarantine.jsonl"
    told = pytest.raises(DeviceError, match="the GPU failed while it decoded frames: CUDA runtime API error")
    with Loader(numbered.intra, SMALL, batch_size=4, seed=0, quarantine=listed) as loader, told:
        next(loader.batches())
    assert not listed.exists()


def test_outputs_are_given_back_in_the_order_of_the_devices_own_stream(no_gpu, monkeypatch):
    asked: list = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or "stream")

    def outputs(self, stream):
        asked.append(stream)
        raise RuntimeError("enough")

    monkeypatch.setattr(Pipeline, "outputs", outputs)
    graph = Graph(Plan("jpegs", False), 8, 1, torch.device("cuda", 3), 1)
    with pytest.raises(GraphError, match="enough"):
        graph.result()
    assert asked == [torch.device("cuda", 3), "stream"]


@pytest.mark.parametrize(("cores", "threads"), [(16, 14), (4, 4), (1, 1)])
def test_threads_beside_a_gpu_leave_two_cores(monkeypatch, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert lanes._threads(torch.device("cuda", 0)) == threads
    assert lanes._threads(torch.device("cpu")) == cores

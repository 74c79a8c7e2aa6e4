"""Into the batches of a GPU, without one: the same frames as on a CPU, and nothing that waits for the device."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.requests import BatchPlan
from pipelines.stages import transfer
from pipelines.stages.collate import Collate
from pipelines.stages.transfer import Transfer
from pipelines.workers import Workers
from tests.pipelines.test_loader import SMALL

pytestmark = pytest.mark.slow  # imports DALI

SIDE, FRAMES = 4, 3
SMALLEST = DataConfig(num_frames=FRAMES, image_size=SIDE)


class Event:
    """A CUDA event that has happened, or will when it is waited for."""

    def __init__(self, log: list, done: bool = True):
        self._log, self._done = log, done

    def record(self, stream=None) -> None:
        self._log.append("recorded")

    def query(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        self._log.append("waited")


@pytest.fixture
def no_gpu(monkeypatch) -> list:
    """Memory is not pinned, and events only write down what was asked of them."""
    log: list[str] = []
    monkeypatch.setattr(transfer, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(transfer, "recorded", lambda device: Event(log))
    monkeypatch.setattr("pipelines.stages.collate.recorded", lambda device: Event(log))
    return log


@pytest.fixture
def workers():
    made = Workers(2, "test")
    yield made
    made.close()


def plan_of(
    shown: list[list[int]], rows: int, device: str, shared: bool = True, host: tuple[int, ...] = ()
) -> BatchPlan:
    """A batch whose clips show these of their frames, decoded into one tensor or each into its own, or in memory."""
    plan = BatchPlan(0, rows, len(shown))
    many = [max(numbers) + 1 if numbers else 1 for numbers in shown]
    pixels = np.arange(sum(many) * SIDE * SIDE * 3, dtype=np.uint8).reshape(-1, SIDE, SIDE, 3)
    whole, first = torch.from_numpy(pixels).to(device), 0
    for number, (wanted, count) in enumerate(zip(shown, many, strict=True)):
        plan.add(SimpleNamespace(positions=np.array(wanted, np.int64)))
        sample = plan.samples[-1]
        sample.positions = np.arange(count)
        frames = whole[first : first + count]
        sample.frames = pixels[first : first + count] if number in host else frames if shared else frames.clone()
        first += count
    return plan


def expected(plan: BatchPlan) -> np.ndarray:
    out = np.zeros((plan.rows, FRAMES, SIDE, SIDE, 3), np.uint8)
    for sample in plan.samples:
        out[sample.row, : len(sample.request.positions)] = np.asarray(sample.frames)[sample.request.positions]
    return out


SHOWN = {
    "all in order": [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
    "some empty": [[0, 1], [0, 1, 2], [0]],
    "twice and backwards": [[2, 0, 0], [0, 1, 2], [1, 1, 1]],
    "one": [[0, 1, 2]],
}


@pytest.mark.parametrize("host", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_every_frame_comes_to_its_place(no_gpu, workers, shown, shared, host):
    plan = plan_of(shown, 4, "cpu", shared, host)
    wanted = expected(plan)
    frames = torch.zeros(4, FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    Transfer(torch.device("cpu"), workers).write(frames, plan.samples)
    assert np.array_equal(frames.numpy(), wanted)


def test_rows_need_not_be_in_order(no_gpu, workers):
    plan = plan_of([[0, 1, 2], [0, 1, 2], [0]], 5, "cpu")
    for sample, row in zip(plan.samples, (4, 0, 2), strict=True):
        sample.row = row
    wanted = expected(plan)
    frames = torch.zeros(5, FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    Transfer(torch.device("cpu"), workers).write(frames, plan.samples)
    assert np.array_equal(frames.numpy(), wanted)


def test_frames_are_held_until_they_are_read(monkeypatch, workers):
    log: list[str] = []
    monkeypatch.setattr(transfer, "recorded", lambda device: Event(log, done=False))
    writer = Transfer(torch.device("cpu"), workers)
    frames = torch.zeros(1, FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    for _ in range(4):
        writer.write(frames, plan_of([[0, 1, 2]], 1, "cpu").samples)
    assert len(writer._held) == 2 and log == ["waited", "waited"], "of two groups, then the oldest is waited for"
    writer._held[0][0]._done = writer._held[1][0]._done = True
    writer.write(frames, plan_of([[0, 1, 2]], 1, "cpu").samples)
    assert len(writer._held) == 1 and log == ["waited", "waited"]
    writer.close()
    assert not writer._held and log == ["waited", "waited", "waited"]


SYNCHRONISING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class Copies(TorchDispatchMode):
    """Notes copies between devices that wait, and reads of values that are on a device."""

    def __init__(self):
        super().__init__()
        self.blocking: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name()
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            target = args[0].device if name == "aten::copy_" else torch.device(kwargs.get("device") or source.device)
            async_ = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
            if source.device.type != target.type and not async_:
                self.blocking.append(name)
        elif name in SYNCHRONISING and any(t.device.type == "cuda" for t in tensors):
            self.blocking.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_nothing_waits_for_the_gpu(no_gpu, workers, shown, raw):
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        plan = plan_of(shown, 4, "cuda:1")
        copies.blocking.clear()
        collate = Collate(SMALLEST, torch.device("cuda", 1), workers, raw)
        collate._normalise.pixels._on[torch.device("cuda", 1)] = (
            torch.ones(3, device="cuda:1"),
            torch.ones(3, device="cuda:1"),
        )
        (made,) = collate(iter([plan.samples]))
        assert copies.blocking == []
        shape = (4, FRAMES, SIDE, SIDE, 3) if raw else (4, FRAMES, 3, SIDE, SIDE)
        assert made.frames.device == torch.device("cuda", 1) and made.frames.shape == shape
        assert made.frames.dtype == (torch.uint8 if raw else torch.float32)
        made.frames.cpu()
        assert copies.blocking == ["aten::_to_copy"], "the check itself sees a copy that waits"


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_batches_of_a_gpu_are_those_of_a_cpu(no_gpu, numbered, profile, raw):
    """With the GPU's half of the chain at work on a CPU's memory."""
    split = getattr(numbered, profile)

    def batches(of_a_gpu: bool) -> list[torch.Tensor]:
        with Loader(split, SMALL, batch_size=5, seed=3, raw=raw) as loader:
            collate = loader._lane._collate
            if of_a_gpu:
                collate._transfer = Transfer(torch.device("cpu"), loader._lane._workers)
            return [batch.frames.clone() for batch in loader.batches(count=loader.steps_per_epoch + 1)]

    for here, there in zip(batches(False), batches(True), strict=True):
        assert here.shape == there.shape
        torch.testing.assert_close(there, here, rtol=0, atol=0 if raw else 1e-6)


def test_a_video_without_enough_frames_leaves_zeros(no_gpu, numbered):
    with Loader(numbered.intra, replace(SMALL, num_frames=8), batch_size=12, seed=0) as loader:
        loader._lane._collate._transfer = Transfer(torch.device("cpu"), loader._lane._workers)
        batch = next(loader.batches())
        empty = ~batch.frame_mask
        assert empty.any() and not batch.frames[empty].any() and batch.frames[batch.frame_mask].any()


def test_the_thread_of_a_loader_has_its_own_stream_on_its_device(monkeypatch, numbered):
    asked: list = []
    stream = object()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: asked.append("made") or stream)
    transfer.loader_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "set_stream", lambda one: asked.append(one))
    monkeypatch.setattr("pipelines.probe.tried", lambda *_: None)
    loader = Loader(numbered.intra, SMALL, batch_size=4, seed=0)
    loader._lane._device = torch.device("cuda", 3)
    loader._lane.use_device()
    loader._lane.use_device()
    device = torch.device("cuda", 3)
    assert asked == [device, "made", stream, device, stream]
    transfer.loader_stream.cache_clear()
    loader.close()


def test_whoever_takes_a_batch_waits_for_it(monkeypatch):
    asked: list = []
    stream = SimpleNamespace(wait_event=lambda event: asked.append(event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or stream)
    tensor = SimpleNamespace(device=torch.device("cuda", 2), record_stream=lambda one: asked.append(one))
    transfer.handed_over("event", tensor, tensor)
    assert asked == [torch.device("cuda", 2), "event", stream, stream]
    transfer.handed_over(None, tensor)  # of a CPU
    assert len(asked) == 4

"""The parts of bench/gpu.py, on a CPU: what they time, what they compare, and what they make of a profile."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.gpu_parts import card, clock, corruption, decode, lanes, predicted, profile, report, rivals, step, train
from bench.gpu_parts.parts import Given, Missing
from c4c.models import compiled
from c4c.training.metric_log import Metrics
from c4c.training.session import Session
from c4c.zero.snapshot import Saver
from shards.demo import shapes
from shards.packing.pack import pack
from shards.video.profiles import Profile

pytestmark = pytest.mark.slow  # imports DALI

CLIPS = 16
TINY = (
    "model.backbone=ViT-demo-16", "data.image_size=64", "data.max_words=24", "engine.precision=fp32", "data.num_frames=2",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Packed as bench/gpu.py packs its clips."""
    folder = tmp_path_factory.mktemp("gpu")
    items = shapes.generate(folder / "source", seed=0, train=CLIPS, test=1, workers=2)
    # one caption each: an epoch is two steps
    train = [replace(item, captions=item.captions[:1]) for item in items["train"]]
    for name in ("intra", "copy"):
        profile = Profile(name=name, short_side=224)
        pack(train, folder / f"{name}-{CLIPS}", dataset="bench", split="train", profile=profile, workers=2)
    return folder


@pytest.fixture
def given(folder, tmp_path):
    return Given(folder, CLIPS, 0.1, 8, TINY, tmp_path / "found.json")


def test_nothing_but_steps_is_timed(given, monkeypatch):
    called = []
    for owner, name in ((Saver, "save"), (Session, "evaluate"), (Metrics, "step"), (Metrics, "validation")):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: called.append(name))
    kept = []
    monkeypatch.setattr(train, "Session", lambda *words: kept.append(Session(*words)) or kept[-1])
    train.training(given)
    (session,) = kept
    assert session.done >= 2 * session.per_epoch, "a trainer would have saved and validated by then"
    assert session.done == given.found["steps"] + clock.WARM["cpu"]
    step.fixed(given)
    assert called == []
    assert given.found["clips_per_s"] == pytest.approx(8 / given.found["mean_s"])
    assert 0 <= given.found["data_wait_pct"] <= 100


def test_the_phases_are_parts_of_the_step(given):
    step.fixed(given)
    phases = given.found["phases_ms"]
    assert all(phases[name] > 0 for name in ("forward", "backward", "step"))
    assert sum(ms for name, ms in phases.items() if name != "whole") == pytest.approx(phases["whole"])


def test_dynamos_counters_stand_beside_a_compiled_step(given, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_cannot_compile", lambda device: "")  # inductor takes minutes
    monkeypatch.setattr(torch._dynamo, "lookup_backend", broken_once(torch._dynamo.lookup_backend))
    torch._dynamo.utils.counters.clear()
    step.fixed(given, words=["engine.compile=true"])
    assert given.found["dynamo"]["stats"]["unique_graphs"] >= 2  # one a tower
    assert given.found["uncompiled"] == ["engine.compile: a part of a tower runs uncompiled (no room for it)"]


def broken_once(real):
    """inductor that fails at the first graph, and leaves the others as they are."""
    graphs = []

    def inductor(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 1:
            raise RuntimeError("no room for it")
        return graph.forward

    return lambda name: inductor if name == "inductor" else real(name)


def test_losses(given):
    train.losses(given, words=["engine.precision=fp32"])
    assert len(given.found["losses"]) == train.LOSS_STEPS
    assert all(0 < loss < 10 for loss in given.found["losses"])


def test_the_cards_ceilings_on_a_cpu(given):
    card.ceilings(given)
    for key in ("tflops_bf16", "tflops_fp32", "tflops_bf16_mlp", "gb_per_s_device_copy"):
        assert len(given.found[key]) == 2 and min(given.found[key]) > 0
    assert "need a GPU" in given.found["left_out_here"]


def test_decoders_are_measured_twice(given):
    decode.jpegs(given, crop="roi", load=0.0, threads=2)
    assert len(given.found["frames_per_s"]) == 2 and min(given.found["frames_per_s"]) > 0
    decode.on_cpu(given, threads=2)
    assert given.found["threads"] == min(2, given.found["threads"]) and not given.found["copied_to_a_gpu"]
    assert min(given.found["frames_per_s"]) > 0


def test_whole_clips_go_through_the_decoder_in_turn(given):
    """Feeds hold every picture once, at most so many at a time."""
    split = decode.split_of(given, "intra")
    feeds = decode.jpeg_feeds(split, decode.requests_of(split, 4), 10)
    pieces = [piece for feed in feeds for piece in feed.arguments[0]]
    assert len(pieces) == sum(feed.frames for feed in feeds)
    assert max(feed.frames for feed in feeds) <= 10 and len(feeds) > 1
    assert all(len(feed.arguments[1]) == feed.frames for feed in feeds)


def test_no_batch_differs_where_nothing_is_corrupt(given):
    corruption.check(given, load=0.0, iterations=2)
    found = given.found
    assert [found[f"{way}_compared"] for way in ("quiet", "held", "released")] == [8, 6, 6]
    assert [found[f"{way}_differ"] for way in ("quiet", "held", "released")] == [0, 0, 0]
    assert found["held_largest_difference_pct"] == 0


def test_batches_that_are_overwritten_behind_the_queue_are_counted(given, monkeypatch):
    """A graph that shuffles frames after the first turn behind the queue, as if the next run had written over them."""
    queued = []
    monkeypatch.setattr(corruption.Queue, "__call__", lambda self: queued.append(1))

    def wrong(*words, **settings):
        graph = decode.graph_of(*words, **settings)
        result = graph.result
        # the queue is called twice when it is made
        graph.result = lambda: result()[::-1].copy() if len(queued) > 3 else result()
        return graph

    monkeypatch.setattr(corruption, "graph_of", wrong)
    corruption.check(given, load=0.0, iterations=3)
    found = given.found
    assert [found[f"{way}_compared"] for way in ("quiet", "held", "released")] == [8, 9, 9]
    assert [found[f"{way}_differ"] for way in ("quiet", "held", "released")] == [0, 6, 9]
    assert found["released_largest_difference_pct"] > 1


def test_the_devices_frames_are_compared_with_the_cpus(given):
    lanes.equal(given, stored="intra")
    assert given.found["psnr_db"] is None  # the same device
    assert 5 < given.found["psnr_of_the_next_frame_db"] < 60


def test_the_loader_alone(given):
    lanes.lane(given, stored="intra")
    assert given.found["frames_per_s"] > 0 and given.found["frames_decoded_per_frame_used"] == pytest.approx(1, abs=0.5)


def test_the_profile_on_a_cpu(given):
    profile.step(given)
    assert given.found["step_s"] > 0 and given.found["launches"] == 0
    assert given.found["operators"][0]["ms"] >= given.found["operators"][-1]["ms"] > 0
    assert "need a GPU" in given.found["left_out_here"]


def test_what_a_profile_of_a_gpu_comes_to():
    spans = [
        profile.Span("nvjet_tst_128x256", 0, 600),
        profile.Span("void at::native::vectorized_elementwise_kernel<4>", 602, 802),  # a launch, no gap
        profile.Span("Memcpy HtoD (Pageable -> Device)", 700, 900),  # beside the kernel
        profile.Span("flash_fwd_kernel", 1000, 1100),
        profile.Span("nvjet_tst_128x256", 1100, 1300),
    ]
    found = profile.on_device(spans, steps=1, step_s=0.002)
    assert found["busy_ms"] == pytest.approx((600 + 298 + 300) / 1000)
    assert found["busy_pct"] == pytest.approx(59.9)
    assert found["kinds_ms"] == pytest.approx(
        {"matrix products": 0.8, "element-wise and reductions": 0.2, "copies": 0.2, "attention": 0.1}
    )
    assert found["matrix_products_ms"] == pytest.approx(0.9) and found["memory_bound_ms"] == pytest.approx(0.2)
    assert next((row["name"], row["calls"]) for row in found["kernels"]) == ("nvjet_tst_128x256", 2)
    assert [row["name"] for row in found["copies"]] == ["Memcpy HtoD (Pageable -> Device)"]
    gaps = found["gaps"]
    assert gaps["calls"] == 1 and gaps["ms"] == pytest.approx(0.1)
    assert gaps["longest"] == [{"us": 100, "after": "Memcpy HtoD (Pageable -> Device)", "before": "flash_fwd_kernel"}]


def test_what_the_host_waits_for():
    spans = [
        profile.Span("cudaLaunchKernel", 0, 5),
        profile.Span("cuLaunchKernelEx", 5, 10),
        profile.Span("cudaStreamSynchronize", 10, 1010),
        profile.Span("cudaStreamSynchronize", 1010, 1510),
        profile.Span("aten::mm", 0, 5),
    ]
    found = profile.on_host(spans, steps=2)
    assert found["launches"] == 1
    assert found["synchronisations"] == {"cudaStreamSynchronize": {"calls": 1.0, "ms": 0.75}}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64", "attention"),
        ("triton_poi_fused__to_copy_convert_element_type_gelu_3", "element-wise and reductions"),
        ("triton_tem_fused_mm_2", "matrix products"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum", "communication"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert profile.kind_of(name) == kind


def test_rivals_that_are_not_installed_are_left_out_with_the_reason():
    with pytest.raises(Missing, match=r"no_such_rival is not installed: pip install rival"):
        rivals.needed("no_such_rival", "rival")
    with pytest.raises(Missing, match=r"bench.no_such_part is not installed"):
        rivals.needed("bench.no_such_part", "rival")


def test_a_rival_that_cannot_be_imported_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "broken_rival.py").write_text("raise RuntimeError('libavcodec.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Missing, match=r"broken_rival cannot be imported: libavcodec.so is missing"):
        rivals.needed("broken_rival", "rival")


def test_a_rivals_rate(given, monkeypatch):
    """Used frames of all clips, whatever the rival decodes."""
    decoded = []
    fake = SimpleNamespace(
        VideoDecoder=lambda data, **_: SimpleNamespace(get_frames_at=lambda wanted: taken(data, wanted))
    )

    def taken(data, wanted):
        decoded.append((len(data), len(wanted)))
        return SimpleNamespace(data=torch.zeros(len(wanted), 3, 8, 8, dtype=torch.uint8))

    monkeypatch.setattr(rivals, "needed", lambda *_: fake)
    rivals.torchcodec(given)
    assert min(given.found["frames_per_s"]) > 0
    assert min(size for size, _ in decoded) > 1000 and {count for _, count in decoded} <= set(range(1, 13))


def test_dalis_reader_takes_what_it_is_given():
    """Without a device, a graph for a GPU can be defined and serialised, not built."""
    assert b"uniform_sample" in rivals.reader_of(["a.mp4", "b.mp4"], None).serialize()


def test_what_the_summary_compares_is_predicted(given):
    predicted.step(given)
    found = given.found
    assert set(report.PREDICTED) <= found.keys() and all(found[key] > 0 for key in report.PREDICTED)
    assert found["gpu"] == "H100" and found["clips_per_s"] == pytest.approx(8 / found["step_s"])


def test_a_gpu_that_the_model_of_the_step_does_not_know_is_no_error(given, monkeypatch):
    started = predicted.started

    @contextmanager
    def on_another(given):
        with started(given) as (config, _):
            yield config, torch.device("cuda", 0)

    monkeypatch.setattr(predicted, "started", on_another)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Frisbee 9000")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 << 30))
    with pytest.raises(Missing, match=r"does not know Frisbee 9000"):
        predicted.step(given)


def test_at_least_so_many_steps_are_timed():
    taken = []
    found = clock.timed(lambda: taken.append(1), 0.0, CPU)
    assert len(taken) == found["steps"] == clock.LEAST["cpu"]
    assert clock.rate_twice(lambda: None, 1.0, 0.0, CPU)[1] > 0

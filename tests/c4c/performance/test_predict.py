"""Seconds and memory from counts that are known: each part by its own arithmetic."""

from dataclasses import asdict, replace

import pytest

from c4c.config import Config, load
from c4c.performance import report
from c4c.performance.assumptions import Assumptions, assume
from c4c.performance.hardware import GPUS, gpu_named
from c4c.performance.predict import MOST_ROWS, largest_batch, predict, shape_of
from c4c.performance.work import Op, StepCounts, Work
from tests.c4c.configs import SHIPPED

H100 = gpu_named("H100")
GIB = 2**30
SPEC = {
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12},
    "text_cfg": {"context_length": 77, "width": 512, "layers": 12},
}
COUNTS = StepCounts(
    spec=SPEC, weights=150_000_000, trained=100_000_000, tensors=300, gathered=100, activations=20 * GIB, features=4096,
    forward=Work((Op(10**12, 10**8, 10), Op(0, 10**9, 20))),
    backward=Work((Op(10**12, 10**8, 20), Op(0, 10**9, 40))),
    scoring=Work((Op(0, 10**8, 5),)),
)  # fmt: skip
ALL_REACHED = assume(["gemm=1", "bandwidth=1", "link=1", "host_link=1", "gap_ms=0", "collective_us=0"])


def config(*words: str) -> Config:
    return load("msrvtt.yaml", words, [SHIPPED])


def predicted(*words: str, gpus: int = 1, cores: int = 64, a: Assumptions = ALL_REACHED, counts=COUNTS, **how):
    return predict(config(*words), H100, gpus, cores, a, counts=counts, **how)


def test_matrix_products_take_their_flops_or_their_bytes():
    assert predicted().seconds.matrix_products == pytest.approx(30e12 / 989e12)
    small = Work((Op(10**6, 10**9, 3),))
    bound = replace(COUNTS, forward=small, backward=small)
    assert predicted(counts=bound).seconds.matrix_products == pytest.approx(6e9 / 3350e9)
    assert predicted(a=replace(ALL_REACHED, gemm=0.5)).seconds.matrix_products == pytest.approx(60e12 / 989e12)
    assert predicted("engine.precision=fp32").seconds.matrix_products == pytest.approx(30e12 / 67e12)


def test_what_torch_compile_leaves():
    assert predicted().seconds.memory_bound == pytest.approx(60.5e9 / 3350e9)
    compiled = predicted("engine.compile=true")
    assert compiled.seconds.memory_bound == pytest.approx((0.3 * 60e9 + 0.5e9) / 3350e9)
    assert compiled.launches == predicted().launches - 42  # 70 % of 60
    # ZeRO 3 fetches weights inside the towers: they are not compiled
    assert (
        predicted("engine.compile=true", "engine.zero_stage=3").seconds.memory_bound == predicted().seconds.memory_bound
    )


def test_gradient_caching_encodes_twice_and_accumulation_once():
    cached = predicted("train.micro_batch_size=32")
    assert (cached.shape.passes, cached.shape.encoded, cached.shape.scored, cached.shape.cached) == (4, 32, 128, True)
    assert cached.flops == (10 * 2 + 20) * 4 * 10**12
    assert cached.seconds.memory_bound == pytest.approx((4 * (20 * 2 + 40) + 2 * 0.5) * 1e9 / 3350e9)
    parts = predicted("train.accumulate=4")
    assert (parts.shape.passes, parts.shape.encoded, parts.shape.scored, parts.shape.cached) == (4, 32, 32, False)
    assert parts.flops == (10 + 20) * 4 * 10**12
    assert parts.seconds.memory_bound == pytest.approx(4 * 60.5 * 1e9 / 3350e9)


@pytest.mark.parametrize(
    ("stage", "moved"),
    [
        (0, 2 * 200e6),  # gradients are reduced, then gathered
        (1, 200e6 + 200e6),  # gradients are reduced, weights gathered
        (2, 200e6 + 200e6),
        (3, 200e6 + 2 * 300e6),  # weights, frozen ones too, are gathered in each pass
    ],
)
def test_rings(stage, moved):
    features = 3 * 128 * 4096  # of the whole batch: gathered, and their gradients reduced and gathered
    words = (f"engine.zero_stage={stage}", "engine.precision=bf16")
    assert predicted(*words, gpus=1).seconds.communication == 0
    here = predicted(*words, gpus=8).seconds.communication
    assert here == pytest.approx((moved + features) * 7 / 8 / 450e9)
    apart = predicted(*words, gpus=16).seconds.communication
    assert apart == pytest.approx((moved + features) * 15 / 16 / 50e9)
    hidden = predicted(*words, gpus=8, a=replace(ALL_REACHED, overlap=0.75)).seconds.communication
    assert hidden == pytest.approx(here / 4)


def test_zero_3_starts_a_collective_for_each_weight_that_it_partitions():
    slow = replace(ALL_REACHED, collective_us=1000.0)
    more = [
        predicted(f"engine.zero_stage={stage}", *words, gpus=8, a=slow).seconds.communication
        - predicted(f"engine.zero_stage={stage}", *words, gpus=8).seconds.communication
        for stage, words in ((2, ()), (3, ()), (3, ("train.micro_batch_size=4",)))
    ]
    # forward and backward; cached, forward twice
    assert more == pytest.approx([0.008, 0.008 + 0.2, 0.008 + 0.1 * 3 * 4])


def test_the_optimizer_is_partitioned():
    alone = predicted("engine.zero_stage=1", gpus=8, a=ALL_REACHED).seconds.optimizer
    whole = predicted("engine.zero_stage=0", gpus=8).seconds.optimizer
    assert whole == pytest.approx(100e6 * (28 + 12 + 2) / 3350e9)
    assert alone == pytest.approx(100e6 * ((28 + 12 + 2) / 8 + 4) / 3350e9)
    assert predicted("engine.zero_stage=1", "engine.offload=optimizer", gpus=8).seconds.optimizer > 10 * whole


@pytest.mark.parametrize(
    ("words", "weights", "masters", "moments", "gradients"),
    [
        (("engine.zero_stage=0",), 300e6, 400e6, 800e6, 200e6),
        (("engine.zero_stage=1",), 300e6, 100e6, 200e6, 200e6),
        (("engine.zero_stage=2",), 300e6, 100e6, 200e6, 50e6),
        (("engine.zero_stage=3",), 75e6 + 300e6, 100e6, 200e6, 50e6),  # all weights fit in what it may gather
        (("engine.zero_stage=0", "engine.precision=fp32"), 600e6, 0, 800e6, 400e6),
        (("engine.zero_stage=2", "engine.precision=fp32"), 600e6, 100e6, 200e6, 100e6),
        (("engine.zero_stage=2", "engine.offload=optimizer"), 300e6, 0, 0, 50e6),
    ],
)
def test_memory_by_stage(words, weights, masters, moments, gradients):
    memory = predicted(*words, gpus=4).memory
    found = [memory.weights, memory.masters, memory.moments, memory.gradients]
    assert [n * GIB for n in found] == pytest.approx([weights, masters, moments, gradients])


def test_memory_of_a_batch():
    memory = predicted().memory
    assert memory.activations == 20
    assert memory.frames * GIB == 4 * 128 * 12 * 3 * 224 * 224
    assert memory.decoder == 1 and predicted(decoder="cpu").memory.decoder == 0
    found = predicted()
    assert found.memory_gib == pytest.approx(sum(asdict(memory).values())) and found.fits
    assert not predicted(counts=replace(COUNTS, activations=80 * GIB)).fits


def test_buffers_follow_deepspeeds_settings():
    assert predicted("engine.zero_stage=2", gpus=2).memory.buffers * GIB == pytest.approx(1e9)
    assert predicted("engine.zero_stage=2").memory.buffers == 0  # one rank runs without ZeRO
    small = predicted("engine.zero_stage=2", "deepspeed.zero_optimization.reduce_bucket_size=1000000")
    assert small.memory.buffers * GIB == pytest.approx(2e6)


def test_the_step_waits_for_the_slowest_of_gpu_host_and_loader():
    fast = predicted()
    assert fast.step_s == fast.compute_s == pytest.approx(sum(asdict(fast.seconds).values()))
    assert (fast.limit, fast.loader_keeps_up) == ("matrix_products", True)
    slow = predicted(cores=3, decoder="cpu")
    decoding = 128 * 12 * 256 * 256 * 4 / 3 / 143e6
    assert slow.step_s == slow.loader_s["jpeg_decoding"] == pytest.approx(decoding)
    assert (slow.limit, slow.loader_keeps_up) == ("jpeg_decoding", False)
    assert slow.loader_margin == pytest.approx(fast.compute_s / decoding)
    assert slow.clips_per_s == pytest.approx(128 / decoding)
    host = predicted(a=replace(ALL_REACHED, launch_us=1000.0))
    assert host.step_s == host.launch_s == pytest.approx(host.launches / 1000)
    assert host.limit == "launches"


def test_the_loaders_stages():
    assert predicted(decoder="cpu").loader_s["copies"] == pytest.approx(128 * 12 * 3 * 224 * 224 / 64e9)
    video = predicted("data.lane=video").loader_s["video_decoding"]
    assert video == pytest.approx(128 * 12 * 19 * 320 * 240 / (7 * 640 * 1920 * 1080 * 0.5))
    on_cpu = predicted("data.lane=video", decoder="cpu", cores=12).loader_s["video_decoding"]
    assert on_cpu == pytest.approx(128 * 12 * 19 * 320 * 240 / (10 * 160e6))
    cached = predicted("cache.dir=/dev/shm/frames")
    assert cached.loader_s.keys() == {"loader_python", "cache_reads", "copies"} and cached.memory.decoder == 0


def test_no_more_cores_decode_than_data_threads():
    decoding = 128 * 12 * 256 * 256 * 4 / 3 / 143e6
    for threads, cores in ((0, 62), (4, 4), (62, 62), (500, 62)):
        found = predicted(f"data.threads={threads}", decoder="cpu").loader_s["jpeg_decoding"]
        assert found == pytest.approx(decoding / cores)


@pytest.mark.parametrize("size", ["-9000000000", "0", "abc", "1.5", "true", "null"])
def test_bucket_sizes_that_deepspeed_refuses(size):
    with pytest.raises(ValueError, match=r"^deepspeed.zero_optimization.reduce_bucket_size=.*must be a whole number"):
        shape_of(config(f"deepspeed.zero_optimization.reduce_bucket_size={size}"), 2)


def test_torchs_adam_without_bias_correction_is_refused_as_in_training():
    asked = "deepspeed.optimizer.params.torch_adam=true"
    shape_of(config(asked), 1)
    with pytest.raises(ValueError, match=r"train\.bias_correction=false is not possible with .*torch_adam=true\)"):
        shape_of(config(asked, "train.bias_correction=false"), 1)


def test_mfu_is_that_of_training():
    found = predicted()
    useful = 128 * 335e9  # forward and backward of a pair of 12 frames and 77 words
    assert found.mfu_pct == pytest.approx(100 * useful / found.step_s / 989e12, rel=0.02)
    several = predicted(gpus=8)
    assert several.mfu_pct == pytest.approx(100 * useful / 8 / several.step_s / 989e12, rel=0.02)
    assert several.clips_per_s == pytest.approx(128 / several.step_s)


@pytest.mark.parametrize("word", ["train.freeze_layers=12", "train.freeze=[text,video]"])
def test_frozen_towers_do_not_count_as_trained_in_the_mfu(word):
    whole, frozen = predicted(), predicted(word)
    assert frozen.mfu_pct < whole.mfu_pct < 100


def test_the_largest_batch_fits_and_the_next_does_not():
    first, settings = predicted(), config()

    def fits(rows: int) -> bool:
        counts = replace(COUNTS, activations=rows * GIB)
        shape = config(f"train.batch_size={rows}")
        return predict(shape, H100, 1, 16, ALL_REACHED, counts=counts).fits

    most = largest_batch(settings, H100, first, COUNTS, lambda rows: rows * GIB, ALL_REACHED)
    assert fits(most) and not fits(most + 1)
    assert 60 < most < 80
    assert largest_batch(settings, H100, first, COUNTS, lambda rows: 100 * GIB, ALL_REACHED) == 0
    assert (
        largest_batch(settings, gpu_named("B200"), first, COUNTS, lambda rows: 0, replace(ALL_REACHED, in_flight=0))
        == MOST_ROWS
    )


@pytest.mark.parametrize(
    "words", [["train.micro_batch_size={}"], ["train.micro_batch_size={}", "data.num_frames=30"]], ids=["few", "many"]
)
def test_how_many_a_rank_encodes_at_once_of_a_batch_that_is_cut(words):
    """All frames of its share are there, however few it encodes at once."""

    def cut(encoded: int):
        counts = replace(COUNTS, activations=encoded * GIB // 4)
        return predicted("train.batch_size=2048", *(w.format(encoded) for w in words), counts=counts)

    settings = config("train.batch_size=2048", *(w.format(64) for w in words))
    most = largest_batch(settings, H100, cut(64), COUNTS, lambda encoded: encoded * GIB // 4, ALL_REACHED)
    assert cut(most).fits and not cut(most + 1).fits
    assert cut(most).shape.cached and 100 < most < 270
    assert largest_batch(settings, H100, cut(64), COUNTS, lambda encoded: 0, ALL_REACHED) == 2048
    assert "2048 pairs at once, which are all of a rank's" in report.text(cut(64), 2048, settings, ALL_REACHED)


def test_how_many_a_rank_encodes_at_once_where_it_accumulates():
    first = predicted("train.batch_size=2048", "train.accumulate=16")
    settings = config("train.batch_size=2048", "train.accumulate=16")
    most = largest_batch(settings, H100, first, COUNTS, lambda encoded: encoded * GIB // 4, ALL_REACHED)
    memory = replace(first.memory, activations=most / 4)
    assert 0 <= first.usable_gib - sum(asdict(memory).values()) < 0.25


def test_batches_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match="does not divide by 3 ranks"):
        shape_of(config(), 3)


def test_a_report_names_every_part_that_takes_time():
    found = predicted("train.micro_batch_size=32", gpus=2)
    text = report.text(found, 77, config("train.micro_batch_size=32"), ALL_REACHED)
    for name, seconds in asdict(found.seconds).items():
        if seconds:
            line = next(line for line in text.splitlines() if line.startswith(f"  {name.replace('_', ' ')} "))
            assert f"{seconds * 1e3:.1f} ms" in line
    assert "32 at once (gradient caching)" in text and "encode 77 pairs at once" in text
    assert "does not fit" not in text
    assert "does not fit" in report.text(
        predicted(counts=replace(COUNTS, activations=80 * GIB)), 0, config(), ALL_REACHED
    )


def test_shares_are_of_the_step_that_is_printed():
    found = predicted(cores=3, decoder="cpu")
    lines = report.text(found, 77, config(), ALL_REACHED).splitlines()
    (decoding,) = (line for line in lines if line.startswith("  jpeg decoding"))
    assert found.limit == "jpeg_decoding" and decoding.endswith(" 100 %")
    assert all(int(line.split()[-2]) <= 100 for line in lines if line.endswith(" %") and line.startswith("  "))


def test_a_table_has_a_line_for_each_gpu():
    found = [(predict(config(), gpu, 2, 16, counts=COUNTS), i) for i, gpu in enumerate(GPUS)]
    lines = report.table(found, config()).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("GPU"))
    for (prediction, most), line in zip(found, lines[head + 1 :], strict=False):
        cells = line.split()
        assert cells[0] == prediction.gpu and cells[2] == f"{prediction.clips_per_s:.0f}"
        assert cells[6] == ("yes" if prediction.fits else "NO") and cells[7] == str(most)

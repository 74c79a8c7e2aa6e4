"""Where a training step's time and a rank's memory go, predicted from counts, data sheets and assumptions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

from c4c.config import Config
from c4c.performance.assumptions import Assumptions
from c4c.performance.hardware import Gpu
from c4c.performance.loading import loader_seconds
from c4c.performance.work import StepCounts, Work
from c4c.zero.config import TORCH_ADAM, at, deepspeed_config, require_bias_correction

MOST_ROWS = 65536  # pairs of a rank that `largest_batch` looks at
_ADAM = 7 * 4  # bytes a weight: gradient, master and two moments are read, the latter three written, in fp32
_EMA = 3 * 4  # bytes a weight: master and average are read, the latter written, in fp32
_STEP_LAUNCHES = 50  # of the optimizer, the norm and the log
_STEP_COLLECTIVES = 8  # gradients, weights, features there and back, counts, the log
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_BUCKET_KEY = "deepspeed.zero_optimization.reduce_bucket_size"
_GATHERED = 1_000_000_000  # and stage 3's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How a step is cut: over ranks, and a rank's share into passes."""

    world: int
    rows: int  # pairs of a rank
    encoded: int  # of them at once
    scored: int  # of its own, at once
    passes: int  # of encoding
    cached: bool  # gradient caching: everything is encoded once more, and scored twice
    stage: int  # ZeRO's, as it is run
    buckets: int  # numbers in ZeRO's buffers for gradients


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """What the GPU does in a step, one after another."""

    matrix_products: float  # convolutions and attention included
    memory_bound: float  # all other kernels of the model
    optimizer: float
    communication: float  # as far as it is not hidden
    gaps: float  # idle, waiting for the host


@dataclass(frozen=True, kw_only=True)
class MemoryGiB:
    """What a rank keeps on its GPU."""

    weights: float
    masters: float  # fp32 copies of weights in 16 bits
    moments: float  # and the weights' average
    gradients: float
    buffers: float  # of ZeRO
    activations: float
    frames: float  # batches on their way, uint8
    decoder: float
    context: float  # of CUDA and its libraries


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A training step on a kind of GPU."""

    gpu: str
    gpus: int
    cores: int
    decoder: str
    shape: StepShape
    weights: int  # numbers
    flops: float  # of a rank's step, recomputation included
    launches: int  # kernels a rank launches in a step
    seconds: StepSeconds
    launch_s: float  # of the host, beside the GPU
    loader_s: dict[str, float]  # a batch's, of each stage of a rank's loader; stages run beside each other and the step
    compute_s: float  # of the step if batches cost nothing
    step_s: float
    clips_per_s: float  # over all GPUs
    mfu_pct: float
    memory: MemoryGiB
    memory_gib: float  # in all
    usable_gib: float  # of the GPU's
    limit: str  # the part that takes longest

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory suffices."""
        return self.memory_gib <= self.usable_gib

    @property
    def loader_margin(self) -> float:
        """How many times as fast as the step the loader is; below 1 the step waits for it."""
        return self.compute_s / max(self.loader_s.values())

    @property
    def loader_keeps_up(self) -> bool:
        """Whether the step never waits for data."""
        return self.loader_margin >= 1


def shape_of(config: Config, world: int) -> StepShape:
    """Raises ValueError for batches that cannot be cut so, and for settings of DeepSpeed's that training would refuse."""
    train = config.train
    if at(config.deepspeed, TORCH_ADAM):
        require_bias_correction(train)
    settings = deepspeed_config(config.engine, train, world, config.deepspeed)
    rows, encoded = train.batch_size // world, settings["train_micro_batch_size_per_gpu"]
    zero = settings["zero_optimization"]
    double = zero.get("overlap_comm", False)
    return StepShape(
        world=world, rows=rows, encoded=encoded, scored=encoded if train.accumulate > 1 else rows,
        passes=settings["gradient_accumulation_steps"], cached=train.accumulate == 1 and encoded < rows,
        stage=zero["stage"], buckets=_bucket(zero) * (2 if double else 1),
    )  # fmt: skip


def _bucket(zero: dict) -> int:
    given = zero.get("reduce_bucket_size", _BUCKET)
    try:
        whole = int(given)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if whole < 1 or isinstance(given, bool) or (isinstance(given, float) and whole != given):
        raise ValueError(f"{_BUCKET_KEY}={given}: must be a whole number above 0, for example {_BUCKET}")
    return whole


def predict(
    config: Config,
    gpu: Gpu,
    gpus: int = 1,
    cores: int = 16,
    assumptions: Assumptions | None = None,
    *,
    decoder: str = "gpu",
    counts: StepCounts | None = None,
) -> Prediction:
    """A training step of `config` on `gpus` GPUs, each with `cores` CPU cores.

    decoder: what decodes pictures or videos, gpu or cpu. counts: what `counts_of` gives for this configuration and number of
    GPUs, None to count now. Raises ValueError for a configuration that cannot be run.
    """
    from c4c.models.backbone import preprocess_of

    a = assumptions or Assumptions()
    shape = shape_of(config, gpus)
    counts = counts or counts_of(config, gpus)
    config = replace(config, data=config.data.filled(preprocess_of(counts.spec)))
    products, rest, launches = _kernels(config, gpu, shape, counts, a)
    seconds = StepSeconds(
        matrix_products=products, memory_bound=rest, optimizer=_optimizer(config, gpu, shape, counts, a),
        communication=_communication(config, gpu, shape, counts, a), gaps=a.gap_ms / 1e3,
    )  # fmt: skip
    launches += _STEP_LAUNCHES + (round(a.hooks * counts.tensors) if shape.stage else 0)
    launch_s = launches * a.launch_us / 1e6
    loader = loader_seconds(config, gpu, shape.rows, cores, decoder, a)
    compute_s = max(sum(asdict(seconds).values()), launch_s)
    step_s = max(compute_s, *loader.values())
    memory = memory_of(config, shape, counts.weights, counts.trained, counts.activations, decoder, a)
    return Prediction(
        gpu=gpu.name, gpus=gpus, cores=cores, decoder=decoder, shape=shape, weights=counts.weights,
        flops=sum(part.flops * times for part, times, _ in _parts(shape, counts)), launches=launches,
        seconds=seconds, launch_s=launch_s, loader_s=loader, compute_s=compute_s, step_s=step_s,
        clips_per_s=config.train.batch_size / step_s, mfu_pct=100 * _useful(config, shape, counts) / step_s / peak_of(config, gpu),
        memory=memory, memory_gib=sum(asdict(memory).values()), usable_gib=gpu.memory_gib * (1 - a.fragments),
        limit=_limit(seconds, launch_s, loader, compute_s),
    )  # fmt: skip


def counts_of(config: Config, gpus: int) -> StepCounts:
    """What `predict` counts: it does not depend on the kind of GPU. Raises ValueError."""
    from c4c.performance.counts import count  # torch and open_clip take seconds to import

    shape = shape_of(config, gpus)
    return count(config, encoded=shape.encoded, scored=shape.scored, world=gpus)


def peak_of(config: Config, gpu: Gpu) -> float:
    """FLOP/s of matrix products in the engine's precision."""
    return gpu.fp32_flops if config.engine.precision == "fp32" else gpu.flops


def _useful(config: Config, shape: StepShape, counts: StepCounts) -> float:
    """FLOP that the MFU counts: of the towers, forward and backward once. It is the rule of c4c/training/trainer.py, but with LoRA, prompts or
    frozen towers, where a training reports no MFU: then all that are computed. Every video is taken to have as many captions as a row holds."""
    if config.train.skips_backward:
        return sum(part.flops * times for part, times, _ in _parts(shape, counts))
    from c4c.models.flops import per_pair

    data, model, captions = config.data, config.model, config.train.captions_per_video
    of_pair = per_pair(counts.spec, data.num_frames, data.max_words, captions, model.merging, model.linear_patch)
    return 3 * of_pair * shape.rows


def _parts(shape: StepShape, counts: StepCounts) -> list[tuple[Work, int, bool]]:
    """(part, how often a step runs it, whether torch.compile is asked to fuse it)."""
    scorings = 2 if shape.cached else -(-shape.rows // shape.scored)
    return [
        (counts.forward, shape.passes * (2 if shape.cached else 1), True),
        (counts.backward, shape.passes, True),
        (counts.scoring, scorings, False),
    ]


def _kernels(
    config: Config, gpu: Gpu, shape: StepShape, counts: StepCounts, a: Assumptions
) -> tuple[float, float, int]:
    """Seconds of matrix products, seconds of the other kernels, and launches."""
    flops, bandwidth = peak_of(config, gpu) * a.gemm, gpu.bandwidth * a.bandwidth
    compiles = config.engine.compile and shape.stage != 3
    products = rest = launches = 0.0
    for part, times, in_towers in _parts(shape, counts):
        left = a.fused if compiles and in_towers else 1.0
        for op in part.ops:
            if op.flops:
                products += times * op.launches * max(op.flops / flops, op.bytes / bandwidth)
                launches += times * op.launches
            else:
                rest += times * op.launches * left * op.bytes / bandwidth
                launches += times * op.launches * left
    return products, rest, round(launches)


def _bytes(config: Config) -> int:
    return 4 if config.engine.precision == "fp32" else 2


def _optimizer(config: Config, gpu: Gpu, shape: StepShape, counts: StepCounts, a: Assumptions) -> float:
    """The norm, Adam on this rank's part, and what 16 bits and ZeRO copy."""
    size, own = _bytes(config), counts.trained / (shape.world if shape.stage else 1)
    bandwidth, update = gpu.bandwidth * a.bandwidth, _ADAM + (_EMA if config.train.ema else 0)
    convert = own * (size + 4) * 2 if size == 2 else 0  # gradients to fp32, masters to 16 bits
    into_buckets = 2 * size * counts.trained * (shape.passes if shape.stage > 1 else 1) if shape.stage else 0
    around = (convert + into_buckets + own * size) / bandwidth
    if config.engine.offload == "none":
        return around + own * update / bandwidth
    return around + 2 * own * size / (gpu.host_link * a.host_link) + own * update / (a.adam_gb_s * 1e9)


def _communication(config: Config, gpu: Gpu, shape: StepShape, counts: StepCounts, a: Assumptions) -> float:
    """Rings: to gather N bytes, or to reduce and scatter them, a rank sends N (world - 1) / world."""
    world, size = shape.world, _bytes(config)
    if world == 1:
        return 0.0
    gradients, weights = size * counts.trained, size * counts.trained
    forwards = shape.passes * (2 if shape.cached else 1)
    moved = {
        0: 2 * gradients,
        1: gradients + weights,
        2: gradients * shape.passes + weights,
        3: gradients * shape.passes + size * counts.weights * (forwards + shape.passes),
    }[shape.stage]
    scorings = 2 if shape.cached else -(-shape.rows // shape.scored)
    moved += scorings * 3 * world * shape.scored * counts.features  # gathered; their gradient is reduced and gathered
    collectives = _STEP_COLLECTIVES + (counts.gathered * (forwards + shape.passes) if shape.stage == 3 else 0)
    link = gpu.link * a.link
    if world > a.node:
        link = min(link, a.network_gb_s * 1e9)
    return moved * (world - 1) / world / link * (1 - a.overlap) + collectives * a.collective_us / 1e6


def memory_of(
    config: Config, shape: StepShape, weights: int, trained: int, activations: float, decoder: str, a: Assumptions
) -> MemoryGiB:
    """Of a rank. weights, trained: numbers; activations: bytes."""
    gib, size, data = 2**30, _bytes(config), config.data
    own = trained / (shape.world if shape.stage else 1)
    on_gpu = 0.0 if config.engine.offload != "none" else 1.0
    kept = float(weights * size)
    if shape.stage == 3:  # its part, and what is gathered while a pass is under way
        part = 0.0 if config.engine.offload == "all" else kept / shape.world
        kept = part + min(weights, _GATHERED) * size
    masters = 4 * own if size == 2 or shape.stage else 0.0
    moments = (12 if config.train.ema else 8) * own
    frames = a.in_flight * shape.rows * data.num_frames * 3 * data.image_size**2
    on_decoder = decoder == "gpu" and not config.cache.dir
    return MemoryGiB(
        weights=kept / gib, masters=on_gpu * masters / gib, moments=on_gpu * moments / gib,
        gradients=size * (own if shape.stage >= 2 else trained) / gib, buffers=(shape.buckets * size if shape.stage else 0) / gib,
        activations=activations / gib, frames=frames / gib, decoder=a.decoder_gib if on_decoder else 0.0, context=a.context_gib,
    )  # fmt: skip


def largest_batch(
    config: Config,
    gpu: Gpu,
    prediction: Prediction,
    counts: StepCounts,
    activations: Callable[[int], float],
    assumptions: Assumptions | None = None,
) -> int:
    """The most pairs that a rank can encode at once: 0 if not even one fits, and MOST_ROWS at most.

    Where a rank's share is cut into passes, it stays as large as it is, and is the most. Otherwise all of it is encoded at once,
    and grows too. prediction, counts: of this configuration and number of GPUs, the former on any kind. activations: see
    `c4c.performance.counts.activation_curve`.
    """
    a = assumptions or Assumptions()
    is_cut = prediction.shape.passes > 1

    def fits(encoded: int) -> bool:
        shape = prediction.shape if is_cut else replace(prediction.shape, rows=encoded)
        memory = memory_of(config, shape, counts.weights, counts.trained, activations(encoded), prediction.decoder, a)
        return sum(asdict(memory).values()) <= gpu.memory_gib * (1 - a.fragments)

    least, most = 0, min(MOST_ROWS, prediction.shape.rows if is_cut else MOST_ROWS) + 1  # fits, does not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _limit(seconds: StepSeconds, launch_s: float, loader: dict[str, float], compute_s: float) -> str:
    slowest = max(loader, key=loader.__getitem__)
    if loader[slowest] > compute_s:
        return slowest
    if launch_s >= sum(asdict(seconds).values()):
        return "launches"
    return max((f.name for f in fields(seconds)), key=lambda name: getattr(seconds, name))

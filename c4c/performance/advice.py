"""What limits a predicted step, and what would help: only what changes the prediction."""

from c4c.config import Config
from c4c.performance.assumptions import Assumptions
from c4c.performance.hardware import gpu_named
from c4c.performance.predict import Prediction

_PLAIN = {
    "matrix_products": "matrix products, which is what a GPU is for: a faster one, or more of them, make the step shorter",
    "communication": "communication between GPUs: try a larger train.batch_size, or fewer GPUs",
    "gaps": "waits for the host: try a larger train.batch_size",
    "loader_python": "the Python code of the loader, one thread on each rank: more GPUs share it (--assume loader_ms is its cost)",
    "jpeg_engines": "the JPEG engines of the GPU: try a lower data.hw_decoder_load",
    "cache_reads": "reading the cache, which one thread does",
    "copies": "copies from the host to the GPU",
}


def advice(prediction: Prediction, config: Config, assumptions: Assumptions) -> str:
    """The part that takes longest, and what to try."""
    find = {"memory_bound": _traffic, "optimizer": _optimizer, "launches": _launches, "jpeg_decoding": _jpegs,
            "video_decoding": _video}.get(prediction.limit)  # fmt: skip
    return find(prediction, config, assumptions) if find else _PLAIN[prediction.limit]


def uncompiled(prediction: Prediction, config: Config) -> str:
    """A sentence if the configuration asks for torch.compile and does not get it, else ''."""
    if config.engine.compile and prediction.shape.stage == 3:
        return "engine.compile=true has no effect under ZeRO 3: the towers count as uncompiled"
    return ""


def _compiling(p: Prediction, config: Config, a: Assumptions) -> str:
    """The setting that has the towers compiled; '' if they are, or if nothing would come of it."""
    if a.fused >= 1 or (config.engine.compile and p.shape.stage != 3):
        return ""
    if p.shape.stage != 3:
        return "engine.compile=true"
    return "engine.zero_stage=2" + ("" if config.engine.compile else " with engine.compile=true")


def _traffic(p: Prediction, config: Config, a: Assumptions) -> str:
    remedy = _compiling(p, config, a)
    return "memory traffic between the matrix products: " + (
        f"try {remedy}" if remedy else "a GPU with faster memory, or more of them, make the step shorter"
    )


def _optimizer(p: Prediction, config: Config, a: Assumptions) -> str:
    if config.engine.offload != "none":
        return (
            f"the optimizer, which works on the host (engine.offload={config.engine.offload}): try engine.offload=none"
        )
    return "the optimizer: try a larger train.batch_size"


def _launches(p: Prediction, config: Config, a: Assumptions) -> str:
    larger = "a larger train.batch_size"
    if p.shape.passes > 1:
        larger = "a larger train.micro_batch_size" if p.shape.cached else "a smaller train.accumulate"
    remedies = " or ".join(filter(None, (larger, _compiling(p, config, a))))
    return f"the host, which launches kernels more slowly than the GPU runs them: try {remedies}"


def _decodes(p: Prediction, config: Config, a: Assumptions) -> str:
    """What gives decoding on the CPU more of it."""
    held = 0 < config.data.threads < p.cores - a.busy_cores
    return "a larger data.threads" if held else "more CPU cores" + (" and data.threads" if config.data.threads else "")


def _jpegs(p: Prediction, config: Config, a: Assumptions) -> str:
    remedies = [_decodes(p, config, a)]
    if p.decoder == "cpu":
        remedies.append("--decoder gpu (data.decode)")
    elif gpu_named(p.gpu).nvjpg and config.data.hw_decoder_load < 1:
        remedies.append("a higher data.hw_decoder_load")
    return f"decoding JPEGs: try {', '.join(remedies)}, or a cache (cache.dir)"


def _video(p: Prediction, config: Config, a: Assumptions) -> str:
    shards = "pack the videos as intra shards"
    if a.decoded > 1.7:
        shards += ", or as h264 shards (--assume decoded=1.7)"
    return f"decoding video: {shards}" + (f", or try {_decodes(p, config, a)}" if p.decoder == "cpu" else "")

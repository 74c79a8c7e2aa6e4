"""What a batch costs the stages of the loader."""

from c4c.config import Config
from c4c.performance.assumptions import Assumptions
from c4c.performance.hardware import Gpu

_FULL_HD = 1920 * 1080


def loader_seconds(config: Config, gpu: Gpu, rows: int, cores: int, decoder: str, a: Assumptions) -> dict[str, float]:
    """Seconds that each stage needs for the `rows` clips of a rank's batch; stages work beside each other.

    cores: of the CPU, for this rank; no more of them decode than data.threads, where that is set. data.lane=auto
    is taken for intra shards, and a cache for a full one.
    """
    data = config.data
    frames = rows * data.num_frames
    pixels = frames * 3 * data.image_size**2  # bytes, uint8
    copied = pixels / (gpu.host_link * a.host_link)
    python = {"loader_python": rows * a.loader_ms / 1e3}
    if config.cache.dir:
        return python | {"cache_reads": pixels / (a.cached_gb_s * 1e9), "copies": copied}
    decoding = max(1.0, cores - a.busy_cores)
    if data.threads:
        decoding = min(decoding, data.threads)
    if decoder == "gpu":
        copied = frames * a.jpeg_kb * 1e3 / (gpu.host_link * a.host_link)
    if data.lane == "video":
        stored = frames * a.decoded * a.video_side**2 * a.aspect
        engines = gpu.nvdec * gpu.nvdec_fps * _FULL_HD * a.nvdec
        rate = engines if decoder == "gpu" else decoding * a.video_cpu * 1e6
        return python | {"video_decoding": stored / rate, "copies": copied}
    aspect = {"squash": 1.0, "longest": 1 / a.aspect}.get(data.resize_mode, a.aspect)
    stored = frames * data.short_side**2 * aspect
    if decoder == "cpu":
        return python | {"jpeg_decoding": stored / (decoding * a.jpeg_cpu * 1e6), "copies": copied}
    # nvJPEG's CUDA kernels need the host for the entropy code; its engines need nobody
    share = data.hw_decoder_load if gpu.nvjpg else 0.0
    stages = {"jpeg_decoding": (1 - share) * stored / (decoding * a.jpeg_huffman * 1e6)}
    if share:
        stages["jpeg_engines"] = share * stored / (gpu.nvjpg * a.nvjpg * 1e6)
    return python | stages | {"copies": copied}

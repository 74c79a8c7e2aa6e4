"""The parts of bench/gpu.py, in the order in which they run: those that tell most come first. Imports nothing heavy."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIPS = "clips"  # the part that makes what others read
FRAMES, WORDS = 12, 77  # of a clip, of a caption
READERS = ("decode", "corruption", "lanes", "train", "rivals")  # modules


class Missing(Exception):
    """A part cannot run here, and why."""


@dataclass(frozen=True)
class Part:
    """A measurement in a process of its own.

    run     "module:function", called with a `Given` and `words`
    limit_s after so many seconds its processes are killed
    gpu     it is left out where there is no GPU
    again   it is run a second time, to see the spread; other parts measure each figure twice themselves, or time nothing
    env     of its process
    """

    name: str
    run: str
    limit_s: float
    about: str
    words: Mapping[str, Any] = field(default_factory=dict)
    gpu: bool = False
    again: bool = False
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads_clips(self) -> bool:
        """Whether it needs the part that makes the clips."""
        return self.run.partition(":")[0].rpartition(".")[2] in READERS


@dataclass(frozen=True)
class Given:
    """What every part is given.

    folder  of the packed clips. seconds: to measure for. overrides: settings of the training parts, key=value
    result  the file that the findings go to
    """

    folder: Path
    clips: int
    seconds: float
    batch_size: int
    overrides: tuple[str, ...]
    result: Path
    found: dict = field(default_factory=dict)

    def note(self, **found: Any) -> None:
        """Add to the findings, and write them: they are kept if the part crashes or hangs afterwards."""
        self.found.update(found)
        part = self.result.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self.result)

    @property
    def device(self):
        """The first GPU, or the CPU."""
        import torch

        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def training_settings(data: str | Path, batch_size: int) -> list[str]:
    """The settings of the training parts, before those that the command line gives."""
    settings = [f"data.train={data}", f"data.test={data}", "model.init_from=scratch", f"data.num_frames={FRAMES}"]
    return [*settings, f"data.max_words={WORDS}", "train.epochs=10000", f"train.batch_size={batch_size}"]


LOADS, THREADS = (0.0, 0.65, 1.0), (4, 8, 16)
CROPS = {"whole": "decoded whole and cropped", "roi": "only the crop decoded"}


def _decoders() -> list[Part]:
    """Every form of the image decoder. On a CPU the hardware decoder's share means nothing: one of each form is run."""
    return [
        Part(
            f"decode {crop} load={load:g} threads={threads}",
            "bench.gpu_parts.decode:jpegs",
            60,
            f"stored JPEGs, {about}; {100 * load:g} % of them by the hardware decoder",
            {"crop": crop, "load": load, "threads": threads},
            gpu=(load, threads) != (0.0, 4),
        )
        for crop, about in CROPS.items()
        for load in LOADS
        for threads in THREADS
    ]


def _part(name: str, run: str, limit_s: float, about: str, gpu: bool = False, again: bool = False, **words) -> Part:
    return Part(name, f"bench.gpu_parts.{run}", limit_s, about, words, gpu, again)


STEP, TRAIN = "step:fixed", "train:training"
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
PARTS: list[Part] = [
    _part("card", "card:ceilings", 60, "matrix products in bf16 and fp32, copies on the device and from the host"),
    _part("step", STEP, 240, "steps on one batch that stays on the device, without loader and trainer", again=True),
    _part("profile", "profile:step", 180, "torch.profiler of that step: kernels, copies, synchronisations, gaps"),
    _part("predicted", "predicted:step", 60, "what c4c.roofline expects of that step"),
    _part(CLIPS, "clips:make", 900, "make and pack the clips; only the first time takes long"),
    _part("decode cpu threads=16", "decode:on_cpu", 60, "JPEGs decoded on the CPU, copied through pinned memory", threads=16),
    _part("train intra", TRAIN, 180, "steps on the loader's batches, independent JPEGs", again=True),
    _part("step compiled", STEP, 420, "the same step with engine.compile=true, and dynamo's counters", again=True,
          words=["engine.compile=true"]),
    *_decoders(),
    *(_part(f"corruption load={load:g}", "corruption:check", 90, "decode behind 100 ms of queued work; count what differs",
            gpu=True, load=load) for load in LOADS),
    _part("equal intra", "lanes:equal", 60, "the same frames by the device and by the CPU: PSNR", stored="intra"),
    _part("lane intra", "lanes:lane", 90, "the loader alone, independent JPEGs", again=True, stored="intra"),
    _part("lane cache", "lanes:lane", 120, "the loader alone, warm cache of frames", again=True, stored="intra", cache=True),
    _part("train cache", TRAIN, 180, "steps on batches from the warm cache", again=True, cache=True),
    _part("step plain attention", STEP, 240, "the step without fused attention", again=True, plain=True),
    _part("nvdec h264", "decode:videos", 60, "the video decoder alone, H.264 with a short GOP", gpu=True, stored="h264"),
    _part("nvdec originals", "decode:videos", 60, "the video decoder alone, untouched files", gpu=True, stored="copy"),
    _part("equal h264", "lanes:equal", 60, "as equal intra, of videos with a short GOP", stored="h264"),
    _part("equal originals", "lanes:equal", 60, "as equal intra, of untouched files", stored="copy"),
    _part("lane h264", "lanes:lane", 90, "the loader alone, H.264 with a short GOP", again=True, stored="h264"),
    _part("lane originals", "lanes:lane", 90, "the loader alone, untouched files", again=True, stored="copy"),
    _part("train h264", TRAIN, 180, "steps on the loader's batches, H.264 with a short GOP", again=True, stored="h264"),
    _part("losses 16 bits", "train:losses", 120, "the first steps in bf16", words=["engine.precision=bf16"]),
    Part("losses fp32 on the CPU", "bench.gpu_parts.train:losses", 300, "the same steps as the reference",
         {"words": ["engine.precision=fp32"]}, env=CPU_ONLY),
    _part("decode cpu threads=4", "decode:on_cpu", 60, "as above with 4 threads", gpu=True, threads=4),
    _part("decode cpu threads=8", "decode:on_cpu", 60, "as above with 8 threads", gpu=True, threads=8),
    _part("decode sizes", "decode:sizes", 90, "JPEGs of short sides 240 and 256", threads=8),
    _part("rival torchcodec", "rivals:torchcodec", 60, "torchcodec's VideoDecoder, on CUDA where there is one"),
    _part("rival torchcodec JPEG", "rivals:torchcodec_jpeg", 60, "torchcodec's decode_jpeg on CUDA", gpu=True),
    _part("rival DALI reader", "rivals:dali_reader", 60, "fn.experimental.readers.video(uniform_sample=True)", gpu=True),
    _part("rival SPDL nvjpeg", "rivals:spdl_nvjpeg", 60, "spdl.io.decode_image_nvjpeg", gpu=True),
    _part("rival SPDL nvdec", "rivals:spdl_nvdec", 60, "spdl.io.decode_packets_nvdec, which decodes every frame", gpu=True),
]  # fmt: skip

"""What the makers say about GPUs. Imports nothing heavy, so that a mistake in a name is answered at once."""

import difflib
import re
from dataclasses import dataclass

# dense 16-bit matrix peaks in FLOP/s, from the makers' data sheets; the first name that the device's name contains as words
PEAKS = (
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("A100", 312e12), ("A800", 312e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("A40", 150e12), ("A30", 165e12), ("A10G", 70e12), ("A10", 125e12),
    ("V100", 125e12), ("T4", 65e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. Rates are peaks, of one direction where there are two; 1 GB is 1e9 bytes, 1 GiB is 2**30."""

    name: str  # as --gpu takes it
    device: str  # what the driver's name of the device contains; see PEAKS
    fp32_flops: float  # FLOP/s without tensor cores, which is what fp32 training uses
    bandwidth: float  # of its memory, bytes/s
    memory_gib: float  # that a program can have, which is a little less than the data sheet says
    link: float  # to the other GPUs of a machine (NVLink, else PCIe), bytes/s
    host_link: float  # to the host's memory (PCIe), bytes/s
    nvdec: int  # video decoding engines
    nvdec_fps: float  # 1080p H.264 frames/s of one of them
    nvjpg: int  # JPEG decoding cores

    @property
    def flops(self) -> float:
        """Peak of dense 16-bit matrix products in FLOP/s."""
        peak = peak_flops(self.device)
        assert peak is not None
        return peak


# Peaks, bandwidth, NVLink and PCIe: NVIDIA's data sheets of A100, H100 SXM, H200 SXM, L4, L40S and HGX B200, and the Ada
# architecture white paper for the RTX 4090 (sheets add up both directions of a link, and count sparse products).
# Engines of A100 and H100: MIG user guide, "Supported MIG Profiles" (the A100's one JPEG engine has five cores).
# NVDEC frames/s: NVDEC application note 13.0, by clock: its Turing figure (771 at 1860 MHz) holds for A100 and Hopper.
# Not confirmed by a source: how much of the memory a program can have, the numbers of engines of L4, L40S, RTX 4090 and B200, the video clocks of A100 (1290 MHz) and
# Hopper (1545 MHz), and that the note's figure for Blackwell holds for the B200. GeForce cards have no documented JPEG engine.
GPUS = (
    Gpu(name="A100-40", device="A100", fp32_flops=19.5e12, bandwidth=1555e9, memory_gib=39.4, link=300e9, host_link=32e9, nvdec=5, nvdec_fps=535, nvjpg=5),
    Gpu(name="A100-80", device="A100", fp32_flops=19.5e12, bandwidth=2039e9, memory_gib=79.2, link=300e9, host_link=32e9, nvdec=5, nvdec_fps=535, nvjpg=5),
    Gpu(name="H100", device="H100", fp32_flops=67e12, bandwidth=3350e9, memory_gib=79.1, link=450e9, host_link=64e9, nvdec=7, nvdec_fps=640, nvjpg=7),
    Gpu(name="H200", device="H200", fp32_flops=67e12, bandwidth=4800e9, memory_gib=139.8, link=450e9, host_link=64e9, nvdec=7, nvdec_fps=640, nvjpg=7),
    Gpu(name="L4", device="L4", fp32_flops=30.3e12, bandwidth=300e9, memory_gib=22.0, link=32e9, host_link=32e9, nvdec=4, nvdec_fps=903, nvjpg=4),
    Gpu(name="L40S", device="L40S", fp32_flops=91.6e12, bandwidth=864e9, memory_gib=44.4, link=32e9, host_link=32e9, nvdec=3, nvdec_fps=903, nvjpg=4),
    Gpu(name="RTX-4090", device="RTX 4090", fp32_flops=82.6e12, bandwidth=1008e9, memory_gib=23.5, link=32e9, host_link=32e9, nvdec=1, nvdec_fps=903, nvjpg=0),
    Gpu(name="B200", device="B200", fp32_flops=80e12, bandwidth=8000e9, memory_gib=178.3, link=900e9, host_link=64e9, nvdec=7, nvdec_fps=2172, nvjpg=7),
)  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Dense 16-bit matrix peak in FLOP/s of a device, by its driver's name; None where it is not known."""
    return next((flops for known, flops in PEAKS if _is(known, device)), None)


def _is(known: str, device: str) -> bool:
    """Whether a name of PEAKS is the driver's `device`: an RTX A4000 is no A40, and a 4090 of a laptop, or a 4090 D, is another chip."""
    return re.search(rf"\b{known}\b(?! (D|Laptop)\b)", device) is not None


def gpu_named(name: str) -> Gpu:
    """The GPU that --gpu names, whatever its case. Raises ValueError that names the nearest one."""
    for gpu in GPUS:
        if _plain(gpu.name) == _plain(name):
            return gpu
    plain = {_plain(gpu.name): gpu.name for gpu in GPUS}
    near = [known for word, known in plain.items() if _plain(name) and _plain(name) in word]
    near = near or [plain[word] for word in difflib.get_close_matches(_plain(name), plain, 1)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"--gpu {name}: unknown GPU; {hint}Known are {', '.join(plain.values())}, and all")


def gpu_of_device(device: str, memory_gib: float) -> Gpu | None:
    """The GPU that the driver calls `device`, the nearest by memory if there are several; None where it is not known."""
    fragment = next((known for known, _ in PEAKS if _is(known, device)), None)
    same = [gpu for gpu in GPUS if gpu.device == fragment]
    return min(same, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())

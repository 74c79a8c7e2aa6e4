"""uint8 pixels to normalised planes: (pixel / 255 - mean) / std, from [..., H, W, 3] to [..., 3, H, W].

On a GPU torch does it after the transfer of the bytes (pixels.py). On a CPU it is most of the work that is left once frames are
cheap to decode, and torch takes three times as long as it needs: normalise.c does it in one pass. It is compiled at its
first use, in under a second, and kept for the next; without a C compiler torch does it.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.stages.pixels import Pixels
from shards.user_cache import user_cache

SOURCE = Path(__file__).with_name("normalise.c")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Normalise:
    """The normalisation of `config` into tensors of `dtype`."""

    def __init__(self, config: DataConfig):
        self.dtype = DTYPES[config.pixels]
        self.pixels = Pixels(config.mean, config.std)
        library = _library()
        kernel = "normalise_f16" if self.dtype == torch.float16 else "normalise_f32"
        self._kernel = None if library is None else getattr(library, kernel)

    def into(self, out: torch.Tensor, frames: np.ndarray) -> None:
        """Write frames uint8 [n, H, W, 3], each picture contiguous, into out [n, 3, H, W], contiguous, both on the CPU.

        The interpreter is free meanwhile, so threads can share the work."""
        n, height, width, _ = frames.shape
        if self._kernel is None:
            out.copy_(self.on_device(torch.from_numpy(np.ascontiguousarray(frames))))
            return
        if not frames.flags.c_contiguous or not out.is_contiguous():
            raise ValueError("normalise: both sides must be contiguous")
        pointers = [frames.ctypes.data, out.data_ptr()]
        sizes = [n, height * width]
        self._kernel(
            *map(ctypes.c_void_p, pointers), *map(ctypes.c_size_t, sizes),
            ctypes.c_void_p(self.pixels.scale.ctypes.data), ctypes.c_void_p(self.pixels.offset.ctypes.data),
        )  # fmt: skip

    def fill(self, out: torch.Tensor, frames: np.ndarray, picks: np.ndarray, raw: bool) -> None:
        """Write frames[picks] into the first slots of a clip; zeros into the others."""
        n = len(picks)
        if n < len(out):
            out[n:].numpy()[:] = 0  # torch would wake threads for it, which then spin
        a = int(picks[0]) if n else 0
        if not np.array_equal(picks, np.arange(a, a + n)):
            if raw:
                np.take(frames, picks, axis=0, out=out[:n].numpy())
                return
            for slot, k in enumerate(picks.tolist()):
                self.into(out[slot : slot + 1], frames[k : k + 1])
        elif raw:
            out[:n].numpy()[:] = frames[a : a + n]
        else:
            self.into(out[:n], frames[a : a + n])

    def on_device(self, frames: torch.Tensor) -> torch.Tensor:
        """The frames, uint8 [..., H, W, 3] on any device, normalised, [..., 3, H, W]."""
        return self.pixels(frames, self.dtype).contiguous()


@cache
def _library() -> ctypes.CDLL | None:
    """normalise.c, compiled for this machine; None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        warnings.warn("no C compiler: normalising takes three times as long. Install gcc", stacklevel=2)
        return None
    command = [compiler, "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    if platform.machine() not in ("x86_64", "AMD64"):
        command.remove("-march=native")
    try:
        with _compiled(command) as path:
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or b""
        warnings.warn(f"{SOURCE} does not compile, torch normalises: {error} {detail.decode()[-500:]}", stacklevel=2)
        return None


@contextmanager
def _compiled(command: list[str]) -> Iterator[Path]:
    """The library's path: one a machine, source and command, in the user's cache folder or, failing that, for once: it is
    gone on leaving, and stays loaded."""
    machine = f"{platform.node()} {platform.processor()} {_cpu()}"
    name = hashlib.sha256(f"{command} {machine}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    try:
        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():  # nobody else's library is loaded into this process
            raise PermissionError
        target = folder / f"normalise-{name}.so"
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="c4c-") as once:
            target = Path(once) / "normalise.so"
            _compile(command, target)
            yield target
        return
    try:
        if not target.exists():
            _compile(command, Path(part.name))
            os.chmod(part.name, 0o700)
            os.replace(part.name, target)  # whole or not at all: ranks start together
    finally:
        Path(part.name).unlink(missing_ok=True)
    yield target


def _compile(command: list[str], target: Path) -> None:
    subprocess.run([*command, "-o", str(target), str(SOURCE)], check=True, capture_output=True, timeout=60)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")

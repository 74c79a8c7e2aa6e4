"""What nvidia-smi says of the GPU, and how busy it is meanwhile."""

import ctypes
import math
import subprocess
import threading
from contextlib import suppress

import numpy as np


def has_nvdec() -> bool:
    """Whether the driver's decoding library can be loaded."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


def asked(fields: str) -> str | None:
    """What nvidia-smi says of the first GPU."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    return None


class Busy:
    """How busy the GPU is, in percent, asked twice a second."""

    FIELDS = ("utilization.gpu", "utilization.decoder", "utilization.jpeg")

    def __enter__(self) -> "Busy":
        self._found, self._over = [], threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(timeout=15)

    def _ask(self) -> None:
        while not self._over.wait(0.5):
            if (told := asked(",".join(self.FIELDS))) is None:
                return
            self._found.append([float(n) if n.strip().isdigit() else math.nan for n in told.split(",")])

    def most(self) -> dict:
        if not self._found:
            return {}
        rows = np.array(self._found)
        known = [(name, column) for name, column in zip(self.FIELDS, rows.T, strict=True) if not np.isnan(column).all()]
        return {f"{name.replace('.', '_')}_max_pct": float(np.nanmax(column)) for name, column in known}

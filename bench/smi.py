"""What the driver and nvidia-smi say of the GPU, and how busy it is meanwhile. Imports nothing heavy."""

import ctypes
import subprocess
import threading
from contextlib import suppress


def gpu_name() -> str | None:
    """Of the first GPU that a process may use, asked of the driver; None: there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, handle, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if cuda.cuDeviceGet(ctypes.byref(handle), 0) or cuda.cuDeviceGetName(name, len(name), handle):
        return None
    return name.value.decode(errors="replace")


def has_nvdec() -> bool:
    """Whether the driver's decoding library can be loaded."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


def query(fields: str) -> str | None:
    """What nvidia-smi says of the first GPU."""
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    return None


class Busy:
    """How busy the GPU is, in percent, asked twice a second."""

    FIELDS = ("utilization.gpu", "utilization.decoder", "utilization.jpeg")

    def __enter__(self) -> "Busy":
        self._found: list[list[float | None]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(timeout=15)

    def _ask(self) -> None:
        while not self._over.wait(0.5):
            if (answer := query(",".join(self.FIELDS))) is None:
                return
            self._found.append([float(n) if n.strip().isdigit() else None for n in answer.split(",")])

    def most(self) -> dict[str, float]:
        """{field_max_pct: the highest value}, of those that this GPU tells."""
        columns = zip(self.FIELDS, zip(*self._found, strict=True), strict=False)
        known = {name: [n for n in column if n is not None] for name, column in columns}
        return {f"{name.replace('.', '_')}_max_pct": max(column) for name, column in known.items() if column}

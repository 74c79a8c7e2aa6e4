"""Run the loader for a long time on small frames and watch for growth of memory, open files and threads.

    python bench/soak.py --data data/demo/train [--minutes 10] [--cache DIR] [--json OUT]

Ten minutes of 64-pixel frames show as many batches as hours of training. Exits with 1 if anything grew.
"""

import gc
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from pipelines.config import CacheConfig, DataConfig
from pipelines.loader import Loader
from shards.split import Split

GROWTH_MIB = 64  # more than this between the first tenth of the time and the end counts as growth


def main() -> int:
    parser = harness.parser(__doc__, None)
    parser.add_argument("--data", type=Path, required=True, help="folder of a packed split")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cache", type=Path, help="folder of a cache (default: a temporary one, every other loader)")
    args = parser.parse_args()
    config = DataConfig(num_frames=4, image_size=64, threads=2)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Split(args.data), config, 60 * args.minutes, args.cache or Path(folder), every=3 * args.minutes)
    heads = {"seconds": "seconds", "epochs": "epochs", "batches": "batches", "mib": "resident MiB", "files": "open files",
             "threads": "threads"}  # fmt: skip
    harness.show(list(heads.values()), [[f"{row[key]:.0f}" for key in heads] for row in found["samples"]])
    harness.save(args.json, found)
    first, last = found["samples"][len(found["samples"]) // 10 + 1], found["samples"][-1]
    grown = [k for k, most in (("mib", GROWTH_MIB), ("files", 0), ("threads", 0)) if last[k] > first[k] + most]
    print(f"grown: {', '.join(grown)}" if grown else "nothing grew")
    return 1 if grown else 0


def soak(
    split: Split, config: DataConfig, seconds: float = math.inf, cache: Path | None = None, every: float = 10.0,
    rounds: float = math.inf,
) -> dict:  # fmt: skip
    """Epochs upon epochs for so long or so many rounds: a new loader every three epochs, as restarts within a process do.

    Returns the number of epochs and samples of {seconds, epochs, batches, mib (resident), files, threads}.
    """
    started = last = time.perf_counter()
    samples, epochs, batches = [], 0, 0
    while time.perf_counter() - started < seconds and epochs < 3 * rounds:
        settings = CacheConfig(dir=str(cache or "") if epochs % 2 == 0 else "", max_gb=1)
        with Loader(split, config, batch_size=min(8, len(split)), seed=epochs, cache=settings) as loader:
            for batch in loader.batches(count=3 * loader.steps_per_epoch):
                batches += 1
                epochs += batch.step + 1 == loader.steps_per_epoch
        _wait_for_threads()
        if time.perf_counter() - last >= every or not samples:
            last = time.perf_counter()
            samples.append({"seconds": last - started, "epochs": epochs, "batches": batches, **_holdings()})
    samples.append({"seconds": time.perf_counter() - started, "epochs": epochs, "batches": batches, **_holdings()})
    return {"epochs": epochs, "batches": batches, "samples": samples}


def _wait_for_threads() -> None:
    """Closed loaders' threads end on their own."""
    deadline = time.perf_counter() + 5
    while any(t.name.startswith("c4c") for t in threading.enumerate()) and time.perf_counter() < deadline:
        time.sleep(0.01)


def _holdings() -> dict:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tasks = len(os.listdir("/proc/self/task"))  # of every library, DALI's included
    return {"mib": resident / 2**20, "files": len(os.listdir("/proc/self/fd")), "threads": tasks}


if __name__ == "__main__":
    sys.exit(main())

"""Training from an object store that is slow, fails at times and is restarted once: does the step wait?

    python bench/remote.py [--shards 1000] [--steps 160] [--latency 0.05] [--failures 0.01] [--step-seconds 0.5] [--json OUT]

Packs SHARDS shards of 8 small videos (once, in data/bench), puts them on an S3 server (moto) on this machine, and reads them
through a proxy that answers LATENCY seconds late and fails that share of the requests: half of those with status 503, half by
hanging up. A step multiplies matrices for STEP-SECONDS on one core. Halfway server and proxy are killed, and started anew
on the same ports once the new server has been filled. The local folder holds 0.3 of the set, shuffled in blocks of 1024 pairs.

Prints the share of the time that steps waited, without and with those of the restart, and the most the local folder held.
Exits with 1 if the share without is 5 % or more, the folder exceeded its bound, or a pair was missed. Needs the test extras.
"""

import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.store import Store
from pipelines.config import DataConfig
from pipelines.loader import Loader
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.remote import Local
from shards.split import Split
from shards.video.profiles import Profile
from tests.videos import encode

SHARD_VIDEOS, BATCH = 8, 32
ALLOWED = 0.05


def main() -> int:
    parser = harness.parser(__doc__, "remote")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds (default: %(default)s)")
    parser.add_argument("--failures", type=float, default=0.01, help="share of the requests (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="of computing (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=harness.ROOT / "data/bench", help="where the shards are kept")
    args = parser.parse_args()
    packed = make_shards(args.folder / f"remote-{args.shards}", args.shards)
    store = Store(packed, args.latency, args.failures)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                   "AWS_ENDPOINT_URL": store.url}  # fmt: skip
    store.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = train(packed, store, Path(folder), args.steps, args.step_seconds)
    finally:
        store.stop()
    found |= {"shards": args.shards, "latency_s": args.latency, "failures": args.failures, "cores": os.cpu_count(),
              "step_s_wanted": args.step_seconds, "load": os.getloadavg()}  # fmt: skip
    show(found)
    harness.save(args.json, found)
    good = found["wait_share"] < ALLOWED and found["most_bytes"] <= found["bound_bytes"] and not found["missed"]
    return 0 if good else 1


def train(packed: Path, store: Store, folder: Path, steps: int, seconds: float) -> dict:
    size = sum(p.stat().st_size for p in packed.iterdir())
    bound = int(0.3 * size)
    config = DataConfig(num_frames=4, image_size=64, threads=1, max_words=8, shuffle_block=1024, local_gb=bound / 1e9)
    split = Split("s3://bucket/set", Local(folder, config.local_gb, config.server_timeout_s))
    watch = Watch(folder)
    waits, works, away, seen = [], [], [], set()
    with Loader(split, config, batch_size=BATCH, seed=0) as loader:
        steps = min(steps, loader.steps_per_epoch)
        batches = loader.batches(count=steps)
        for i in range(steps):
            before = store.away
            batch = next(batches)
            seen |= set(batch.keys)
            waits.append(batch.wait_s)
            away.append(before or store.away)
            works.append(compute(seconds))
            if i == steps // 2:
                threading.Thread(target=store.restart).start()
    watch.close()
    store.count()
    wanted = {tuple(pair) for step in range(steps) for pair in loader.order.batch(0, step).tolist()}
    rest = [i for i in range(1, steps) if not away[i]]  # the first step waits for the server's first answers
    share = lambda at: sum(waits[i] for i in at) / sum(waits[i] + works[i] for i in at)  # noqa: E731
    return {
        "steps": steps,
        "wait_share": share(rest),
        "wait_share_with_the_restart": share(range(1, steps)),
        "first_wait_s": waits[0],
        "longest_wait_s": max(waits[i] for i in rest),
        "step_s": statistics.median(works),
        "seconds_without_server": store.seconds_away,
        "set_bytes": size,
        "bound_bytes": bound,
        "most_bytes": watch.most,
        "requests": store.requests,
        "failed_requests": store.failed,
        "missed": len(wanted) - len(seen),
    }


def compute(seconds: float) -> float:
    """Multiply matrices for so long on one core. Returns how long it took."""
    torch.set_num_threads(1)
    started, a = time.perf_counter(), torch.ones(256, 256)
    while time.perf_counter() - started < seconds:
        a = (a @ a).clamp(max=1)
    return time.perf_counter() - started


class Watch:
    """How much a folder holds at most, looked at every 20 ms."""

    def __init__(self, folder: Path):
        self.most, self._folder, self._stop = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            total = 0
            for file in self._folder.glob("*/*"):
                try:
                    total += -(-file.stat().st_size // 4096) * 4096
                except FileNotFoundError:
                    continue
            self.most = max(self.most, total)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def make_shards(folder: Path, count: int) -> Path:
    if (folder / "dataset.json").exists():
        return folder
    print(f"packing {count} shards", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        sources = []
        for i in range(40):
            sources.append(Path(temporary) / f"{i}.mp4")
            sources[-1].write_bytes(encode(60 + i, 12, (96, 64)))
        items = [Item(f"v{i:05}", sources[i % 40], (Caption(f"video {i}"),)) for i in range(count * SHARD_VIDEOS)]
        profile = Profile(name="intra", short_side=64)
        pack(items, folder, dataset="remote", split="train", profile=profile, shard_videos=SHARD_VIDEOS, workers=2)
    return folder


def show(found: dict) -> None:
    told = [
        ("waited for data", f"{100 * found['wait_share']:.2f} % of the time (below {100 * ALLOWED:.0f} %)"),
        ("with the restart", f"{100 * found['wait_share_with_the_restart']:.2f} %"),
        ("the server was away for", f"{found['seconds_without_server']:.1f} s"),
        ("first batch after, longest wait", f"{found['first_wait_s']:.2f} s, {found['longest_wait_s']:.2f} s"),
        ("a step", f"{found['step_s']:.2f} s"),
        ("local folder at most", f"{found['most_bytes'] / 1e6:.1f} of {found['bound_bytes'] / 1e6:.1f} MB; set "
         f"{found['set_bytes'] / 1e6:.0f} MB"),
        ("requests", f"{found['requests']}, of which {found['failed_requests']} failed"),
        ("pairs missed", str(found["missed"])),
    ]  # fmt: skip
    harness.show(["", ""], told, f"{found['shards']} shards, {found['steps']} steps", width=100)


if __name__ == "__main__":
    sys.exit(main())

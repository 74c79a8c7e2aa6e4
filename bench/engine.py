"""What the engine costs over a bare loop: the real training loop, beside plain PyTorch on tensors that are already there.

    python bench/engine.py [--ranks 1] [--rounds 4] [--block 8] [--json bench/results/engine.json] [key=value ...]

Both train the same model with the same loss, precision and AdamW, in the same process and in turn: a block of steps of
c4c/training/trainer.py (shards read and decoded, DeepSpeed, metrics, screen), a block of the bare loop (one set of random tensors,
torch.optim.AdamW(fused), clipping; DistributedDataParallel on several ranks). The first steps of a block are not
counted: they find batches that were made ahead during the other's. Overhead is the median over rounds of the ratio of
their median steps. A last block is timed in parts: data (waiting for it), forward, backward, optimizer (update, with
clipping and zeroing), communication (in collectives, wherever they are called, waiting for other ranks included), and
the rest (metrics, screen, agreeing on signals). Key=value words are settings of the run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
VIDEOS, WARM = 64, 3
SETTINGS = [
    "model.backbone=ViT-S-32-alt", "model.init_from=scratch", "train.batch_size=8", "data.num_frames=2", "data.max_words=32",
    "checkpoint.every_steps=0", "train.epochs=100",
]  # fmt: skip
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "reduce",
               "broadcast", "barrier")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--block", type=int, default=8, help=f"steps of each in a round; the first {WARM} are not counted"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/engine.json")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # as one of the ranks
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.block <= WARM:
        parser.error(f"--block {args.block}: must be above {WARM}")
    if args.measure:
        measure(args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="engine-") as folder:
        make_splits(Path(folder))
        deepspeed = Path(sys.executable).parent / "deepspeed"
        words = ["--measure", folder, "--rounds", args.rounds, "--block", args.block, "--json", args.json.resolve()]
        command = [deepspeed, "--num_accelerators", args.ranks, __file__, *words, *args.overrides]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run([*map(str, command)], env=os.environ | {"PYTHONPATH": path}).returncode


def make_splits(folder: Path) -> None:
    from shards.demo import shapes
    from shards.packing.pack import pack
    from shards.video.profiles import Profile

    items = shapes.generate(folder / "source", seed=0, train=VIDEOS, test=4, workers=os.cpu_count())
    for split in ("train", "test"):
        pack(items[split], folder / split, dataset="demo", split=split, profile=Profile(), workers=os.cpu_count())


def measure(args: argparse.Namespace) -> None:
    clock = Clock()
    clock.watch_collectives()  # before anybody takes a reference to one
    import torch

    from c4c.config import load
    from c4c.models.flops import peak, per_pair
    from c4c.training.trainer import Trainer
    from c4c.zero.distributed import start_distributed, stop_distributed

    rank, world, device = start_distributed()
    (args.measure / "bench.yaml").write_text("{}")
    on_gpu = device.type == "cuda"
    words = [*SETTINGS, f"engine.precision={'bf16' if on_gpu else 'fp32'}", f"data.train={args.measure / 'train'}"]
    words += [f"data.test={args.measure / 'test'}", f"run.dir={args.measure / 'run'}", *args.overrides]
    config = load("bench.yaml", words, [args.measure])
    clock.wait = torch.cuda.synchronize if on_gpu else lambda: None
    trainer = Trainer(config, rank, world, device)
    session, plain = trainer.session, Plain(config, trainer.session.split, device, world)
    for name, part in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        setattr(session.engine, name, clock.timed(part, getattr(session.engine, name)))
    ours, theirs, parts = [], [], []
    batches, step_of = session.batches, plain.step

    def taking_turns(count: int) -> Iterator:
        source = batches(count)
        for number in range(args.rounds + 1):
            clock.on = number == args.rounds  # the last block only: on a GPU its waits cost time
            ours.append([]), theirs.append([])
            for _ in range(args.block):
                clock.parts.clear()
                mark = time.perf_counter()
                with clock("data"):
                    batch = next(source)
                yield batch
                clock.wait()
                ours[-1].append(time.perf_counter() - mark)
                parts.append(dict(clock.parts) | {"whole": ours[-1][-1]})
            for _ in range(args.block):
                mark = time.perf_counter()
                step_of()
                clock.wait()
                theirs[-1].append(time.perf_counter() - mark)
        raise Finished

    session.batches = taking_turns
    with suppress(Finished):
        trainer.run()
    if rank == 0:
        flops = (
            3 * per_pair(session.model.spec, config.data.num_frames, config.data.max_words) * config.train.batch_size
        )
        report(
            args,
            config,
            session,
            ours[:-1],
            theirs[:-1],
            parts[-args.block :],
            flops,
            peak(device, config.engine.precision),
        )
    stop_distributed()


class Finished(Exception):
    """Enough steps; nothing has to be saved."""


class Clock:
    """Seconds of a step by part. Parts within others are taken out of these."""

    def __init__(self):
        self.on, self.wait, self.parts, self._stack = False, lambda: None, defaultdict(float), []

    def __call__(self, part: str) -> "Clock":
        self._next = part
        return self

    def __enter__(self) -> None:
        if self.on:
            self.wait()
        self._stack.append([self._next, time.perf_counter(), 0.0])

    def __exit__(self, *_) -> None:
        if self.on:
            self.wait()
        part, since, within = self._stack.pop()
        whole = time.perf_counter() - since
        self.parts[part] += whole - within
        if self._stack:
            self._stack[-1][2] += whole

    def timed(self, part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with self(part):
                return function(*args, **kwargs)

        return call

    def watch_collectives(self) -> None:
        import torch.distributed as dist

        for name in COLLECTIVES:
            setattr(dist, name, self._collective(getattr(dist, name)))

    def _collective(self, function: Callable) -> Callable:
        timed = self.timed("communication", function)

        def call(*args, **kwargs):
            work = timed(*args, **kwargs)
            if kwargs.get("async_op") and work is not None:
                return SimpleNamespace(wait=self.timed("communication", work.wait), is_completed=work.is_completed)
            return work

        return call


class Plain:
    """The bare loop."""

    def __init__(self, config, split, device, world: int):
        import torch

        from c4c.models.clip4clip import build
        from c4c.training.param_groups import parameter_groups
        from c4c.training.step import Learner

        torch.manual_seed(config.run.seed)
        data, rows = config.data, -(-config.train.batch_size // world)
        learner = Learner(build(config.model, data.num_frames)).to(device)
        self._clip, self._weights = config.engine.clip_grad_norm, list(learner.parameters())
        groups = parameter_groups(learner, config.train)
        self._optimizer = torch.optim.AdamW(groups, betas=config.train.betas, eps=config.train.eps, fused=True)
        on_gpu = [device] if device.type == "cuda" else None
        self._learner = torch.nn.parallel.DistributedDataParallel(learner, on_gpu) if world > 1 else learner
        size = data.image_size
        self._batch = (
            torch.randn(rows, data.num_frames, 3, size, size, device=device),
            torch.ones(rows, data.num_frames, dtype=torch.bool, device=device),
            torch.randint(1, 49000, (rows, data.max_words), device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.engine.precision, torch.float32)
        self._autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step(self) -> float:
        import torch

        with self._autocast():
            loss = self._learner(*self._batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def report(
    args, config, session, ours: list, theirs: list, parts: list[dict], flops: float, peak: float | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    median = {name: [statistics.median(block[WARM:]) for block in blocks] for name, blocks in (("c4c", ours), ("plain PyTorch", theirs))}  # fmt: skip
    overhead = 100 * (statistics.median(a / b for a, b in zip(*median.values(), strict=True)) - 1)
    rows = {}
    for name, blocks in median.items():
        step = statistics.median(blocks)
        rows[name] = {"step_s": step, "clips_per_s": config.train.batch_size / step, "tflop_per_s": flops / step / 1e12}
        rows[name]["mfu_pct"] = 100 * flops / step / (peak * session.world) if peak else None
    split = {}
    for part in ("data", "forward", "backward", "optimizer", "communication"):
        split[f"{part}_s"] = statistics.median(p.get(part, 0.0) for p in parts[WARM:])
    split["rest_s"] = statistics.median(p["whole"] for p in parts[WARM:]) - sum(split.values())
    table = Table("", "step s", "clips/s", "TFLOP/s", "MFU %")
    for name, row in rows.items():
        mfu = f"{row['mfu_pct']:.1f}" if peak else "peak unknown"
        table.add_row(name, f"{row['step_s']:.3f}", f"{row['clips_per_s']:.1f}", f"{row['tflop_per_s']:.3f}", mfu)
    Console().print(table)
    pieces = Table("of a c4c step", "s", "%")
    for part, seconds in split.items():
        pieces.add_row(part[:-2], f"{seconds:.4f}", f"{100 * seconds / sum(split.values()):.1f}")
    Console().print(pieces)
    print(f"c4c takes {overhead:+.1f} % over plain PyTorch (median of {args.rounds} rounds of {args.block} steps each)")
    machine = {
        "cpus": os.cpu_count(),
        "cpu": cpu_name(),
        "device": device_name(session.device),
        "load": os.getloadavg()[0],
    }
    versions = {name: version(name) for name in ("torch", "deepspeed", "numpy")} | {"python": platform.python_version()}
    words = [*SETTINGS, f"engine.precision={config.engine.precision}", *args.overrides]
    out = {"machine": machine, "versions": versions, "ranks": session.world, "settings": words, "weights": session.weights,
           "rounds": args.rounds, "block": args.block, "overhead_pct": overhead, "ways": rows, "split": split,
           "step_s_by_round": median}  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(out, indent=2) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())

"""What the engine costs over a bare loop: the real training loop, beside plain PyTorch on tensors that are already there.

    python bench/engine.py [--ranks 1] [--rounds 4] [--block 8] [--shortcuts] [--json bench/results/engine.json] [key=value ...]

Both train the same model with the same loss, precision and AdamW, in the same process and in turn: a block of steps of
c4c/training/trainer.py (shards read and decoded, DeepSpeed, metrics, screen), a block of the bare loop (one set of random tensors,
torch.optim.AdamW(fused), clipping; DistributedDataParallel on several ranks). The first steps of a block are not
counted: they find batches that were made ahead during the other's. Overhead is the median over rounds of the ratio of
their median steps. A last block is timed in parts: data (waiting for it), forward, backward, optimizer (update, with
clipping and zeroing), communication (in collectives, wherever they are called, waiting for other ranks included), and
the rest (metrics, screen, agreeing on signals). Key=value words are settings of the run.

--shortcuts: each round also has blocks of the training loop with engine.fold_pixels, engine.trim_captions and engine.share_captions, each
alone and all three. All blocks, the plain ones too, then get frames as bytes, as they do on a GPU, so that on a CPU the plain step
normalises as well, in place of the loader. What captions save depends on data.max_words and on how many captions of a batch are equal.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness

VIDEOS, WARM = 64, 3
# engine's settings, and what of the model turns them on and off
SHORTCUTS = {"fold_pixels": "folds_pixels", "trim_captions": "trims_captions", "share_captions": "shares_captions"}
SETTINGS = [
    "model.backbone=ViT-S-32-alt", "model.init_from=scratch", "train.batch_size=8", "data.num_frames=2", "data.max_words=32",
    "checkpoint.every_steps=0", "train.epochs=100",
]  # fmt: skip
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "reduce",
               "broadcast", "barrier")  # fmt: skip


def main() -> int:
    parser = harness.parser(__doc__, "engine")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--block", type=int, default=8, help=f"steps of each in a round; the first {WARM} are not counted"
    )
    parser.add_argument(
        "--shortcuts", action="store_true", help="also measure the step with engine.fold_pixels and the like"
    )
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
        words += ["--shortcuts"] * args.shortcuts
        command = [deepspeed, "--num_accelerators", args.ranks, __file__, *words, *args.overrides]
        return subprocess.run([*map(str, command)], env=harness.environment()).returncode


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
    words += [f"engine.{name}=true" for name in SHORTCUTS if args.shortcuts]
    config = load("bench.yaml", words, [args.measure])
    clock.wait = torch.cuda.synchronize if on_gpu else lambda: None
    trainer = Trainer(config, rank, world, device)
    session, config = trainer.session, trainer.session.config
    plain = Plain(config, session.split, device, world)
    for name, part in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        setattr(session.engine, name, clock.timed(part, getattr(session.engine, name)))
    turns = Turns(args.rounds, args.block, clock, plain.step, session.model if args.shortcuts else None)
    batches = session.batches
    session.batches = lambda count: turns.take(batches(count))
    with suppress(Finished):
        trainer.run()
    if rank == 0:
        data, model, captions = config.data, config.model, config.train.captions_per_video
        of_pair = per_pair(
            session.model.spec, data.num_frames, data.max_words, captions, model.merging, model.linear_patch
        )
        flops = 3 * of_pair * config.train.batch_size
        report(args, config, session, turns, flops, peak(device, config.engine.precision))
    stop_distributed()


class Turns:
    """Blocks of steps of the training loop and of the bare one, in turn; seconds of every step, by block.

    model: measure its shorter ways too, those that it has; `shorter` has their seconds by name and block.
    """

    def __init__(self, rounds: int, block: int, clock: "Clock", bare: Callable[[], object], model=None):
        self._rounds, self._block, self._clock, self._bare = rounds, block, clock, bare
        self._model, self._has = model, [] if model is None else [on for on in SHORTCUTS.values() if getattr(model, on)]
        self.shorter: dict[str, list[list[float]]] = {}
        self.ours: list[list[float]] = []
        self.theirs: list[list[float]] = []
        self.parts: list[dict[str, float]] = []  # of ours

    def take(self, batches: Iterator) -> Iterator:
        """The loop's batches, until there are enough steps; the bare loop's blocks are run between them."""
        for number in range(self._rounds + 1):
            self._clock.on = number == self._rounds  # the last block only: on a GPU its waits cost time
            self._use([])
            self.ours.append([])
            for _ in range(self._block):
                self._clock.parts.clear()
                yield from self._timed(batches, self.ours[-1])
                self.parts.append(dict(self._clock.parts) | {"whole": self.ours[-1][-1]})
            for name, on in self._ways() if number < self._rounds else []:
                self._use(on)
                self.shorter.setdefault(name, []).append([])
                for _ in range(self._block):
                    yield from self._timed(batches, self.shorter[name][-1])
            self.theirs.append([self._bare_step() for _ in range(self._block)])
        raise Finished

    def _timed(self, batches: Iterator, seconds: list[float]) -> Iterator:
        """The next batch; what passes until the one after it is asked for is added to `seconds`."""
        mark = time.perf_counter()
        with self._clock("data"):
            batch = next(batches)
        yield batch
        self._clock.wait()
        seconds.append(time.perf_counter() - mark)

    def _ways(self) -> list[tuple[str, list[str]]]:
        each = [(name, [on]) for name, on in SHORTCUTS.items() if on in self._has]
        return [*each, ("all of these", self._has)] if len(each) > 1 else each

    def _use(self, on: list[str]) -> None:
        for name in self._has:
            setattr(self._model, name, name in on)

    def _bare_step(self) -> float:
        mark = time.perf_counter()
        self._bare()
        self._clock.wait()
        return time.perf_counter() - mark


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
        learner = Learner(build(config.model, data.num_frames, data.image_size)).to(device)
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


def report(args, config, session, turns: Turns, flops: float, peak: float | None) -> None:
    blocks = {"c4c": turns.ours[:-1], "plain PyTorch": turns.theirs[:-1]}
    median = {name: [statistics.median(block[WARM:]) for block in each] for name, each in blocks.items()}
    overhead = 100 * (statistics.median(a / b for a, b in zip(*median.values(), strict=True)) - 1)
    rows = {}
    for name, each in median.items():
        step = statistics.median(each)
        rows[name] = {"step_s": step, "clips_per_s": config.train.batch_size / step, "tflop_per_s": flops / step / 1e12}
        rows[name]["mfu_pct"] = 100 * flops / step / (peak * session.world) if peak else None
    split, last = {}, turns.parts[-args.block :][WARM:]
    for part in ("data", "forward", "backward", "optimizer", "communication"):
        split[f"{part}_s"] = statistics.median(p.get(part, 0.0) for p in last)
    split["rest_s"] = statistics.median(p["whole"] for p in last) - sum(split.values())
    show(rows, split)
    ratios = {name: _ratio(blocks, median["c4c"]) for name, blocks in turns.shorter.items()}
    if ratios:
        shown = [[name, f"{ratio:.3f}"] for name, ratio in ratios.items()]
        harness.show(["c4c with engine.", "of its plain step's time"], shown)
    print(f"c4c takes {overhead:+.1f} % over plain PyTorch (median of {args.rounds} rounds of {args.block} steps each)")
    words = [*SETTINGS, f"engine.precision={config.engine.precision}", *args.overrides]
    out = {"machine": harness.machine() | {"device": device_name(session.device)},
           "versions": harness.versions("torch", "deepspeed", "numpy"), "ranks": session.world, "settings": words,
           "weights": session.weights, "rounds": args.rounds, "block": args.block, "overhead_pct": overhead, "ways": rows,
           "split": split, "step_s_by_round": median, "shortcuts_of_plain_step": ratios}  # fmt: skip
    harness.save(args.json, out)


def _ratio(blocks: list[list[float]], plain: list[float]) -> float:
    """The median over rounds of a block's median step over that of the plain block of its round."""
    medians = [statistics.median(block[WARM:]) for block in blocks]
    return statistics.median(a / b for a, b in zip(medians, plain, strict=True))


def show(rows: dict[str, dict], split: dict[str, float]) -> None:
    figures = (("step_s", ".3f"), ("clips_per_s", ".1f"), ("tflop_per_s", ".3f"))
    told = []
    for name, row in rows.items():
        mfu = "peak unknown" if row["mfu_pct"] is None else harness.number(row["mfu_pct"])
        told.append([name, *(harness.number(row[key], form) for key, form in figures), mfu])
    harness.show(["", "step s", "clips/s", "TFLOP/s", "MFU %"], told)
    shares = [[part[:-2], f"{s:.4f}", f"{100 * s / sum(split.values()):.1f}"] for part, s in split.items()]
    harness.show(["of a c4c step", "s", "%"], shares)


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())

"""What each option beyond CLIP4Clip's recipe gives and costs on the demo set, beside the same run without it.

    python bench/options.py [--only NAME ...] [--seeds 42 43 44] [--jobs 2] [--json bench/results/options.json] [key=value ...]

Each row of ROWS is a training with every seed, on one core each, `--jobs` at a time; a run in runs/options that is done is only read, so
an interrupted benchmark goes on. A run that was made with other settings than asked for now, or that is older than a run it was made from,
is an error. Rows of one group differ in the option alone. R@1 is that of the last step, never of the best. Of
order-only pairs, two videos that show the same frames in opposite order, the share of texts that score their own video above its twin
stands beside it: chance is 50 %. Speed in training is that of 25 further steps of each row at the end, `--jobs` rows at a time, and of the fastest tenth of them,
since other work on the machine only slows; at inference it is that of the image tower and the head on random clips, on one core, the median over
rounds in which all rows have a turn. Memory is the most that the process held. key=value words are settings of all runs but those of stage one.

Needs data/demo and data/narrated (python -m c4c.shard demo --out data/demo; python -m c4c.shard demo-narrated --out data/narrated).
Writes the JSON at the end, and beside it a table in Markdown.
"""

import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.harness import ROOT
from c4c.study.outcomes import measured, speed_of
from c4c.study.statistics import compare, estimate
from c4c.training.run_folder import DONE, read_done
from pipelines.quarantine import json_lines

RUNS, RECIPES = ROOT / "runs/options", ROOT / "launch/cfg"
BASE = (
    "run.deterministic=true", "data.num_frames=2", "data.sampling=segment", "model.backbone=ViT-demo-16-small", "train.lr=2.0e-3",
    "train.batch_size=64", "train.max_steps=180", "train.warmup_epochs=0.5", "train.eval_every=0", "checkpoint.keep_best=0",
    "checkpoint.keep_last=3",
)  # fmt: skip
SHORTCUTS = ("engine.fold_pixels=true", "engine.trim_captions=true", "engine.share_captions=true")
STAGE_ONE = "stage one"
KEYS = {"R1": "t2v_R1", "R5": "t2v_R5", "v2t_R1": "v2t_R1", "pairs_R1": "pairs_R1", "own_first": "pairs_own_first"}
HEADS = ["", "R@1 %", "difference (95 %)", "own video above its twin %", "training, clips/s", "inference, clips/s", "MFLOP a video", "bytes a video",
         "memory, GiB", "trained, M"]  # fmt: skip
CLIPS = 32  # at once, where inference is timed
BRIEF = ("train.max_steps=25", "checkpoint.keep_last=1")  # where training is timed


@dataclass(frozen=True)
class Row:
    """A row of the table.

    settings: of the training, beside BASE. start, teacher: names of rows whose runs it starts from, or learns from. of: evaluate that row's
    run instead of training, with the words `flags`; average: of how many of its checkpoints. once: with the first seed only. beside: the row it is compared with.
    published: what its source reports, and the source.
    """

    name: str
    settings: tuple[str, ...] = ()
    cfg: str = "demo.yaml"
    start: str = ""
    teacher: str = ""
    of: str = ""
    flags: tuple[str, ...] = ()
    average: int = 0
    once: bool = False
    beside: str = "plain"
    published: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Rows whose runs must be there."""
        return tuple(filter(None, (self.start, self.teacher, self.of, self.beside)))

    @property
    def depth(self) -> int:
        """How many others have to run before it."""
        before = [row.depth for row in ROWS if row.name in (self.start, self.teacher, self.of)]
        return 1 + max(before) if before else 0


def folder_of(name: str, seed: int) -> Path:
    """Where a row's run is."""
    return RUNS / f"{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}-{seed}"


_DRL, _TEMPME = "[DRL](https://github.com/foolwood/DRL)", "[TempMe](https://arxiv.org/abs/2409.01156)"
ROWS = (
    Row("plain"),
    Row("wti", ("model.head=wti",), published=f"{_DRL}, a transformer before it: 46.6, unweighted 44.8"),
    Row("wti, decorrelated", ("model.head=wti", "train.decorrelation=0.001"), beside="wti", published=f"{_DRL}: 46.6 to 47.6"),
    Row("seqTransf", ("model.head=seqTransf",), published="[CLIP4Clip](https://arxiv.org/abs/2104.08860): 43.1 to 44.5"),
    Row("seqWTI, decorrelated", ("model.head=seqWTI", "train.decorrelation=0.001"), published=f"{_DRL}: 47.6"),
    Row("merged", ("model.merge=2",), published=f"{_TEMPME}: half the operations, training 1.57 × as fast"),
    Row("merged, across frames", ("model.merge=2", "model.merge_frames=[1]"), published=f"{_TEMPME}: the same"),
    Row("merged in evaluation only", of="plain", flags=("--merge", "2")),
    Row("taught by wti", teacher="wti", published="[TeachCLIP](teachers.md): 43.1 to 45.2 or 46.8"),
    Row("5 captions a video", ("train.captions_per_video=5",)),
    Row("label smoothing 0.1", ("train.label_smoothing=0.1",)),
    Row("averaged weights (EMA)", ("train.ema=0.98",)),
    Row("average of 3 checkpoints", of="plain", average=3),
    Row("three shortcuts", SHORTCUTS),
    Row("together", ("model.head=seqTransf", "train.label_smoothing=0.1", "train.ema=0.98", *SHORTCUTS)),
    Row(STAGE_ONE, cfg="demo_narrated.yaml", once=True, beside=""),
    Row("from stage one, all weights", start=STAGE_ONE, beside="plain"),
    Row("from stage one, LoRA", ("train.lora=8", "train.lora_on=all"), start=STAGE_ONE, beside="from stage one, all weights"),
    Row("from stage one, prompts", ("train.prompts=4",), start=STAGE_ONE, beside="from stage one, all weights",
        published="[DGL](https://arxiv.org/abs/2401.10588): as good as full training"),
)  # fmt: skip


def main() -> int:
    parser = harness.parser(__doc__, "options", only=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument(
        "--jobs", type=int, default=2, help="trainings at a time, each on one core (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns that speed at inference is measured in")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    rows = chosen(args.only)
    first = args.seeds[0]
    cells = [
        Cell(row, seed, tuple(args.overrides), first)
        for seed in args.seeds
        for row in rows
        if seed == first or not row.once
    ]
    timed = [replace(cell, brief=True) for cell in cells if cell.seed == first and cell.is_timed]
    with contextlib.chdir(ROOT):  # where paths in settings begin
        require_data(rows)
        for cell in [*cells, *timed]:
            cell.require_current()
    for wave in (0, 1, 2):  # what starts from another run, or evaluates one, comes after it
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(Cell.run, [cell for cell in cells if cell.row.depth == wave]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(Cell.run, timed))
    speeds = inference([cell for cell in cells if cell.seed == first], args.rounds)
    found = [outcome_of(row, [cell for cell in cells if cell.row is row], speeds) for row in rows]
    beside_baseline(found)
    about = harness.machine() | harness.versions("torch", "deepspeed", "open_clip_torch", "nvidia-dali-cuda130")
    settings = [*BASE, *args.overrides]
    place = harness.result_path(args.json, "options.json", args.only)
    harness.save(place, {"machine": about, "seeds": args.seeds, "jobs": args.jobs, "settings": settings, "rows": found})
    show(found, place and place.with_suffix(".md"))
    return 0


def require_data(rows: Sequence[Row]) -> None:
    """End with a message, before anything is trained, if a data set is not there."""
    needed = {"data/demo": "demo"} | (
        {"data/narrated": "demo-narrated"} if any(row.cfg != "demo.yaml" for row in rows) else {}
    )
    for folder, name in needed.items():
        if not Path(folder).is_dir():
            sys.exit(f"error: there is no {folder}: make it with python -m c4c.shard {name} --out {folder}")


def chosen(only: Sequence[str]) -> list[Row]:
    """The rows that `--only` names pieces of, with those that they need or are compared with, in the order of ROWS."""
    by_name = {row.name: row for row in ROWS}
    if unknown := [part for part in only if not any(part in name for name in by_name)]:
        raise SystemExit(f"--only {unknown[0]}: no row has that in its name; the rows are: {'; '.join(by_name)}")
    wanted = [row for row in ROWS if harness.is_chosen(only, row.name)]
    names: set[str] = set()
    while wanted:
        row = wanted.pop()
        names.add(row.name)
        wanted += [by_name[name] for name in row.needs if name not in names]
    return [row for row in ROWS if row.name in names]


@dataclass(frozen=True)
class Cell:
    """A row with one seed."""

    row: Row
    seed: int
    overrides: tuple[str, ...]
    first: int  # of the seeds
    brief: bool = False  # only to be timed

    @property
    def folder(self) -> Path:
        return folder_of(f"timed {self.row.name}" if self.brief else self.row.name, self.seed)

    @property
    def is_timed(self) -> bool:
        """Whether it is a training that stands beside others."""
        return not self.row.of and bool(self.row.beside)

    def source(self, name: str) -> Path:
        """The run of the row `name` that goes with this one."""
        once = next(row for row in ROWS if row.name == name).once
        return folder_of(name, self.first if once else self.seed)

    @property
    def words(self) -> list[str]:
        """The settings of a training."""
        row = self.row
        words = [] if row.cfg != "demo.yaml" else [*BASE, *self.overrides]
        words += BRIEF if self.brief else ()
        words += [*row.settings, f"run.seed={self.seed}", f"run.dir={self.folder.relative_to(ROOT)}", "run.resume=auto"]
        words += [f"model.init_from={self.source(row.start).relative_to(ROOT)}"] if row.start else []
        return words + ([f"train.teacher={self.source(row.teacher).relative_to(ROOT)}"] if row.teacher else [])

    def require_current(self) -> None:
        """End with a message if what is done was made with other settings, or from runs that have been made again since."""
        from c4c.config import load
        from c4c.training.continuation import require_continues

        done = self.folder / ("eval.json" if self.row.of else DONE)
        if not done.exists():
            return
        for name in filter(None, (self.row.start, self.row.teacher, self.row.of)):
            source = self.source(name) / DONE
            if not source.exists() or source.stat().st_mtime > done.stat().st_mtime:
                sys.exit(f"error: {self.folder} was made from another {source.parent} than there is now. Delete it")
        if not self.row.of:
            try:
                require_continues(self.folder, load(self.row.cfg, self.words, [RECIPES]))
            except ValueError as error:
                sys.exit(f"error: delete {self.folder}, or set its settings back: {error}")

    def run(self) -> None:
        """Train or evaluate, unless that is done. Raises subprocess.CalledProcessError."""
        row, folder = self.row, self.folder
        if not row.of:
            return None if read_done(folder) else start("launch/train.py", "--cfg", row.cfg, *self.words, log=folder)
        if (folder / "eval.json").exists():
            return None
        source = self.source(row.of)
        if row.average:
            start("-m", "c4c.average", source, "--last", row.average, "--out", folder / "average", log=folder)
            source = folder / "average"
        return start("launch/eval.py", "--ckpt", source, *row.flags, "--json", folder / "eval.json", log=folder)


def start(*words: object, log: Path) -> None:
    """Run Python with these words on one core, and print what the row is once it has ended. Raises subprocess.CalledProcessError."""
    log.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(log / "output.log", "ab") as file:
        command, environment = [sys.executable, *map(str, words)], harness.environment(OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    print(f"{log.name}: {time.time() - began:.0f} s, exit {done.returncode}", flush=True)
    if done.returncode:
        print((log / "output.log").read_text(errors="replace")[-2000:], file=sys.stderr)
        done.check_returncode()


def inference(cells: Iterable[Cell], rounds: int) -> dict[str, dict]:
    """By row: clips per second of the image tower and the head on one core, the median over rounds in which all rows have a turn; bytes that
    stand for a video; operations of the image tower for one."""
    import torch

    from c4c.merging import Merging
    from c4c.models.flops import per_pair
    from c4c.models.pretrained import open_checkpoint

    torch.set_num_threads(1)
    ways: dict[str, Callable[[], tuple[float, int]]] = {}
    operations: dict[str, float] = {}
    for cell in cells:
        row = cell.row
        merging = Merging(tokens=int(row.flags[1])) if "--merge" in row.flags else None
        source = cell.folder / "average" if row.average else cell.source(row.of or row.name)
        model, data = open_checkpoint(str(source), merging=merging)
        draw = torch.Generator().manual_seed(0)
        frames = torch.randn(CLIPS, data.num_frames, 3, data.image_size, data.image_size, generator=draw)
        mask = torch.ones(CLIPS, data.num_frames, dtype=torch.bool)

        def encode(model=model, frames=frames, mask=mask) -> tuple[float, int]:
            mark = time.perf_counter()
            with torch.inference_mode():
                made = model.head.video(model.encode_video(frames, mask), mask)
            return CLIPS / (time.perf_counter() - mark), made.nbytes // CLIPS

        encode()
        ways[row.name] = encode
        operations[row.name] = per_pair(model.spec, data.num_frames, data.max_words, captions=0, merging=model.merging)
    found = harness.in_turn(ways, rounds)
    return {
        name: {
            "inference_clips_per_s": statistics.median(speed for speed, _ in each),
            "bytes_a_video": each[0][1],
            "flop_a_video": operations[name],
        }
        for name, each in found.items()
    }


def outcome_of(row: Row, cells: Sequence[Cell], speeds: dict[str, dict]) -> dict:
    """What the runs of a row came to."""
    from c4c.config import from_dict
    from c4c.performance.counts import meta_model
    from c4c.training.run_folder import read_config

    metrics = [measured(cell.folder, not row.of).metrics for cell in cells]
    out: dict = {"row": row.name, "beside": row.beside, "published": row.published}
    out |= {"settings": row.settings, "flags": row.flags} | speeds[row.name]
    out |= {key: [each.get(name) for each in metrics] for key, name in KEYS.items()}
    if row.of:
        return out
    model = meta_model(from_dict(read_config(cells[0].folder)))
    return out | {
        "train_clips_per_s": clips_per_s(replace(cells[0], brief=cells[0].is_timed).folder),
        "memory_gib": [speed_of(cell.folder)[1] for cell in cells],
        "weights": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def clips_per_s(folder: Path) -> float:
    """Of the step that nine in ten of a run's steps are slower than."""
    speeds = sorted(row["clips_per_s"] for row in json_lines(folder / "metrics.jsonl"))
    return speeds[len(speeds) * 9 // 10]


def beside_baseline(found: list[dict]) -> None:
    """Add to each row what it is compared with: the difference in R@1 by seed, and the ratios of its speeds."""
    by_name = {row["row"]: row for row in found}
    for row in found:
        base = by_name.get(row["beside"])
        if base is None or base is row:
            continue
        difference = compare([a - b for a, b in zip(row["R1"], base["R1"], strict=True)])
        row["R1_difference"] = asdict(difference) if difference else None
        row["inference_ratio"] = row["inference_clips_per_s"] / base["inference_clips_per_s"]
        if "train_clips_per_s" in row and "train_clips_per_s" in base:
            row["train_ratio"] = row["train_clips_per_s"] / base["train_clips_per_s"]


def cells_of(row: dict) -> list[str]:
    """A line of the table."""
    difference = row.get("R1_difference")
    change = "" if not difference else f"{difference['mean']:+.1f}"
    if difference and difference["low"] is not None:
        change += f" ({difference['low']:+.1f} to {difference['high']:+.1f})"
    return [
        row["row"], _spread(row["R1"]), change, _spread(row["own_first"]), _times(row, "train"), _times(row, "inference"),
        harness.number(row["flop_a_video"], ".0f", 1e6), harness.number(row["bytes_a_video"], ".0f"), _most(row.get("memory_gib"), ".2f"), harness.number(row.get("trained"), ".3f", 1e6),
    ]  # fmt: skip


def show(found: list[dict], markdown: Path | None) -> None:
    rows = [cells_of(row) for row in found]
    harness.show(HEADS, rows, width=180)
    if markdown:
        wide = [[*line, row["published"] or "-"] for line, row in zip(rows, found, strict=True)]
        lines = [[*HEADS, "published, t2v R@1 on MSR-VTT"], ["---"] * (len(HEADS) + 1), *wide]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def _spread(values: Sequence[float | None]) -> str:
    known = estimate([value for value in values if value is not None])
    if known is None:
        return "-"
    return f"{known.mean:.1f}" + ("" if known.sd is None else f" ± {known.sd:.1f}")


def _times(row: dict, name: str) -> str:
    """Clips per second, and how many times the baseline's that is."""
    speed = row.get(f"{name}_clips_per_s")
    if speed is None:
        return "-"
    ratio = row.get(f"{name}_ratio")
    return f"{speed:.0f}" + (f" ({ratio:.2f} ×)" if ratio else "")


def _most(values: Sequence[float] | None, form: str) -> str:
    return harness.number(max(values) if values else None, form)


if __name__ == "__main__":
    sys.exit(main())

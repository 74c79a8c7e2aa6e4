"""A run folder: everything that evaluation and resuming need, and all that was measured."""

import contextlib
import importlib.util
import json
import os
import platform
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from c4c.files import read_json_object, read_yaml, replace_text, require_folder
from pipelines.bounds import check_values
from pipelines.quarantine import json_lines

RESUME = ("never", "auto")
DONE = "done.json"
RANKS = "ranks.jsonl"  # of the last validation, a line a text
SCORE = "val/t2v_R1_pct"
_NAMED = 8  # of many differences
_PACKAGES = (
    "torch",
    "nvidia-dali-cuda130",
    "deepspeed",
    "open_clip_torch",
    "webdataset",
    "av",
    "pyarrow",
    "numpy",
    "c4c",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and what happens if something lives there already."""

    dir: str = "runs/run"
    seed: int = 42
    deterministic: bool = False  # the same losses bit for bit on the same machine and ranks; slower on a GPU
    resume: str = "never"  # never: an earlier run in `dir` is moved aside; auto: it is continued where it stopped
    wandb: str = ""  # a project of Weights & Biases to send the metrics to as well; needs its package and a login

    def __post_init__(self):
        check_values("run", self, {"seed": (0, 2**63 - 1)})
        if self.resume not in RESUME:
            raise ValueError(f"run.resume must be never or auto; got {self.resume!r}")
        if not self.dir:
            raise ValueError("run.dir is empty: name a folder for the run")


def require_wandb(project: str) -> None:
    """Raise ValueError if metrics are to go there and the package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"run.wandb={project} needs the package wandb: pip install wandb, or leave run.wandb out")


_OTHERS_CONFIGS = ("open_clip_config.json", "config.json")  # of folders with weights of open_clip and transformers
_FILES = ("config.yaml", "towers.json", "versions.json", "metrics.jsonl", "eval.jsonl", RANKS, DONE, "quarantine.jsonl", "bad_steps.jsonl",
          "checkpoints/latest")  # fmt: skip


def require_place(folder: Path) -> None:
    """Raise ValueError if the run folder cannot be made or written to."""
    require_folder(f"run.dir={folder}", folder)
    for name in _FILES:
        if (folder / name).is_dir():
            raise ValueError(
                f"run.dir={folder}: {folder / name} is a folder, but a run writes a file of that name: move the folder away"
            )


def prepare(folder: Path, resume: str, continues: bool = True) -> Path | None:
    """Make the run folder; called on one rank. Returns where an earlier run was moved to, if it was.

    continues: whether there are checkpoints to resume from. A complete run without is not written over.
    """
    moved = None
    aside = resume == "never" or (not continues and (folder / DONE).exists())
    if aside and any((folder / name).exists() for name in ("config.yaml", "checkpoints", "metrics.jsonl")):
        moved = _free_name(folder)
        os.rename(folder, moved)
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def save_description(folder: Path, config_text: str, towers: dict) -> None:
    """Write config.yaml, towers.json and versions.json."""
    versions: dict[str, str | None] = {name: _version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "machine": platform.machine(), "system": platform.platform()}
    texts = {
        "config.yaml": config_text,
        "towers.json": json.dumps(towers, indent=2) + "\n",
        "versions.json": json.dumps(versions, indent=2) + "\n",
    }
    replace_text({folder / name: text for name, text in texts.items()})


def read_towers(folder: Path) -> dict | None:
    """The towers of the run, as `save_description` wrote them; None for a run without. Raises ValueError if the file is damaged."""
    path = folder / "towers.json"
    return read_json_object(path) if path.is_file() else None


def mark_done(folder: Path, step: int, best: str, data: dict[str, str] | None = None) -> None:
    """Write done.json, which marks the run as completed: its last step, its best checkpoint, the digests of `data`, and the time."""
    path = folder / DONE
    about = {"step": step, "best": best, "data": data or {}}
    if not path.exists():  # continuing a run that is done changes nothing
        replace_text({path: json.dumps(about | {"time_unix_s": round(time.time(), 3)}) + "\n"})


def reopen(folder: Path) -> None:
    """A run that goes on is not complete any more: one that `train.patience` has ended, say."""
    (folder / DONE).unlink(missing_ok=True)


def read_done(folder: Path) -> dict | None:
    """What `mark_done` wrote; None if the run was not completed."""
    path = folder / DONE
    return read_json_object(path) if path.exists() else None


def is_run(name: str) -> bool:
    """Whether a checkpoint's name means a run folder, existing or not: neither a file of any kind, nor TAG:BACKBONE, nor a
    folder of open_clip's or transformers'."""
    path = Path(name)
    if path.is_dir():
        return (path / "config.yaml").is_file() or not any((path / name).is_file() for name in _OTHERS_CONFIGS)
    return path.suffix == "" and ":" not in name and not path.exists()


def run_of_file(path: Path) -> tuple[Path, str, bool] | None:
    """(run folder, checkpoint, whether it is the averaged weights) of a file of weights of a checkpoint that lies in its run: its
    model.safetensors or ema.safetensors; None for any other file."""
    folder = path.absolute().parent
    run = folder.parent.parent
    is_weights = path.name in ("model.safetensors", "ema.safetensors")
    inside = is_weights and folder.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    return (run, folder.name, path.name == "ema.safetensors") if inside else None


def located(name: str, tag: str | None, ema: bool = True) -> tuple[str, str | None, bool]:
    """What `--ckpt`, `--tag` and `--no-ema` mean: a file of weights of a run's checkpoint is that checkpoint, with the averaged weights
    if it is its ema.safetensors.

    Raises ValueError if the file and an option name two.
    """
    if (inside := run_of_file(Path(name))) is None or not Path(name).is_file():
        return name, tag, ema
    if tag not in (None, inside[1]):
        raise ValueError(f"--tag {tag}, but {name} is checkpoint {inside[1]}: leave one of them away")
    if inside[2] and not ema:
        raise ValueError(f"--no-ema, but {name} holds averaged weights: leave one of them away")
    return str(inside[0]), inside[1], inside[2]


def _run_around(folder: Path) -> str:
    """What to write instead of the name of a folder inside a run; '' if it is in none."""
    inner, tag = folder.absolute(), ""
    if inner.parent.name == "checkpoints":
        inner, tag = inner.parent, inner.name
    if inner.name != "checkpoints" or not (inner.parent / "config.yaml").is_file():
        return ""
    run, tag = shlex.quote(str(inner.parent)), shlex.quote(tag) if tag else "step…"
    return f"Use --ckpt {run} --tag {tag}, in training model.init_from={run} model.init_tag={tag}: "


def read_config(folder: Path) -> dict:
    """The resolved configuration of a run, as plain dicts. Raises ValueError if the folder is no run, or damaged."""
    path = folder / "config.yaml"
    if not folder.exists():
        raise ValueError(f"there is no run folder {folder} (looked in {Path.cwd()})")
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no config.yaml. {_run_around(folder)}A run folder is what run.dir named in training"
        )
    try:
        config = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}: the file is damaged") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return config


# what may differ between a run and its continuation: none of it changes what a step computes, but for rounding
_FREE = ("run.dir", "run.resume", "run.deterministic", "run.wandb", "checkpoint.", "engine.zero_stage", "engine.offload",
         "engine.compile", "engine.fold_pixels", "engine.trim_captions", "engine.share_captions",
         "engine.activation_checkpointing", "engine.timeout_s", "deepspeed.zero_optimization.",
         "deepspeed.comms_logger.", "deepspeed.flops_profiler.", "deepspeed.wall_clock_breakdown", "deepspeed.steps_per_print",
         "train.eval_every", "train.patience", "train.micro_batch_size", "train.max_bad_steps", "data.test", "data.threads",
         "data.prefetch", "data.read_timeout_s", "data.local_", "data.ahead", "data.server_timeout_s", "cache.dir",
         "cache.max_gb", "data.eval_batch_size", "data.max_bad_fraction", "data.lane", "data.decode", "data.jpeg_crop",
         "data.hw_decoder_load", "deepspeed.optimizer.params.torch_adam")  # fmt: skip

_LENGTH = {"train.epochs", "train.max_steps"}


def check_continuation(folder: Path, config: dict, defaults: dict | None = None, free: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming every difference, if `config` would not continue the run in `folder`.

    defaults: what a setting was before there was a key for it. free: further keys that may differ.
    """
    try:
        before, now = _flat(defaults or {}) | _flat(read_config(folder)), _flat(config)
    except ValueError as error:
        raise ValueError(
            f"run.resume=auto: {error}. Put a copy of the file back, or start anew with run.resume=never, which moves the old run aside"
        ) from error
    free = (*free, *(_idle(before) & _idle(now)))
    kept = [k for k in sorted(before.keys() | now.keys()) if k not in free and not k.startswith(_FREE)]
    keys = [k for k in kept if before.get(k) != now.get(k)]
    if keys:
        changes = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in keys[:_NAMED])
        changes += f"; and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
        why = "; the learning rate's schedule spans all steps" if _LENGTH.intersection(keys) else ""
        anew = shlex.join([f"model.init_from={folder}", f"run.dir={_free_name(folder, '-')}"])
        raise ValueError(
            f"run.resume=auto: {folder} was made with other settings ({changes}{why}). Set them back, or train its weights "
            f"further as a new run: {anew} (run.resume=never moves the old run aside and starts anew)"
        )


def _idle(settings: dict[str, object]) -> set[str]:
    """Which of those that `c4c.config.require` refuses by now did nothing: a run that has one goes on without it."""
    out = set() if settings.get("train.lora") else {"train.lora_on", "train.lora_alpha"}
    out |= set() if settings.get("train.loss") == "sigmoid" else {"train.logit_bias"}
    start = str(settings.get("model.init_from") or "")
    return out | ({"model.init_tag"} if start == "scratch" or Path(start).is_file() else set())


def _flat(tree: dict, prefix: str = "") -> dict:
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def last_validation(folder: Path) -> int | None:
    """The step of the run's last validation, None before the first."""
    return max((step for step, _ in _scores(folder)), default=None)


def score(row: dict) -> float:
    """Text-to-video R@1 of a line of eval.jsonl, by which the best checkpoint is found. Raises KeyError."""
    return row[SCORE] if SCORE in row else row["val/t2v_R1"]  # before names said units


def validations(folder: Path, last: float = float("inf")) -> list[float]:
    """Text-to-video R@1 of all validations so far, up to that after step `last`."""
    return [r1 for step, r1 in _scores(folder) if step <= last]


def scores(folder: Path) -> dict[int, float]:
    """Text-to-video R@1 of all validations so far, by step."""
    return dict(_scores(folder))


def _scores(folder: Path) -> list[tuple[int, float]]:
    rows = []
    for row in json_lines(folder / "eval.jsonl"):
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # a damaged line
            rows.append((int(row["step"]), float(score(row))))
    return rows


def _free_name(folder: Path, suffix: str = ".old") -> Path:
    n = 1
    while (target := folder.with_name(f"{folder.name}{suffix}{n}")).exists():
        n += 1
    return target


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

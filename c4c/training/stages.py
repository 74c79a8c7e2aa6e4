"""Stages one after another: training runs and evaluations, each a command of launch/, as one yaml file lists them.

    launcher: deepspeed                      # how launch/train.py is started; torchrun --nproc_per_node 8, say
    stages:
      - name: pretrain
        cfg: pretrain_howto100m.yaml         # of launch/train.py
        set: {run.dir: runs/pretrain}        # settings over it
      - name: zero-shot
        eval: pretrain                       # scores that stage's best checkpoint; RUN/zero-shot.json
        data: data/msrvtt/test
      - name: finetune
        cfg: msrvtt.yaml
        from: pretrain                       # starts from that stage's best checkpoint
        set: {run.dir: runs/msrvtt}

A run that is done has a done.json. A stage that starts from another notes which in RUN/started_from.json, so that no later
call takes it for the continuation of another one.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from c4c.config import Config, ConfigError, load, require_data
from c4c.files import read_json_object, read_yaml
from c4c.training.continuation import require_continues
from c4c.training.run_folder import DONE, read_done
from pipelines.config import DataConfig

_STARTED_FROM = "started_from.json"
_KEYS = {"train": {"name", "cfg", "from", "set"}, "eval": {"name", "eval", "data", "set"}}


@dataclass(frozen=True)
class Stage:
    """One entry of `stages`. Of a training stage `config` is set, of an evaluation `of`: the training stage it scores."""

    name: str
    run: Path
    cfg: str = ""
    words: tuple[str, ...] = ()  # key=value over the file
    config: Config | None = None
    source: "Stage | None" = None
    of: "Stage | None" = None
    data: str = ""

    @property
    def result(self) -> Path:
        """Of an evaluation: where its metrics go."""
        return self.run / f"{self.name}.json"


@dataclass(frozen=True)
class Pipeline:
    """Stages in order, and the command that starts a training."""

    launcher: tuple[str, ...]
    stages: list[Stage] = field(default_factory=list)


class StageError(ValueError):
    """A stage that failed, was stopped, or cannot be run as written."""


def read(path: Path, overrides: Sequence[str] = (), search: Sequence[Path] = (), launcher: str = "") -> Pipeline:
    """The stages in a yaml file. overrides: NAME.key=value words for the stage NAME. Raises ValueError."""
    file = next((p for p in (path, *(folder / path for folder in search)) if p.is_file()), None)
    if file is None:
        raise ConfigError(f"no pipeline {path}; looked at {', '.join(map(str, [path, *(s / path for s in search)]))}")
    try:
        tree = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    right = {"stages": list, "launcher": str}
    if (
        not isinstance(tree, dict) or "stages" not in tree
        or not all(isinstance(value, right.get(key, ())) for key, value in tree.items())
    ):  # fmt: skip
        raise ConfigError(
            f"{file}: a pipeline has a list `stages` and, if needed, `launcher`; c4c/training/stages.py shows an example"
        )
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in tree["stages"]]
    for word in overrides:
        if word.partition(".")[0] not in names or "=" not in word:
            raise ConfigError(
                f"{word!r} on the command line: write it as STAGE.key=value, where STAGE is one of {', '.join(names)}"
            )
    stages: dict[str, Stage] = {}
    for entry in tree["stages"]:
        own = [word.partition(".")[2] for word in overrides if word.partition(".")[0] == str(entry.get("name"))]
        stage = _stage(entry, own, stages, file, search)
        stages[stage.name] = stage
    launcher = str(launcher or tree.get("launcher", "deepspeed"))
    try:
        command = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"launcher {launcher!r}: {error}") from error
    return Pipeline(tuple(command), list(stages.values()))


def _stage(entry: dict, overrides: list[str], before: dict[str, Stage], path: Path, search: Sequence[Path]) -> Stage:
    kind = "eval" if isinstance(entry, dict) and "eval" in entry else "train"
    needed = {"name", "cfg" if kind == "train" else "eval"}
    if not isinstance(entry, dict) or not needed <= entry.keys() <= _KEYS[kind]:
        known = " or ".join(", ".join(sorted(keys)) for keys in _KEYS.values())
        raise ConfigError(f"{path}: {str(entry)[:200]} is not a stage: a stage has the keys {known}")
    if not isinstance(entry.get("cfg", ""), str) or not isinstance(entry.get("set") or {}, dict):
        raise ConfigError(f"{path}: stage {entry['name']}: cfg must be the name of a file, and set keys and values")
    name = str(entry["name"])
    if name in before or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{path}: stage {name!r}: its name must be unique and consist of letters, digits, - and _")
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in (entry.get("set") or {}).items()
    ] + overrides
    if kind == "eval":
        of = _earlier(entry["eval"], before, name, path)
        return Stage(name, of.run, words=tuple(words), of=of, data=str(entry.get("data", "")))
    source = _earlier(entry["from"], before, name, path) if "from" in entry else None
    if source:
        words = [f"model.init_from={source.run}", "model.init_tag=best", *words]
    words.append("run.resume=auto")
    try:
        config = load(entry["cfg"], words, [path.parent, *search])
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error
    run = Path(config.run.dir)
    if same := [s.name for s in before.values() if s.config and s.run == run]:
        raise ConfigError(
            f"{path}: the stages {same[0]} and {name} both have run.dir={run}: set another in one of them"
        )
    return Stage(name, run, entry["cfg"], tuple(words), config, source)


def _earlier(name: object, before: dict[str, Stage], own: str, path: Path) -> Stage:
    stage = before.get(str(name))
    if stage is None or stage.config is None:
        known = ", ".join(s.name for s in before.values() if s.config) or "none"
        raise ConfigError(f"{path}: stage {own} refers to stage {name}; the training stages before it are: {known}")
    return stage


def require_data_of(pipeline: Pipeline) -> None:
    """Raise StageError if the folder of a split is not there that a stage will read which is not done, before the first one runs."""
    for stage in pipeline.stages:
        trained = stage.of.config if stage.of else stage.config
        if trained is None or (stage.config and read_done(stage.run)) or (stage.of and stage.result.exists()):
            continue
        test = stage.data or trained.data.test
        try:
            require_data(trained.data if stage.config else DataConfig(train=test, test=test))
        except ConfigError as error:
            raise StageError(f"stage {stage.name}: {error}") from error


def run(pipeline: Pipeline, scripts: Path, say: Callable[[str], None]) -> None:
    """Run what is not done, in order. scripts: the folder of train.py and eval.py. Raises StageError."""
    for number, stage in enumerate(pipeline.stages, 1):
        head = f"stage {number}/{len(pipeline.stages)}, {stage.name}:"

        def tell(text: str, head: str = head) -> None:
            say(f"{head} {text}")

        if stage.config:
            _train(stage, stage.config, [*pipeline.launcher, str(scripts / "train.py")], tell)
        else:
            _evaluate(stage, [sys.executable, str(scripts / "eval.py")], tell)


def table(pipeline: Pipeline) -> Table:
    """What the evaluations found."""
    out = Table(title="text to video")
    for name in ("", "R@1 %", "R@5 %", "R@10 %", "MdR"):
        out.add_column(name, justify="left" if not name else "right")
    for stage in pipeline.stages:
        if stage.of:
            out.add_row(stage.name, *(f"{value:.1f}" for value in scored(stage.result)))
    return out


def scored(result: Path) -> list[float]:
    """Text-to-video R@1, R@5, R@10 and MdR of an evaluation. Raises StageError if its file is damaged."""
    try:
        row = json.loads(result.read_bytes())["t2v"]
        return [float(row[k]) for k in ("R1", "R5", "R10", "MdR")]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise StageError(
            f"{result} is damaged ({type(error).__name__}: {error}): delete it, and the same command evaluates again"
        ) from error


def _train(stage: Stage, config: Config, command: list[str], say: Callable[[str], None]) -> None:
    run = stage.run
    if (run / "config.yaml").exists():
        try:
            require_continues(run, config)
        except ValueError as error:
            raise StageError(f"stage {stage.name}: {error}") from error
    _check_source(stage)
    if read_done(run):
        say(f"{run} is done")
        return
    say(f"{'continuing' if (run / 'config.yaml').exists() else 'training'} {run}")
    code = _call([*command, "--cfg", stage.cfg, *stage.words], say)
    if not read_done(run):
        why = f"ended with code {code}" if code else "was stopped"
        raise StageError(f"stage {stage.name} {why}, and {run} is not complete. The same command continues it")


def _check_source(stage: Stage) -> None:
    """Raise StageError if the run did not start from what its source holds now; before the run begins, note what that is."""
    if stage.source is None:
        return
    note, now = stage.run / _STARTED_FROM, {"run": str(stage.source.run), **(read_done(stage.source.run) or {})}
    if not (stage.run / "config.yaml").exists():
        stage.run.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(now) + "\n")
    elif (read_json_object(note) if note.exists() else None) != now:
        raise StageError(
            f"stage {stage.name}: {stage.run} started from another state of {stage.source.run} than it has now. Move it aside to start again"
        )


def _evaluate(stage: Stage, command: list[str], say: Callable[[str], None]) -> None:
    if (done := read_done(stage.run)) is None:  # the stage that is evaluated has run before this one
        raise StageError(f"stage {stage.name}: {stage.run} is not done")
    if stage.result.exists() and stage.result.stat().st_mtime >= (stage.run / DONE).stat().st_mtime:
        say(f"{stage.result} is up to date")
        return
    data = ["--data", stage.data] if stage.data else []
    words = ["--ckpt", str(stage.run), "--tag", done["best"], *data, "--json", str(stage.result), *stage.words]
    code = _call([*command, *words], say)
    if code:
        raise StageError(f"stage {stage.name} ended with code {code}")


def _call(command: list[str], say: Callable[[str], None]) -> int:
    """Run a command, which gets the signals that this process gets; its exit code."""
    if (
        command[0] in ("python", "deepspeed", "torchrun")
        and (beside := Path(sys.executable).parent / command[0]).exists()
    ):
        command = [str(beside), *command[1:]]
    say(shlex.join(command))
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise StageError(f"{command[0]} cannot be started ({error.strerror}): is the environment active?") from error
    stopped: list[int] = []

    def forward(number: int, _frame) -> None:
        stopped.append(number)
        process.send_signal(number)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise StageError(f"stopped by {signal.Signals(stopped[0]).name}. The same command continues from here")
    return code

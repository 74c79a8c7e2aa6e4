"""YAML files and `key=value` words to one frozen, typed `Config`; every part of it is owned by what it configures."""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from c4c.files import looked_in, parse_yaml, read_yaml
from c4c.settings import CheckpointConfig, EngineConfig, ModelConfig, TrainConfig, names_weights
from c4c.training.run_folder import RunConfig, require_wandb, run_of_file
from c4c.zero.keys import wrong_key
from pipelines.bounds import WRONG_KIND, convert, kind_name
from pipelines.config import CacheConfig, ClipsConfig, DataConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of. `deepspeed` passes through to DeepSpeed's own configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.clips.bag > 1 and self.train.loss != "mil_nce":
            raise ValueError(
                f"clips.bag={self.clips.bag} needs train.loss=mil_nce: {self.train.loss} takes one caption a clip, clips.bag=1"
            )
        if self.train.captions_per_video > 1 and (self.clips.cut or self.data.paragraph):
            key = "clips.cut" if self.clips.cut else "data.paragraph"
            why = "each caption has a clip of its own" if self.clips.cut else "a video's captions are one text"
            raise ValueError(
                f"train.captions_per_video={self.train.captions_per_video} and {key} cannot be used together: with {key} {why}"
            )
        if self.data.drop_duplicate_captions and self.clips.cut:
            raise ValueError(
                "data.drop_duplicate_captions and clips.cut cannot be used together: equal words at other times are other clips"
            )
        if self.run.deterministic and 0 < self.data.hw_decoder_load < 1:
            raise ValueError(
                f"run.deterministic with data.hw_decoder_load={self.data.hw_decoder_load}: which decoder a frame meets, and so its "
                "pixels, would depend on its place in the batch. Use 0 or 1"
            )


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, the file, and what would be right."""


def load(
    name: str, overrides: Sequence[str] = (), search: Sequence[Path] = (), said_in: str = "the command line"
) -> Config:
    """Read `name` (a path, else a file in one of the `search` folders), follow its `extends:`, apply `key=value` words.

    said_in: where the words were written, for messages. Raises ConfigError.
    """
    tree = _read(_find(name, [Path(), *search]), search, ())
    _override(tree, overrides, said_in)
    config = _build(Config, tree, "")
    _check_deepspeed(tree.get("deepspeed"), config.deepspeed)
    return config


def require(config: Config) -> None:
    """Raise ValueError for what a training needs and no default can give, before anything heavy is imported."""
    for key in ("train", "test"):
        if not getattr(config.data, key):
            raise ConfigError(f"data.{key} is not set: name the folder of a packed split, data.{key}=data/…")
    if not config.model.init_from and not names_weights(config.model.backbone):
        raise ConfigError(
            "model.init_from is not set: name an open_clip tag (openai), a weights file, a run folder, or scratch for "
            "random weights"
        )
    _require_effect(config)
    _require_kept_source(config)
    _require_other_teacher(config)
    require_wandb(config.run.wandb)


def _require_effect(config: Config) -> None:
    """Raise ConfigError for settings that do nothing beside the others. A run that ignored one in its day can still be read."""
    train, model = config.train, config.model
    if train.patience and not (train.eval_every or train.eval_every_steps):
        raise ConfigError(
            f"train.patience={train.patience} counts validations, and with train.eval_every=0 the only one comes at the end: set "
            "train.eval_every or train.eval_every_steps, or leave train.patience out"
        )
    if model.init_tag and (model.init_from == "scratch" or Path(model.init_from).is_file()):
        raise ConfigError(
            f"model.init_tag={model.init_tag} chooses a checkpoint of a run folder, and model.init_from={model.init_from} is none: name "
            "the folder, or leave model.init_tag out"
        )
    set_ones = {
        name for name, field in TrainConfig.__dataclass_fields__.items() if getattr(train, name) != field.default
    }
    for name in sorted(set_ones & {"lora_on", "lora_alpha"}) if not train.lora else ():
        raise ConfigError(
            f"train.{name}={_as_word(getattr(train, name))} has no effect without train.lora, and all weights would be trained: set "
            f"train.lora to a rank, or leave train.{name} out"
        )
    if "logit_bias" in set_ones and train.loss != "sigmoid":
        raise ConfigError(
            f"train.logit_bias={train.logit_bias:g} is of train.loss=sigmoid, and train.loss={train.loss}: leave train.logit_bias out, or "
            "set train.loss=sigmoid"
        )


def _require_kept_source(config: Config) -> None:
    """Raise ConfigError if frozen weights, which checkpoints leave out, would not be where they came from once the run has begun."""
    partial = config.train.partial and not config.checkpoint.whole
    name = config.model.init_from or config.model.backbone
    path, run = Path(name.removeprefix("local-dir:")), Path(config.run.dir)
    if not partial or name == "scratch" or not path.exists():
        return
    around = run_of_file(path)
    own = run.resolve() in (path.resolve(), around[0].resolve() if around else None)
    if own or (config.run.resume == "never" and path.resolve().is_relative_to(run.resolve())):
        moved = config.run.resume == "never"
        why = "run.resume=never moves that folder aside" if moved else "a run cannot start from itself"
        key = "model.init_from" if config.model.init_from else "model.backbone"
        raise ConfigError(
            f"{key}={name} is in run.dir={config.run.dir}, and {why}: with train.lora, train.prompts or train.freeze, checkpoints leave out the "
            "frozen weights, which are read from there again. Choose another run.dir, or store all weights with checkpoint.whole=true"
        )


def _require_other_teacher(config: Config) -> None:
    """Raise ConfigError for a teacher that lies in the run's own folder."""
    teacher, run = Path(config.train.teacher), Path(config.run.dir)
    if config.train.teacher and teacher.exists() and teacher.resolve().is_relative_to(run.resolve()):
        raise ConfigError(
            f"train.teacher={config.train.teacher} is in run.dir={config.run.dir}: a run cannot be its own teacher, and run.resume=never "
            "moves that folder aside. Choose another run.dir"
        )


def require_data(data: DataConfig) -> None:
    """Raise ConfigError if a split's folder is not there. What it holds is checked when it is opened."""
    for path in (*([data.train] if isinstance(data.train, str) else data.train), data.test):
        if "://" not in path and not Path(path).is_dir():
            raise ConfigError(f"there is no folder {path}{looked_in(path)}. Pack one with: python -m c4c.shard --help")


def _check_deepspeed(located: Any, given: dict) -> None:
    """Of a file that is read now. A run that ignored a key in its day can still be read."""
    if problem := wrong_key(given):
        path, wrong = problem
        for key in path.split("."):
            located = located[key]
        kind = "unknown key " if wrong.startswith(("did you mean", "known keys")) else ""
        raise ConfigError(f"{kind}deepspeed.{_cut(path)} in {_where(located)}: {_cut(wrong, 500)}")


def override_data(data: DataConfig, overrides: list[str]) -> DataConfig:
    """`data` with `data.key=value` words over it. Raises ConfigError."""
    if foreign := [word for word in overrides if not word.startswith("data.")]:
        raise ConfigError(f"{_short(foreign[0])} on the command line: only data.key=value words count here")
    tree = {"data": _located(_plain(dataclasses.asdict(data)), "the checkpoint")}
    _override(tree, overrides)
    return _build(Config, tree, "").data


def _override(tree: dict, overrides: Sequence[str], said_in: str = "the command line") -> None:
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{_short(word)} on the command line: write it as key=value, for example train.lr=1e-4")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{_short(word)} on the command line: the value is not YAML: {error}") from error
        nested = _located(value, said_in)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(tree, nested)


def from_dict(tree: dict) -> Config:
    """The Config that `to_dict` described. Raises ConfigError."""
    return _build(Config, _located(tree, "the saved configuration"), "")


def to_dict(config: Config) -> dict:
    """Plain dicts, lists and scalars, ready for YAML."""
    return _plain(dataclasses.asdict(config))


def dump(config: Config) -> str:
    """The Config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe_keys() -> str:
    """A paragraph for each group of settings: what it is for, and its keys with defaults and the comments in the source."""
    lines = []
    for group, kind in typing.get_type_hints(Config).items():
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            lines += [f"{group}.*  DeepSpeed's own keys, passed through", ""]
            continue
        lines.append(f"{group}  {inspect.getdoc(kind)}")
        above: list[str] = []
        for line in inspect.getsource(kind).partition("    def ")[0].splitlines():
            comment = re.fullmatch(r"    # (.*)", line)
            if field_line := re.match(r"    (\w+): [^=]+ = ([^#]*)(?:# (.*))?$", line):
                name, _, beside = field_line.groups()
                default = _plain(kind.__dataclass_fields__[name].default)
                lines.append(f"    {group}.{name}={_as_word(default)}")
                lines += [f"        {text}" for text in (*above, beside) if text]
            elif inside := re.match(r"        [^#\"]+ # (.*)$", line):  # a default that stands on a line of its own
                lines.append(f"        {inside.group(1)}")
            above = [*above, comment.group(1)] if comment else []
        lines.append("")
    return "\n".join(lines)


def _as_word(value: Any) -> str:
    """As it is written on the command line."""
    if value in ("", None):
        return "''" if value == "" else "null"
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _find(name: str, search: Sequence[Path]) -> Path:
    candidates = [folder / name for folder in search]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({p.name for folder in search for p in folder.glob("*.yaml") if not p.name.startswith(".")})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"no configuration {name}: {hint}looked at {', '.join(map(str, candidates))}; known are {', '.join(known)}"
    )


def _read(path: Path, search: Sequence[Path], parents: tuple[Path, ...]) -> dict:
    """The file's tree with every leaf as (value, where it stands), on top of the files it extends."""
    if path.resolve() in [parent.resolve() for parent in parents]:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(map(str, parents))}")
    try:
        text = read_yaml(path) or {}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: the top level must be keys and values")
    if "stages" in text and not parents:
        raise ConfigError(
            f"{path} lists stages: it is for launch/stages.py --cfg. To train one of them, name its own file"
        )
    if "tables" in text and not parents:
        raise ConfigError(
            f"{path} describes a study: python -m c4c.study --cfg {path.name} runs it. To train one of its cells, name the file of "
            "its recipe"
        )
    bases = text.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"extends={_short(bases)} in {path}: must be the name of a file, or a list of names")
    tree: dict = {}
    for base in bases:  # its own folder first: where the command is run from must not change what a file means
        _merge(tree, _read(_find(base, [path.parent, *search, Path()]), search, (*parents, path)))
    _merge(tree, _located(text, str(path)))
    return tree


def _located(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {str(k): _located(v, where) for k, v in value.items()}
    return value, where


def _merge(tree: dict, over: dict) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _build(cls: type, tree: dict, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix[:-1]} in {tree[1]}: must hold keys and values, not {_short(tree[0])}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(_unknown(prefix, key, names, value))
        kind = hints[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{prefix}{key}.")
        elif kind is dict:
            values[key] = _mapping(value, f"{prefix}{key}")
        else:
            values[key] = _leaf(kind, value, f"{prefix}{key}")
    try:
        return cls(**values)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(_cut(str(error), 800)) from error


def _unknown(prefix: str, key: str, names: list[str], value: Any) -> str:
    known = {f"{f.name}.{g.name}" for f in dataclasses.fields(Config) for g in _fields_of(f)} | {
        prefix + n for n in names
    }
    near = difflib.get_close_matches(prefix + key, sorted(known), 1, cutoff=0.5)
    near = near or [full for full in sorted(known) if full.split(".")[-1] == key]
    hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(prefix + n for n in names)}"
    return f"unknown key {prefix}{_cut(key)} in {_where(value)}: {hint}"


def _fields_of(f: dataclasses.Field) -> tuple:
    kind = typing.get_type_hints(Config)[f.name]
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _where(value: Any) -> str:
    while isinstance(value, dict):
        if not value:
            return "the configuration"
        value = next(iter(value.values()))
    return value[1]


def _mapping(value: Any, key: str) -> dict:
    if not isinstance(value, dict) and value[0] is not None:
        raise ConfigError(f"{key}={_short(value[0])} in {value[1]}: must hold keys and values")
    return _unlocated(value) or {}


def _unlocated(value: Any) -> Any:
    return {k: _unlocated(v) for k, v in value.items()} if isinstance(value, dict) else value[0]


def _leaf(kind: Any, located: Any, key: str) -> Any:
    if isinstance(located, dict):
        raise ConfigError(f"{key} in {_where(located)}: takes one value, not keys")
    value, where = located
    if (converted := convert(kind, value, yaml=True)) is WRONG_KIND:
        raise ConfigError(f"{key}={_short(value)} in {where}: must be {kind_name(kind)}")
    return converted


def _short(value: Any) -> str:
    """A value as Python writes it, of a length that a sentence can hold."""
    return _cut(repr(value))


def _cut(text: str, most: int = 200) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}…"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

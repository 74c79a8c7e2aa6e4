"""Cells: a recipe with a seed, its folder and its commands. Rows that ask for the same training share one.

    OUT/cells/num_frames=4-1f3a9c02-seed42

The digest is of all settings that differ from the defaults, and of what the training starts from; the words before it are for
people. Weights that are evaluated as they are do not depend on the seed: one cell stands for all seeds, without `-seed42`.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from c4c.config import Config, to_dict
from c4c.files import read_json_object
from c4c.study.config import LAUNCH, Recipe, Row, Study
from c4c.study.jobs import CellJob
from c4c.study.words import as_text, flat, label_of, short_key
from c4c.training.run_folder import DONE, check_continuation, read_config, read_done
from pipelines.config import DataConfig
from shards.concat import open_splits

EVALUATED = "eval.json"
_NOT_IDENTITY = ("run.dir", "run.seed", "run.resume")
_PROBLEMS: dict[
    tuple[Path, str, int], str
] = {}  # by folder, recipe and the time of config.yaml, which takes long to read
_DIGESTS: dict[tuple[tuple[str, int], ...], str] = {}  # by files and their times
_LONGEST = 60  # characters of a folder's readable part


@dataclass(frozen=True, eq=False)
class Cell:
    """A training, or an evaluation, of one seed. seed: None where it does not depend on one. commands: as a person types them;
    `python` is this environment's. needs: the cell whose run it starts from or evaluates."""

    recipe: Recipe
    seed: int | None
    folder: Path
    commands: list[list[str]]
    needs: "Cell | None"

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.name

    @cached_property
    def digest(self) -> str:
        """Of the recipe."""
        return digest_of(self.recipe)

    def is_done(self) -> bool:
        """Whether the cell has its result, made with its settings."""
        return self.job.is_done() and not self.problem()

    @cached_property
    def job(self) -> CellJob:
        """What an executor runs."""
        result = DONE if self.recipe.kind == "train" else EVALUATED
        source = str(self._evaluated()) if self.recipe.kind == "evaluate" and self._evaluated() else ""
        return CellJob(str(self.folder.resolve()), tuple(map(tuple, self.commands)), os.getcwd(), result, source)

    def _evaluated(self) -> Path | None:
        """A file that is written anew when the weights change that an evaluation is of; None for weights that have a name only."""
        if self.needs:
            return self.needs.folder.resolve() / DONE
        path = Path(self.recipe.checkpoint)
        files = (path, path / "checkpoints" / "latest")
        return next((file.resolve() for file in files if file.is_file()), None)

    def problem(self) -> str:
        """Why the result in the folder is not that of this cell: its settings, the data, or the weights that it started from; '' if it
        is, or there is none."""
        return self._other_settings() or self._other_data() or self._other_source()

    def _other_source(self) -> str:
        """Of a result that was made from a run which is not the one that the study asks for, or which was trained anew since. (An
        evaluation is then done again by itself.)"""
        if self.needs is None or not self.job.is_done():
            return ""
        if self.needs.job.is_done() and (problem := self.needs.problem()):
            return f"it was made from {self.needs.name}, and of that one: {problem}"
        with contextlib.suppress(ValueError, OSError, TypeError):  # as above
            made, source = ((read_done(cell.folder) or {}).get("time_unix_s") for cell in (self, self.needs))
            if self.recipe.kind == "train" and made is not None and source is not None and source > made:
                return f"{self.needs.name}, which it started from, was trained anew since. Move {self.folder} away to make it anew"
        return ""

    def _other_data(self) -> str:
        """Of a result that was made from splits which hold something else now."""
        config = self.recipe.config
        if config is None or not self.job.is_done():
            return ""
        with contextlib.suppress(ValueError, OSError):  # damage is told where the result is read
            if self.recipe.kind == "train":
                before = (read_done(self.folder) or {}).get("data") or {}
            else:
                before = {"test": read_json_object(self.folder / EVALUATED).get("split_digest")}
            for what in ("train", "test"):
                paths = getattr(config.data, what)
                now = _digest_of_data(paths if isinstance(paths, tuple) else (paths,))
                if now and before.get(what) and now != before[what]:
                    named = ", ".join(paths) if isinstance(paths, tuple) else paths
                    return f"it was made when {named} held other videos or captions. Move {self.folder} away to make it anew"
        return ""

    def _other_settings(self) -> str:
        path = self.folder / "config.yaml"
        if self.recipe.kind != "train" or self.recipe.config is None or not path.is_file():
            return ""
        key = self.folder, self.digest, path.stat().st_mtime_ns
        if key not in _PROBLEMS:
            _PROBLEMS[key] = self._difference(self.recipe.config)
        return _PROBLEMS[key]

    def _difference(self, config: Config) -> str:
        try:
            before, asked = read_config(self.folder), to_dict(config)
            asked = _with_what_was_filled(asked, before) | {"run": asked["run"] | {"seed": self.seed}}
            check_continuation(self.folder, asked, to_dict(Config()), ("model.init_from",) if self.needs else ())
        except (ValueError, OSError) as error:
            return str(error)
        return ""


def _digest_of_data(paths: Sequence[str]) -> str:
    """What tells the contents of splits from others; '' for those on a server and those that cannot be read."""
    files = [Path(path) / "dataset.json" for path in paths]
    if any("://" in path for path in paths) or not all(file.is_file() for file in files):
        return ""
    key = tuple((str(file), file.stat().st_mtime_ns) for file in files)
    if key not in _DIGESTS:
        _DIGESTS[key] = open_splits(list(paths)).digest
    return _DIGESTS[key]


def _with_what_was_filled(asked: dict, before: dict) -> dict:
    """What the settings leave to the backbone, as the run has it."""
    blank, was = to_dict(Config())["data"], before.get("data")
    filled = to_dict(Config(data=DataConfig().filled()))["data"]
    left = [key for key in blank if blank[key] != filled[key] and asked["data"][key] == blank[key]]
    return asked | {"data": asked["data"] | {key: was[key] for key in left if isinstance(was, dict) and key in was}}


def cells_of(study: Study) -> dict[tuple[str, str, int], Cell]:
    """{(table's name, row's name, seed): its cell}; rows that ask for the same have the same cell."""
    cells = _Cells(study)
    return {
        (table.name, row.name, seed): cells.of(row.recipe, seed)
        for table in study.tables
        for row in table.rows
        for seed in study.seeds
    }


def in_order(cells: dict[tuple[str, str, int], Cell]) -> list[Cell]:
    """Each cell once, with those that they need, which come first."""
    out: dict[Path, Cell] = {}
    for cell in cells.values():
        chain = [cell]
        while chain[-1].needs:
            chain.append(chain[-1].needs)
        for one in reversed(chain):
            out.setdefault(one.folder, one)
    return list(out.values())


def command_of(study: Study, row: Row, seed: int) -> str:
    """What a person types to get the row's result, joined by ` && `."""
    commands: list[list[str]] = []
    cell: Cell | None = _Cells(study).of(row.recipe, seed)
    while cell:
        commands = [*cell.commands, *commands]
        cell = cell.needs
    return " && ".join(map(shlex.join, commands))


def digest_of(recipe: Recipe) -> str:
    """Eight hexadecimal digits that equal recipes share."""
    return hashlib.sha256(json.dumps(_identity(recipe), sort_keys=True).encode()).hexdigest()[:8]


def _identity(recipe: Recipe) -> dict:
    """What two equal recipes have in common. Settings at their defaults are left out: a new one leaves cells as they are."""
    about = {"source": _identity(recipe.source) if recipe.source else None, "checkpoint": recipe.checkpoint}
    if recipe.kind == "evaluate":
        test = recipe.config.data.test if recipe.config else ""
        return about | {"evaluate": sorted(recipe.words), "test": test}
    left = (*_NOT_IDENTITY, "model.init_from") if recipe.source else _NOT_IDENTITY
    return about | {"train": {key: value for key, value in _differences(recipe.config).items() if key not in left}}


def _differences(config: Config | None, base: Config | None = None) -> dict[str, object]:
    """{key: value} of settings that differ from the base's."""
    if config is None:
        return {}
    before = flat(to_dict(base or Config()))
    return {key: value for key, value in flat(to_dict(config)).items() if before.get(key, _MISSING) != value}


_MISSING = object()


class _Cells:
    """Makes each cell of a study once."""

    def __init__(self, study: Study):
        self._study = study
        self._made: dict[tuple[str, int | None], Cell] = {}

    def of(self, recipe: Recipe, seed: int) -> Cell:
        own = None if recipe.kind == "evaluate" and recipe.source is None else seed
        key = digest_of(recipe), own
        if key not in self._made:
            self._made[key] = self._make(recipe, *key)
        return self._made[key]

    def _make(self, recipe: Recipe, digest: str, seed: int | None) -> Cell:
        needs = self.of(recipe.source, seed) if recipe.source and seed is not None else None
        folder = self._folder(recipe, digest, seed)
        command = _training(self._study, recipe, seed, folder, needs)
        if recipe.kind == "evaluate":
            command = _evaluation(recipe, folder, needs)
        return Cell(recipe, seed, folder, [command], needs)

    def _folder(self, recipe: Recipe, digest: str, seed: int | None) -> Path:
        """The one that exists, whatever was its readable part: the base may have been another."""
        cells, end = self._study.out / "cells", f"-{digest}" + ("" if seed is None else f"-seed{seed}")
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(cells)):
                if name.endswith(end):
                    return cells / name
        return cells / f"{_slug(recipe, self._study.base)}{end}"


def _slug(recipe: Recipe, base: Config | None) -> str:
    """For people: what a recipe is, in the letters of file names."""
    source = recipe.source.name if recipe.source else ""
    if recipe.kind == "evaluate":
        text = f"eval-{source or recipe.checkpoint}"
    elif recipe.name:
        text = recipe.name
    else:
        left = (*_NOT_IDENTITY, "model.init_from")
        parts = [
            f"{short_key(k)}={label_of(v)}"
            for k, v in _differences(recipe.config, base).items()
            if k not in left or (k == left[-1] and not source)
        ]
        text = ",".join([*([f"from-{source}"] if source else []), *parts]) or "base"
    return re.sub(r"[^\w.=,+-]+", "-", text)[:_LONGEST].strip("-.,")


def _training(study: Study, recipe: Recipe, seed: int | None, folder: Path, needs: Cell | None) -> list[str]:
    start = [f"model.init_from={as_text(str(needs.folder))}"] if needs else []
    own = [f"run.seed={seed}", f"run.dir={as_text(str(folder))}", "run.resume=auto"]
    return [*study.launcher, script("train.py"), "--cfg", recipe.cfg, *start, *recipe.words, *own]


def _evaluation(recipe: Recipe, folder: Path, needs: Cell | None) -> list[str]:
    test = recipe.config.data.test if recipe.config else ""
    checkpoint = str(needs.folder) if needs else recipe.checkpoint
    files = ["--json", str(folder / EVALUATED), "--ranks", str(folder / "ranks.jsonl")]
    return ["python", script("eval.py"), "--ckpt", checkpoint, *files, "--data", test, *recipe.words]


def script(name: str) -> str:
    """Of launch/, as it is called from here."""
    path = LAUNCH / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

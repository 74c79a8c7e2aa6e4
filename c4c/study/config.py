"""What a study is made of. c4c.study.reading makes it of a yaml file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from c4c.config import Config, ConfigError, require_data
from c4c.files import looked_in

LAUNCH = Path(__file__).resolve().parents[2] / "launch"  # its scripts and recipes


@dataclass(frozen=True)
class Recipe:
    """What a row does, but for the seed: a training, or an evaluation of weights that are not trained in this row.

    kind: `train` or `evaluate`. words: key=value over `cfg`, of an evaluation `data.key=value` over the checkpoint's own settings.
    source: the training it starts from, or evaluates. checkpoint: what it evaluates otherwise, as launch/eval.py --ckpt takes it.
    config: of a training, all settings (run.dir and run.seed are not those of a cell); of an evaluation, those that a training of
    this row would have. name: of `recipes`, else ''.
    """

    kind: str
    cfg: str
    words: tuple[str, ...]
    source: "Recipe | None"
    checkpoint: str
    config: Config | None
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Row:
    """A row of a table. values: of the keys that the table varies. group: its sweep's label, else ''. baseline: the label of the
    row of the same group that it is compared with, '' for none."""

    label: str
    values: dict[str, object]
    recipe: Recipe
    group: str = ""
    baseline: str = ""

    @property
    def name(self) -> str:
        """The label, with its group's."""
        return f"{self.group}: {self.label}" if self.group else self.label


@dataclass(frozen=True)
class Plot:
    """A line plot of a table's rows of one group over one of their keys."""

    group: str
    key: str
    log: bool


@dataclass(frozen=True)
class StudyTable:
    """One question, and the rows that answer it."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Study:
    """A study. out: its folder. jobs: cells at work at once on one machine. file: the yaml. words and options: of the command line.
    base: the settings that all rows start from."""

    title: str
    out: Path
    seeds: tuple[int, ...]
    tables: tuple[StudyTable, ...]
    launcher: tuple[str, ...]
    jobs: int
    gpus_per_cell: int
    slurm: dict
    file: str
    words: tuple[str, ...]
    base: Config | None = None
    options: tuple[str, ...] = ()


def require_splits(study: Study, only: Sequence[str] = ()) -> None:
    """Raise ConfigError if the folder of a split that a row needs is not there, or the weights that it starts from. only: of these
    tables; none: of all."""
    for table in [table for table in study.tables if not only or table.name in only]:
        for row in table.rows:
            recipe: Recipe | None = row.recipe
            while recipe and recipe.config:
                data = recipe.config.data
                try:  # an evaluation reads no training split
                    require_data(data if recipe.kind == "train" else replace(data, train=data.test))
                    _require_start(recipe)
                except ValueError as error:
                    raise ConfigError(f"table {table.name}, row {row.name}: {error}") from error
                recipe = recipe.source


def _require_start(recipe: Recipe) -> None:
    """Raise ConfigError for a path to weights that is not there. Tags of open_clip have no slash."""
    start = recipe.config.model.init_from if recipe.config and recipe.kind == "train" and recipe.source is None else ""
    if "/" in start and ":" not in start and not Path(start).exists():
        raise ConfigError(f"model.init_from={start}: there is no such file or folder{looked_in(start)}")

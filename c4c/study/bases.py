"""What a row of a study starts from, and the recipe that it makes of that."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from c4c.config import Config, ConfigError, from_dict, load, require, to_dict
from c4c.files import looked_in
from c4c.study.config import LAUNCH, Recipe
from c4c.study.entries import cfg_of, settings_of
from c4c.study.words import as_text, flat, label_of
from c4c.training.run_folder import is_run, located, read_config
from pipelines.config import BLANKS, EVALUATION_SETTINGS

# what only training uses, or how fast data is read: not of an evaluation
NOT_EVALUATED = ("data.train", "data.test", "data.weights", "data.epoch_samples", "data.shuffle_block", "data.random_crop", "data.flip",
                  "data.colour", "data.prefetch", "data.ahead", "data.decode", "data.max_bad_fraction", "data.pixels", "data.drop_duplicate_captions")  # fmt: skip
_LEFT = tuple(f"data.{name}" for name in BLANKS)  # to the backbone


@dataclass(frozen=True)
class Base:
    """What a row starts from. where: for messages."""

    where: str
    cfg: str
    settings: dict[str, str]  # key: text of its value
    source: Recipe | None = None
    recipes: dict[str, Recipe] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)  # the command line's, over all others
    folder: Path = Path()  # of the yaml file

    def over(self, entry: dict, where: str) -> "Base":
        """With what an entry of the yaml file says."""
        base = replace(self, where=where)
        if "cfg" in entry:
            base = replace(base, cfg=cfg_of(entry["cfg"], self.folder, where), settings={}, source=None)
        if "from" in entry:
            base = replace(base, source=recipe_named(entry["from"], self.recipes, where))
        return replace(base, settings=base.settings | settings_of(entry.get("set"), where))

    def config(self, words: Sequence[str]) -> Config:
        """The settings; a source stands for its weights. Raises ConfigError."""
        source = [f"model.init_from={self.source.name}"] if self.source else []
        try:
            config = load(self.cfg, [*source, *words], [LAUNCH / "cfg"], "the study's settings")
            require(config)
        except ValueError as error:
            raise ConfigError(f"{self.where}: {error}") from error
        return config

    def training(self, name: str = "") -> Recipe:
        """The training that the settings make. Raises ConfigError."""
        settings = self.settings | self.last
        if self.source and "model.init_from" in settings:
            raise ConfigError(
                f"{self.where}: model.init_from={settings['model.init_from']} is set, and `from: {self.source.name}` says "
                "what it starts from: leave one of them out"
            )
        words = words_of(settings)
        return Recipe("train", self.cfg, words, self.source, "", self.config(words), name)

    def evaluation(self, of: Any, own: dict[str, str]) -> Recipe:
        """The evaluation of a recipe's run or of a checkpoint, with the data settings that a training here would have.

        own: the row's own settings. Raises ConfigError.
        """
        if not isinstance(of, str) or not of:
            raise ConfigError(f"{self.where}: evaluate must name a recipe or a checkpoint; got {of!r}")
        if foreign := [key for key in own if not key.startswith("data.")]:
            raise ConfigError(
                f"{self.where}: {foreign[0]} has no effect on an evaluation, which takes data.* settings only"
            )
        if foreign := [key for key in own if key in NOT_EVALUATED and key != "data.test"]:
            raise ConfigError(f"{self.where}: {foreign[0]} has no effect on an evaluation: leave it out")
        if self.source:
            raise ConfigError(
                f"{self.where}: `from` starts a training, and `evaluate` trains nothing: leave one of them out"
            )
        source = self.recipes.get(of)
        if source is None and ":" not in of and not Path(of).exists():
            known = ", ".join(self.recipes) or "none"
            raise ConfigError(
                f"{self.where}: evaluate: {of} is neither a recipe (known: {known}) nor a file or folder{looked_in(of)} nor "
                "TAG:BACKBONE"
            )
        config = self.config(words_of(self.settings | self.last))
        wanted = {
            key: value
            for key, value in flat(to_dict(config)).items()
            if key.startswith("data.") and key not in NOT_EVALUATED
        }
        usual, run = flat(to_dict(Config())), source.config if source else _run_of(of, self.where)
        if run:
            # a run has in full what its settings left to the backbone: what the row leaves, too, stays as the run has it
            own_values = flat(to_dict(run))
            had = {key for key in wanted if wanted[key] == own_values[key]}
            had |= set() if source else {key for key in _LEFT if wanted[key] == usual[key]}
        else:  # other weights come with settings of their own, which only reading them would tell
            had = {
                key
                for key in wanted
                if wanted[key] == usual[key] and key.removeprefix("data.") not in EVALUATION_SETTINGS
            }
        words = [f"{key}={as_text(value)}" for key, value in wanted.items() if key not in had]
        return Recipe("evaluate", self.cfg, tuple(words), source, "" if source else of, config)


def _run_of(checkpoint: str, where: str) -> Config | None:
    """The settings of the run that a checkpoint is of, which launch/eval.py starts from; None for other weights. Raises ConfigError."""
    folder, _, _ = located(checkpoint, None)
    if not is_run(folder):
        return None
    try:
        return from_dict(read_config(Path(folder)))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: evaluate: {error}") from error


def words_of(settings: dict[str, str]) -> tuple[str, ...]:
    """Settings as key=value words."""
    return tuple(f"{key}={text}" for key, text in settings.items())


def recipe_named(name: Any, recipes: dict[str, Recipe], where: str) -> Recipe:
    """One of the named recipes. Raises ConfigError."""
    if not isinstance(name, str):
        raise ConfigError(f"{where}: from must name one of `recipes`; got {label_of(name)}")
    if name not in recipes:
        near = difflib.get_close_matches(str(name), recipes, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(recipes) or 'none'}"
        raise ConfigError(f"{where}: from: {name} is not one of `recipes` (above it, if it is one): {hint}")
    return recipes[name]

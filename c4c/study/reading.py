"""The yaml file of a study: which trainings, as tables of rows, over which seeds. docs/study.md explains its keys.

The settings of every row are read as launch/train.py reads them, so that a mistake in the last one is found before the first
one trains.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from c4c.config import ConfigError, to_dict
from c4c.files import looked_in, read_yaml
from c4c.study.bases import Base
from c4c.study.cells import digest_of
from c4c.study.config import LAUNCH, Plot, Recipe, Row, Study, StudyTable
from c4c.study.entries import (
    cfg_of,
    check_keys,
    command_line,
    count_of,
    label_in,
    launcher_of,
    list_of,
    mapping_of,
    seeds_of,
    settings_of,
    text_of,
)  # fmt: skip
from c4c.study.words import flat, label_of, short_key

_NAME = re.compile(r"[a-z0-9-]+")


def read_study(
    path: Path, words: Sequence[str] = (), out: Path | None = None, seeds: Sequence[int] = (), jobs: int = 0
) -> Study:
    """The study in a yaml file (a path, or the name of one in launch/cfg). words: key=value over the settings of all trainings. out,
    seeds, jobs: instead of the file's. Raises ConfigError."""
    file = next((p for p in (path, LAUNCH / "cfg" / path) if p.is_file()), None)
    if file is None:
        known = [p.name for p in sorted((LAUNCH / "cfg").glob("study_*.yaml"))]
        raise ConfigError(f"no study {path}{looked_in(path)}; those in launch/cfg are: {', '.join(known) or 'none'}")
    try:
        tree = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tree, dict) or "tables" not in tree:
        raise ConfigError(f"{file} is no study: a study has `cfg` and a list `tables`; docs/study.md shows an example")
    where = str(file)
    check_keys(tree, "study", where)
    last = command_line(words)
    base = Base(where, cfg_of(tree.get("cfg"), file.parent, where), {}, last=last, folder=file.parent)
    base = base.over({"set": tree.get("set")}, where)
    recipes = _recipes(base, tree.get("recipes"), where)
    base = replace(base, recipes=recipes)
    tables = tuple(_tables(tree["tables"], base, where))
    return Study(
        title=text_of(tree, "title", where, file.stem), out=out or _out(tree, where, f"runs/{file.stem}"),
        seeds=seeds_of(list(seeds), "--seeds") if seeds else seeds_of(tree.get("seeds", [42]), where), tables=tables, launcher=launcher_of(tree, where),
        jobs=jobs or count_of(tree, "jobs", where, 1, 1), gpus_per_cell=count_of(tree, "gpus_per_cell", where, 0, 0),
        slurm=mapping_of(tree.get("slurm"), "slurm", where), file=str(path), words=tuple(words), base=base.training().config,
        options=_options(out, seeds, jobs),
    )  # fmt: skip


def _options(out: Path | None, seeds: Sequence[int], jobs: int) -> tuple[str, ...]:
    """What the command line says instead of the file."""
    seeds_given = ["--seeds", *map(str, seeds)] if seeds else []
    return (*(["--out", str(out)] if out else []), *(["--jobs", str(jobs)] if jobs else []), *seeds_given)


def _out(tree: dict, where: str, default: str) -> Path:
    text = text_of(tree, "out", where, default)
    if not text.strip() or text.startswith("~"):  # no shell reads it: ~ would be a folder here
        raise ConfigError(f"{where}: out must name a folder, without ~; got {text!r}")
    return Path(text)


def _recipes(base: Base, entries: Any, where: str) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for name, entry in mapping_of(entries, "recipes", where).items():
        at = f"{where}: recipe {name}"
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(f"{at}: its name must consist of a-z, 0-9 and -")
        check_keys(entry, "recipe", at)
        recipes[name] = replace(base, recipes=recipes).over(entry, at).training(name)
    return recipes


def _tables(entries: Any, base: Base, where: str) -> Iterator[StudyTable]:
    names: set[str] = set()
    for number, entry in enumerate(list_of(entries, "tables", where), 1):
        at = f"{where}: table {entry.get('name', number) if isinstance(entry, dict) else number}"
        check_keys(entry, "table", at)
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{at}: its name must consist of a-z, 0-9 and -; got {name!r}")
        if name in names:
            raise ConfigError(f"{at}: two tables have this name")
        names.add(name)
        kinds = [kind for kind in ("grid", "rows", "sweeps") if kind in entry]
        if len(kinds) != 1:
            raise ConfigError(
                f"{at}: must have exactly one of grid, rows and sweeps; has {' and '.join(kinds) or 'none'}"
            )
        own = base.over(entry, at)
        rows, plots = {"grid": _grid, "rows": _rows, "sweeps": _sweeps}[kinds[0]](entry, own, at)
        _check_rows(rows, at)
        title = text_of(entry, "title", at, name)
        yield StudyTable(name, title, text_of(entry, "about", at, ""), tuple(rows), tuple(plots))


def _grid(entry: dict, base: Base, where: str) -> tuple[list[Row], list[Plot]]:
    """The product of the values of all keys."""
    grid = mapping_of(entry["grid"], "grid", where)
    if not grid:
        raise ConfigError(f"{where}: grid names no keys")
    keys = tuple(map(str, grid))
    choices = [_values(grid[key], str(key), keys, f"{where}, grid {key}") for key in grid]
    rows = []
    for combination in itertools.product(*choices):
        label = ", ".join(f"{c.named}={c.label}" if len(keys) > 1 and c.named else c.label for c in combination)
        settings: dict[str, str] = {}
        for choice in combination:
            if twice := choice.settings.keys() & settings.keys():
                raise ConfigError(f"{where}: row {label}: {min(twice)} is set by two of the grid's values")
            settings |= choice.settings
        rows.append(_varied(base, settings, label, {c.key: c.label for c in combination}, where))
    if "baseline" in entry:
        wanted = mapping_of(entry["baseline"], "baseline", where)
        if foreign := [key for key in wanted if key not in grid]:
            raise ConfigError(f"{where}: baseline: {foreign[0]} is not one of the grid's keys, {', '.join(keys)}")
        matching = [row for row in rows if all(_is(row.values[key], value) for key, value in wanted.items())]
        if len(matching) != 1:
            raise ConfigError(
                f"{where}: baseline {label_of(wanted)} is {len(matching) or 'none'} of the grid's rows: it must name one; the rows "
                f"are {'; '.join(row.label for row in rows)}"
            )
        rows = _compared(rows, matching[0].label)
    return rows, [_plot(entry["plot"], keys, rows, where)] if "plot" in entry else []


def _rows(entry: dict, base: Base, where: str) -> tuple[list[Row], list[Plot]]:
    rows = []
    for number, own in enumerate(list_of(entry["rows"], "rows", where), 1):
        at = f"{where}, row {label_of(own.get('label', number)) if isinstance(own, dict) else number}"
        check_keys(own, "row", at)
        label = label_in(own, at)
        settings, start = settings_of(own.get("set"), at), base.over(own, at)
        _require_own(settings, base.last, at)
        if "evaluate" in own:
            start = start if "from" in own else replace(start, source=None)
            recipe = start.evaluation(own["evaluate"], settings)
        else:
            recipe = start.training()
        rows.append(Row(label, _resolved(recipe, settings), recipe))
    if "plot" in entry:
        raise ConfigError(f"{where}: plot needs a grid or sweeps, whose rows differ in the value of one key")
    if "baseline" in entry:
        if not any(row.label == entry["baseline"] for row in rows):
            labels = "; ".join(row.label for row in rows)
            raise ConfigError(f"{where}: baseline: {entry['baseline']!r} is not a row's label; they are {labels}")
        rows = _compared(rows, entry["baseline"])
    return rows, []


def _sweeps(entry: dict, base: Base, where: str) -> tuple[list[Row], list[Plot]]:
    """One key at a time."""
    rows: list[Row] = []
    plots = []
    for key in ("baseline", "plot"):
        if key in entry:
            raise ConfigError(f"{where}: {key} is written in each of the sweeps")
    for number, own in enumerate(list_of(entry["sweeps"], "sweeps", where), 1):
        at = f"{where}, sweep {(own.get('label') or own.get('key') or number) if isinstance(own, dict) else number}"
        check_keys(own, "sweep", at)
        key = text_of(own, "key", at, "")
        group = label_in(own, at) if "label" in own else short_key(key)
        if not group or "values" not in own:
            raise ConfigError(f"{at}: a sweep has a key, or a label, and values")
        if any(row.group == group for row in rows):
            raise ConfigError(f"{at}: two sweeps have the label {group}: give one of them another")
        start = base.over(own, at)
        part = [
            _varied(start, choice.settings, choice.label, {choice.key or group: choice.label}, at)
            for choice in _values(own["values"], key, (key,), at)
        ]
        part = [replace(row, group=group) for row in part]
        part = _compared(part, _sweep_baseline(own, part, start, at))
        rows += part
        if own.get("plot", False) is not False:
            if own["plot"] not in (True, "log") or not key:
                raise ConfigError(f"{at}: plot must be true or log, and needs `key`; got {own['plot']!r}")
            plots.append(_plot({"key": key, "log": own["plot"] == "log"}, (key,), part, at, group))
    return rows, plots


def _sweep_baseline(own: dict, rows: list[Row], start: Base, where: str) -> str:
    """The label of the row that is compared with: the one that is named, else the one that changes nothing."""
    if "baseline" in own:
        named = [row.label for row in rows if _is(row.label, own["baseline"]) or own["baseline"] in row.values.values()]
        if len(named) != 1:
            why = f"is {len(named)} of the values" if named else "is not one of the values"
            raise ConfigError(
                f"{where}: baseline: {label_of(own['baseline'])} {why} {', '.join(row.label for row in rows)}"
            )
        return named[0]
    unchanged = start.training().config
    same = [row.label for row in rows if row.recipe.config == unchanged]
    if not same:
        key = own.get("key", "")
        value = flat(to_dict(unchanged)).get(key) if unchanged and key else None
        base = f" ({key}={label_of(value)})" if value is not None else ""
        raise ConfigError(
            f"{where}: no value is that of the base{base}, which the others would be compared with: add it, or name another as "
            "`baseline`"
        )
    return same[0]


@dataclass(frozen=True)
class _Choice:
    """One of several values. named: how its key is called in a label."""

    key: str
    named: str
    label: str
    settings: dict[str, str]


def _values(values: Any, key: str, among: tuple[str, ...], where: str) -> list[_Choice]:
    """Plain values of the key, or mappings {label, value, set} of what takes several settings; `value` is the key's own."""
    choices = []
    for value in list_of(values, "values", where):
        if isinstance(value, dict):
            check_keys(value, "value", where)
            label, settings = value.get("label"), settings_of(value.get("set"), where)
            if "value" in value:
                if not key or key in settings:
                    why = f"`set` sets {key}, too" if key else "the sweep has no `key`"
                    raise ConfigError(f"{where}: value: {label_of(value['value'])} has no effect: {why}")
                settings = settings_of({key: value["value"]}, where) | settings
            if not isinstance(label, str) or not label or not settings:
                raise ConfigError(
                    f"{where}: a value that is a mapping needs a label (text) and `set`; got {label_of(value)}"
                )
            choices.append(_Choice(key, short_key(key, among), label_in(value, where), settings))
        elif not key:
            raise ConfigError(
                f"{where}: {label_of(value)} is a value of which key? Write `key`, or {{label: …, set: …}}"
            )
        else:
            choices.append(_Choice(key, short_key(key, among), label_of(value), settings_of({key: value}, where)))
    return choices


def _varied(base: Base, settings: dict[str, str], label: str, keys: dict[str, str], where: str) -> Row:
    """A row that differs from the base in some settings. keys: those that the table varies, with what stands for a value."""
    at = f"{where}, row {label}"
    _require_own(settings, base.last, at)
    recipe = replace(base, where=at, settings=base.settings | settings).training()
    resolved = _resolved(recipe, settings)
    return Row(label, {key: resolved.get(key, label) for key, label in keys.items()}, recipe)


def _resolved(recipe: Recipe, settings: dict[str, str]) -> dict[str, object]:
    """The settings, as the configuration reads their values."""
    known = flat(to_dict(recipe.config)) if recipe.config else {}
    return {key: known.get(key, text) for key, text in settings.items()}


def _is(value: object, wanted: object) -> bool:
    """Whether a value is meant, 1e-4 too, which YAML 1.1 takes for text."""
    if isinstance(value, float) and isinstance(wanted, str | int):
        try:
            return value == float(wanted)
        except ValueError:
            return False
    return value == wanted or (isinstance(value, str) and value == label_of(wanted))


def _compared(rows: list[Row], baseline: str) -> list[Row]:
    return [row if row.label == baseline else replace(row, baseline=baseline) for row in rows]


def _check_rows(rows: list[Row], where: str) -> None:
    """Raise ConfigError for rows with one name, or that are one training."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.name in seen:
            raise ConfigError(f"{where}: two rows have the label {row.name}: a label names one row")
        for other in seen.values():
            if other.group == row.group and digest_of(other.recipe) == digest_of(row.recipe):
                raise ConfigError(
                    f"{where}: the rows {other.label} and {row.label} are the same: leave one of them out"
                )
        seen[row.name] = row


def _require_own(settings: dict[str, str], last: dict[str, str], where: str) -> None:
    """Raise ConfigError if the command line sets a key that a row sets: the row would no longer be what its label says."""
    if overridden := [key for key in last if key in settings]:
        raise ConfigError(
            f"{overridden[0]}={last[overridden[0]]} on the command line: {where} sets this key, so that the row would no longer be "
            "what its label says. Edit the file instead"
        )


def _plot(entry: Any, keys: tuple[str, ...], rows: list[Row], where: str, group: str = "") -> Plot:
    entry = {"key": entry} if isinstance(entry, str) else entry
    check_keys(entry, "plot", f"{where}: plot")
    key, log = entry.get("key"), entry.get("log", False)
    if key not in keys or not isinstance(log, bool):
        raise ConfigError(
            f"{where}: plot must name one of the keys {', '.join(keys)}, and log true or false; got {label_of(entry)}"
        )
    for row in rows:
        value = row.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or (log and value <= 0):
            kind = "a number above 0" if log else "a number"
            raise ConfigError(
                f"{where}: plot: {key}={label_of(value)} of row {row.label} is not {kind}: leave plot out"
            )
    return Plot(group, str(key), log)

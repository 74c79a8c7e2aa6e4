"""The yaml file of a study, and what is refused in it."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import yaml

from c4c.config import Config, ConfigError, override_data, to_dict
from c4c.study.config import Plot, require_splits
from c4c.study.reading import read_study
from pipelines.config import BLANKS, EVALUATION_SETTINGS, DataConfig
from tests.c4c.study.studies import FILE, study_in, written

BASE = {"data.num_frames": [1, 2]}


def table(**entries) -> dict:
    return {"tables": [{"name": "t", **entries}]}


def rows_of(study, number: int = 0) -> dict:
    return {row.name: row for row in study.tables[number].rows}


def test_a_grid_is_the_product_of_its_values(tmp_path):
    grid = {"model.head": ["meanP", "seqTransf"], "model.linear_patch": ["2d", "3d"]}
    study = study_in(tmp_path, **table(grid=grid, baseline={"model.head": "meanP", "model.linear_patch": "2d"}))
    rows = rows_of(study)
    assert list(rows) == [f"head={head}, linear_patch={patch}" for head in grid["model.head"] for patch in ("2d", "3d")]
    last = rows["head=seqTransf, linear_patch=3d"]
    assert last.values == {"model.head": "seqTransf", "model.linear_patch": "3d"}
    assert (last.recipe.config.model.head, last.recipe.config.model.linear_patch) == ("seqTransf", "3d")
    assert last.baseline == "head=meanP, linear_patch=2d" and rows[last.baseline].baseline == ""


def test_settings_go_from_the_study_over_the_table_to_the_row_and_the_command_line(tmp_path):
    own = {"train.lr": 1e-2, "train.epochs": 4, "data.num_frames": 3}
    study = study_in(
        tmp_path, "train.epochs=9", set={"train.lr": 1e-3, "train.warmup_epochs": 0, **own},
        **table(set={"train.lr": 1e-4}, grid=BASE),
    )  # fmt: skip
    config = rows_of(study)["1"].recipe.config
    assert (config.train.lr, config.train.epochs, config.train.warmup_epochs, config.data.num_frames) == (1e-4, 9, 0, 1)


def test_a_recipe_with_its_own_file_does_not_take_the_studys_settings(tmp_path):
    study = study_in(tmp_path, "train.epochs=2", set={"train.lr": 0.5})
    source = rows_of(study, 1)["stage one"].recipe.source
    assert (source.config.train.loss, source.config.train.lr, source.config.train.epochs) == ("mil_nce", 1e-3, 2)


def test_sweeps_have_groups_and_are_compared_with_the_row_that_changes_nothing(tmp_path):
    sweeps = [
        {"key": "train.batch_size", "values": [32, 64], "plot": True},
        {"label": "rate", "key": "train.lr", "values": ["1e-4", 1e-3], "plot": "log"},
        {"label": "sampling", "key": "data.sampling", "values": ["head", {"label": "spread", "set": {"data.sampling": "segment"}}]},
        {"label": "both", "key": "train.lr", "baseline": "low", "plot": "log", "values": [
            {"label": "low", "value": 1e-5, "set": {"train.coef_lr": 2.0}}, {"label": "high", "value": 1e-2, "set": {"train.coef_lr": 0.5}},
        ]},
    ]  # fmt: skip
    study = study_in(tmp_path, **table(sweeps=sweeps))
    rows = rows_of(study)
    assert {name: row.baseline for name, row in rows.items()} == {
        "batch_size: 32": "64", "batch_size: 64": "", "rate: 1e-4": "0.001", "rate: 0.001": "", "sampling: head": "spread",
        "sampling: spread": "", "both: low": "", "both: high": "low",
    }  # fmt: skip
    assert rows["rate: 1e-4"].values == {"train.lr": 1e-4}
    assert rows["sampling: spread"].values == {"data.sampling": "segment"}
    assert rows["both: low"].recipe.config.train.coef_lr == 2.0 and rows["both: low"].values == {"train.lr": 1e-5}
    log = [Plot("rate", "train.lr", True), Plot("both", "train.lr", True)]
    assert list(study.tables[0].plots) == [Plot("batch_size", "train.batch_size", False), *log]


def test_an_evaluation_takes_the_data_settings_of_its_row(tmp_path):
    rows = [
        {"label": "a", "evaluate": "openai:ViT-B-32", "set": {"data.fps": 2}},
        {"label": "b", "evaluate": "stage-one"},
    ]
    study = study_in(tmp_path, set={"data.num_frames": 3, "data.flip": 0.5, "train.lr": 0.1}, **table(rows=rows))
    found = rows_of(study)
    words = found["a"].recipe.words
    assert {"data.num_frames=3", "data.fps=2", "data.image_size=64", "data.sampling=segment"} <= set(words)
    assert not [word for word in words if "flip" in word or "train" in word]
    assert found["a"].recipe.checkpoint == "openai:ViT-B-32" and found["b"].recipe.source.name == "stage-one"
    assert found["b"].recipe.words == ("data.num_frames=3",)  # where it differs from what that run has


def test_an_evaluation_of_a_file_takes_all_that_its_clips_depend_on(tmp_path):
    """Files have settings of their own: what is usual here may be another value there."""
    (tmp_path / "weights.pth").touch()
    rows = [{"label": "a", "evaluate": str(tmp_path / "weights.pth")}, {"label": "b", "evaluate": "openai:ViT-B-32"}]
    study = study_in(tmp_path, set={"data.num_frames": 12, "data.sampling": "uniform"}, **table(rows=rows))
    mmaction = DataConfig(sampling="segment", resize=256, max_words=77, num_frames=7, mean=(0.1, 0.2, 0.3))
    for row in study.tables[0].rows:
        assert {"data.num_frames=12", "data.sampling=uniform"} <= set(row.recipe.words)
        found, wanted = override_data(mmaction, list(row.recipe.words)), row.recipe.config.data
        assert {name: getattr(found, name) for name in EVALUATION_SETTINGS} == {
            name: getattr(wanted, name) for name in EVALUATION_SETTINGS
        }
        assert found.mean == BLANKS["mean"] and found.threads == mmaction.threads


def test_an_evaluation_of_a_run_takes_the_rows_settings_and_not_the_runs(tmp_path):
    run = Config(data=replace(DataConfig(num_frames=4, sampling="head").filled(), image_size=48))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
    rows = [{"label": "a", "evaluate": str(tmp_path / "run")}]
    given = {"data.num_frames": 12, "data.sampling": "segment", "data.image_size": 64}  # 12 is the default, too
    (row,) = study_in(tmp_path, set=given, **table(rows=rows)).tables[0].rows
    assert {"data.num_frames=12", "data.sampling=segment", "data.image_size=64"} <= set(row.recipe.words)
    assert not [word for word in row.recipe.words if word.startswith(("data.mean", "data.std", "data.interpolation"))]
    (tmp_path / "run" / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"row a: evaluate: .*config.yaml is not YAML"):
        study_in(tmp_path, **table(rows=rows))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text() + "seeds: [1, 2, 3]\n")
    with pytest.raises(ConfigError, match="the key seeds stands twice"):
        read_study(path)


WRONG = {
    "data.flip has no effect on an evaluation": table(rows=[{"label": "b", "evaluate": "stage-one", "set": {"data.flip": 0.5}}]),
    "value: 3 has no effect: the sweep has no `key`": table(
        sweeps=[{"label": "a", "values": [{"label": "x", "value": 3, "set": {"train.lr": 1}}]}]
    ),
    "value: 3 has no effect: `set` sets train.lr, too": table(
        sweeps=[{"key": "train.lr", "values": [{"label": "x", "value": 3, "set": {"train": {"lr": 1}}}]}]
    ),
    "train.lr is set by two of the grid's values": table(
        grid={"train.lr": [1.0e-3], "data.num_frames": [{"label": "x", "set": {"data.num_frames": 1, "train.lr": 2}}]}
    ),
    "train.lr is set twice": {"set": {"train.lr": 1, "train": {"lr": 2}}},
    "unknown key tabels: did you mean tables": {"tabels": []},
    "row 5000: .*data.num_frames=5000: must be at most 4096": table(grid={"data.num_frames": [1, 5000]}),
    "table t, row 1: unknown key data.num_frame in .*did you mean data.num_frames": table(grid={"data.num_frame": [1, 2]}),
    "exactly one of grid, rows and sweeps; has grid and rows": table(grid=BASE, rows=[{"label": "a"}]),
    "has none": table(),
    "table t: unknown key grids: did you mean grid": table(grids=BASE),
    "baseline .*3.* is none of the grid's rows.* 1; 2": table(grid=BASE, baseline={"data.num_frames": 3}),
    "baseline: data.fps is not one of the grid's keys": table(grid=BASE, baseline={"data.fps": 3}),
    "baseline: 'c' is not a row's label; they are a": table(rows=[{"label": "a"}], baseline="c"),
    "two rows have the label a": table(rows=[{"label": "a"}, {"label": "a", "set": {"train.lr": 1}}]),
    "rows a and b are the same": table(rows=[{"label": "a"}, {"label": "b", "set": {"train.lr": "1e-3"}}]),
    "two tables have this name": {"tables": FILE["tables"][:1] * 2},
    "name must consist of a-z": {"tables": [{"name": "A b", "grid": BASE}]},
    "no value is that of the base .train.batch_size=64.": table(sweeps=[{"key": "train.batch_size", "values": [1, 2]}]),
    "row b: from: stage-on .*did you mean stage-one": table(rows=[{"label": "b", "from": "stage-on"}]),
    "recipe b: from: a is not one": {"recipes": {"b": {"from": "a"}, "a": {}}},
    "evaluate: nowhere is neither a recipe": table(rows=[{"label": "b", "evaluate": "nowhere"}]),
    "train.lr has no effect on an evaluation": table(rows=[{"label": "b", "evaluate": "stage-one", "set": {"train.lr": 1}}]),
    "model.init_from=openai is set, and `from: stage-one`": table(
        rows=[{"label": "b", "from": "stage-one", "set": {"model.init_from": "openai"}}]
    ),
    "run.seed cannot be set: write seeds": {"set": {"run": {"seed": 3}}},
    "seeds names one twice": {"seeds": [1, 1]},
    "seeds must be whole numbers": {"seeds": [1.5]},
    "jobs must be a whole number, at least 1": {"jobs": 0},
    "plot must name one of the keys": table(grid=BASE, plot="train.lr"),
    "plot: model.head=\"?meanP.* is not a number": table(grid={"model.head": ["meanP", "wti"]}, plot="model.head"),
    "cfg must name the recipe": {"cfg": None},
    "no configuration demo_smal.yaml: did you mean demo_small.yaml": {"cfg": "demo_smal.yaml"},
    "launcher is empty": {"launcher": ""},
    "tables must be a list": {"tables": {}},
    "title must be text": {"title": 3},
    "row b: from must name one of": table(rows=[{"label": "b", "from": ["stage-one"]}]),
    "data.train has no effect on an evaluation": table(rows=[{"label": "b", "evaluate": "stage-one", "set": {"data.train": "x"}}]),
    "a label is one line of characters that can be printed; got 'a.nb'": table(rows=[{"label": "a\nb"}]),
    "table t, sweep a.b: a label is one line": table(sweeps=[{"label": "a\tb", "key": "train.lr", "values": [1]}]),
    "baseline: 64 is 2 of the values 64, 64": table(sweeps=[{"key": "train.batch_size", "values": [64, 64], "baseline": 64}]),
    "unknown key trian in the study's settings: did you mean train": {"set": {"trian.lr": 1}},
    "data.train=datetime.date.* must be text": {"set": {"data.train": date(2020, 1, 1)}},
    "title must be text; got 2020-01-01": {"title": date(2020, 1, 1)},
    "seeds must be below 2..63": {"seeds": [2**63]},
    "jobs must be at most 1024": {"jobs": 10**9},
    "out must name a folder, without ~; got '~/x'": {"out": "~/x"},
    "out must name a folder, without ~; got ''": {"out": ""},
    "which key": table(sweeps=[{"label": "a", "values": [1]}]),
    "is written in each of the sweeps": table(sweeps=[{"key": "train.lr", "values": [1]}], baseline="a"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(tmp_path, message):
    with pytest.raises(ConfigError, match=message):
        study_in(tmp_path, **WRONG[message])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.num_frames=3", "data.num_frames=3 on the command line: .*table frames, row 1 sets this key"),
        ("run.dir=x", "run.dir cannot be set"), ("train.epochs", "write it as key=value"), ("train.epoch=1", "did you mean train.epochs"),
    ],
)  # fmt: skip
def test_words_that_are_refused(tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        study_in(tmp_path, word)


def test_a_key_that_is_written_twice_is_no_guess(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text() + "seeds: [7]\n")
    with pytest.raises(ConfigError, match=r"study.yaml is not YAML: the key seeds stands twice \(line \d+, column 1\)"):
        read_study(file)
    file.write_text("cfg: demo_small.yaml\ntables: &a [*a]\n")
    with pytest.raises(ConfigError, match=r"the alias \*a is inside what it stands for \(line 2, column 13\)"):
        read_study(file)
    with pytest.raises(ConfigError, match=r"^--seeds: seeds names one twice"):
        read_study(written(tmp_path), seeds=[1, 1])


def test_missing_data_is_named_with_the_row_that_needs_it(tmp_path):
    study = study_in(tmp_path, "data.train=nowhere/train")
    with pytest.raises(ConfigError, match="table frames, row 1: there is no folder nowhere/train"):
        require_splits(study)
    words = (f"data.train={tmp_path}", f"data.test={tmp_path}", "model.init_from=no/run")
    with pytest.raises(
        ConfigError, match=r"row one: model.init_from=no/run: there is no such file or folder .looked in"
    ):
        require_splits(study_in(tmp_path, *words, **table(rows=[{"label": "one"}])))
    rows = table(rows=[{"label": "a", "evaluate": "openai:ViT-B-32"}])
    require_splits(study_in(tmp_path, f"data.test={tmp_path}", "data.train=nowhere", **rows))  # which it does not read


def test_a_recipe_beside_the_file_is_found_there(tmp_path):
    (tmp_path / "own_small.yaml").write_text("extends: demo_small.yaml\ntrain: {lr: 0.25}\n")
    study = study_in(tmp_path, cfg="own_small.yaml")
    recipe = study.tables[0].rows[0].recipe
    assert recipe.config.train.lr == 0.25 and recipe.cfg == str(tmp_path / "own_small.yaml")


@pytest.mark.parametrize("name", ["study_msrvtt.yaml"])
def test_shipped_studies_are_read(name):
    study = read_study(Path(name))
    assert study.out == Path("runs", name.removesuffix(".yaml")) and len(study.tables) == 4


def test_seeds_jobs_and_folder_of_the_command_line_count(tmp_path):
    study = read_study(written(tmp_path), out=tmp_path / "x", seeds=[7], jobs=5)
    assert (study.out, study.seeds, study.jobs) == (tmp_path / "x", (7,), 5)
    assert study.options == ("--out", str(tmp_path / "x"), "--jobs", "5", "--seeds", "7")  # the page's command has them
    assert read_study(written(tmp_path)).options == ()

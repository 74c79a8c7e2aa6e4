"""Which rows share a cell, where it lies, and what a person types for it."""

import json
import os
import shlex

import yaml

from c4c.config import Config, dump, to_dict
from c4c.study.cells import cells_of, command_of, digest_of, in_order
from shards.concat import open_splits
from shards.schema import FORMAT_VERSION
from tests.c4c.study.studies import study_in

ROWS = [
    {"label": "zero", "evaluate": "openai:ViT-B-32"},
    {"label": "one, zero-shot", "evaluate": "stage-one"},
    {"label": "one, tuned", "from": "stage-one"},
    {"label": "same as the base", "set": {"train.lr": "1e-3", "model.head": "meanP"}},
]


def named(study, row, seed=1, table="t"):
    return cells_of(study)[table, row, seed]


def test_equal_settings_are_one_cell_however_they_are_written(tmp_path):
    study = study_in(tmp_path)
    cells = cells_of(study)
    assert cells["frames", "2", 1] is cells["pretraining", "none", 1]
    assert cells["frames", "2", 1] is not cells["frames", "2", 2]
    other = study_in(tmp_path, tables=[{"name": "t", "rows": ROWS}])
    assert named(other, "same as the base").folder == cells["frames", "2", 1].folder


def test_folders_say_what_differs_and_end_with_digest_and_seed(tmp_path):
    cells = cells_of(study_in(tmp_path))
    names = {cell.name.replace(cell.digest, "D") for cell in in_order(cells)}
    assert names == {
        f"{name}-D-seed{seed}"
        for name in ("num_frames=1", "base", "num_frames=4", "stage-one", "from-stage-one,lr=0.0005")
        for seed in (1, 2)
    }


def test_weights_that_are_only_evaluated_are_one_cell_for_all_seeds(tmp_path):
    study = study_in(tmp_path, tables=[{"name": "t", "rows": ROWS}])
    cells = cells_of(study)
    zero, first, second = cells["t", "zero", 1], cells["t", "one, zero-shot", 1], cells["t", "one, zero-shot", 2]
    assert zero is cells["t", "zero", 2] and zero.seed is None
    assert zero.folder.name == f"eval-openai-ViT-B-32-{zero.digest}"
    assert first is not second
    assert [first.needs, second.needs] == [cells["t", "one, tuned", seed].needs for seed in (1, 2)]


def test_a_folder_keeps_its_name_when_the_base_changes(tmp_path):
    first = named(study_in(tmp_path), "4", table="frames")
    first.folder.mkdir(parents=True)
    changed = named(study_in(tmp_path, set={"data.num_frames": 4}), "4", table="frames")
    assert changed.folder == first.folder
    assert named(study_in(tmp_path, "train.eps=0.5"), "4", table="frames").folder != first.folder


def test_a_cell_depends_on_what_it_starts_from(tmp_path):
    tuned = [named(study_in(tmp_path, *words), "stage one", table="pretraining") for words in ((), ("train.epochs=2",))]
    changed = study_in(tmp_path, recipes={"stage-one": {"cfg": "demo_narrated.yaml", "set": {"train.lr": 0.5}}})
    digests = {cell.digest for cell in (*tuned, named(changed, "stage one", table="pretraining"))}
    assert len(digests) == 3


def test_the_digest_of_a_recipe_stays(tmp_path):
    """Cells that were trained must be found again: a change here makes everybody's studies train anew."""
    study = study_in(tmp_path, tables=[{"name": "t", "rows": ROWS}], cfg="demo_small.yaml")
    assert [digest_of(row.recipe) for row in study.tables[0].rows] == DIGESTS


DIGESTS = ["f4613c37", "3ab55a74", "9a228523", "e544e7ff"]


def test_commands_make_the_row(tmp_path):
    study = study_in(
        tmp_path,
        set={"data.num_frames": 3},
        tables=[{"name": "t", "rows": ROWS}],
        launcher="torchrun --nproc_per_node 8",
    )
    first, then = (shlex.split(part) for part in command_of(study, study.tables[0].rows[2], 2).split(" && "))
    source, cell = named(study, "one, tuned", 2).needs, named(study, "one, tuned", 2)
    start = ["torchrun", "--nproc_per_node", "8", "launch/train.py", "--cfg"]
    assert first == [*start, "demo_narrated.yaml", "run.seed=2", f"run.dir={source.folder}", "run.resume=auto"]
    own = [
        f"model.init_from={source.folder}",
        "data.num_frames=3",
        "run.seed=2",
        f"run.dir={cell.folder}",
        "run.resume=auto",
    ]
    assert then == [*start, "demo_small.yaml", *own]
    (zero,) = named(study, "zero").commands
    assert zero[:4] == ["python", "launch/eval.py", "--ckpt", "openai:ViT-B-32"] and "data.num_frames=3" in zero
    assert zero[zero.index("--data") + 1] == "data/narrated/test"
    (one,) = named(study, "one, zero-shot", 2).commands
    assert one[3] == str(source.folder) and one[-1] == "data.num_frames=3"


def test_done_is_a_run_with_the_settings_of_the_cell(tmp_path):
    study = study_in(tmp_path)
    cell = cells_of(study)["frames", "1", 1]
    assert not cell.is_done()
    cell.folder.mkdir(parents=True)
    (cell.folder / "done.json").write_text("{}")
    settings = yaml.safe_load(dump(cell.recipe.config))
    settings["run"] |= {"seed": 1, "dir": "elsewhere"}
    # the backbone's, which the study leaves to it
    settings["data"] |= {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert cell.problem() == "" and cell.is_done()
    settings["train"]["lr"] = 0.5
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "train.lr was 0.5, is 0.001" in cell.problem() and not cell.is_done()


def test_an_evaluation_is_done_again_after_its_run_was_trained_again(tmp_path):
    study = study_in(tmp_path, tables=[{"name": "t", "rows": ROWS}])
    cell = named(study, "one, zero-shot")
    for folder, name in ((cell.needs.folder, "done.json"), (cell.folder, "eval.json")):
        folder.mkdir(parents=True)
        (folder / name).write_text(json.dumps({}))
    assert cell.is_done()
    os.utime(cell.folder / "eval.json", (1e9, 1e9))
    assert not cell.is_done()
    # a copy has other times, but says when its cells ended
    (cell.needs.folder / "done.json").write_text(json.dumps({"time_unix_s": 50.0}))
    for ended in (49.0, 51.0):
        row = {"began": 40.0, "ended": ended, "code": 0}
        (cell.folder / "attempts.jsonl").write_text(json.dumps(row) + "\n")
        assert cell.is_done() == (ended > 50)


def test_an_evaluation_is_done_again_after_its_checkpoint_was_written_again(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    (run / "checkpoints" / "latest").write_text("step1")
    rows = [{"label": "a", "evaluate": str(run)}, {"label": "b", "evaluate": "openai:ViT-B-32"}]
    study = study_in(tmp_path, tables=[{"name": "t", "rows": rows}])
    cells = [named(study, label) for label in "ab"]
    for cell in cells:
        cell.folder.mkdir(parents=True)
        (cell.folder / "eval.json").write_text("{}")
    assert all(cell.is_done() for cell in cells)
    for cell in cells:
        os.utime(cell.folder / "eval.json", (1e9, 1e9))
    assert [cell.is_done() for cell in cells] == [False, True]


def test_a_training_from_a_run_that_was_trained_anew_is_not_the_cells(tmp_path):
    study = study_in(tmp_path, tables=[{"name": "t", "rows": ROWS}])
    cell = named(study, "one, tuned")
    for folder, ended in ((cell.needs.folder, 50.0), (cell.folder, 60.0)):
        folder.mkdir(parents=True)
        (folder / "done.json").write_text(json.dumps({"step": 2, "best": "x", "time_unix_s": ended}))
    assert cell.is_done() and cell.problem() == ""
    (cell.needs.folder / "done.json").write_text(json.dumps({"step": 2, "best": "x", "time_unix_s": 70.0}))
    assert not cell.is_done()
    told = f"{cell.needs.name}, which it started from, was trained anew since. Move {cell.folder} away"
    assert told in cell.problem()
    (cell.needs.folder / "done.json").unlink()  # what is not there tells nothing
    assert cell.is_done()


def packed(folder, digest):
    """As much of a split as tells its digest, with a time of its own."""
    folder.mkdir(exist_ok=True)
    info = {"format": FORMAT_VERSION, "name": "a", "split": "b", "profile": {"name": "intra"}, "videos": 0, "captions": 0, "rejected_videos": 0,
            "rejected_captions": 0, "digest": digest, "shards": [], "plan": {}}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))
    os.utime(folder / "dataset.json", ns=(len(digest), int(digest, 16)))
    return str(folder)


def test_a_result_of_data_that_was_packed_anew_is_not_the_cells(tmp_path):
    train, test = packed(tmp_path / "train", "a" * 8), packed(tmp_path / "test", "b" * 8)
    more = packed(tmp_path / "more", "e" * 8)
    rows = [{"label": "trained"}, {"label": "evaluated", "evaluate": "openai:ViT-B-32"}]
    words = [f"data.train=[{train}, {more}]", f"data.test={test}"]
    study = study_in(tmp_path, *words, tables=[{"name": "t", "rows": rows}])
    trained, evaluated = named(study, "trained"), named(study, "evaluated")
    both = open_splits([train, more]).digest
    for cell, name, about in (
        (trained, "done.json", {"step": 2, "best": "x", "data": {"train": both, "test": "b" * 8}}),
        (evaluated, "eval.json", {"split_digest": "b" * 8}),
    ):
        cell.folder.mkdir(parents=True)
        (cell.folder / name).write_text(json.dumps(about))
    assert (trained.problem(), evaluated.problem()) == ("", "")
    packed(tmp_path / "train", "c" * 8)
    assert f"when {train}, {more} held other videos or captions" in trained.problem() and not trained.is_done()
    assert evaluated.is_done()
    packed(tmp_path / "train", "a" * 8)
    packed(tmp_path / "test", "d" * 8)
    for cell in (trained, evaluated):
        assert f"when {test} held other videos or captions. Move {cell.folder} away" in cell.problem()


def test_a_result_is_not_the_cells_where_its_source_was_made_of_other_data(tmp_path):
    train = packed(tmp_path / "train", "a" * 8)
    study = study_in(
        tmp_path, tables=[{"name": "t", "rows": ROWS}], recipes={"stage-one": {"set": {"data.train": train}}}
    )
    tuned, evaluated = named(study, "one, tuned"), named(study, "one, zero-shot")
    for cell, name in ((tuned.needs, "done.json"), (tuned, "done.json"), (evaluated, "eval.json")):
        cell.folder.mkdir(parents=True)
        data = {"train": "a" * 8} if cell is tuned.needs else {}
        (cell.folder / name).write_text(json.dumps({"step": 2, "best": "x", "data": data, "time_unix_s": 50.0}))
    assert tuned.is_done() and evaluated.is_done()
    packed(tmp_path / "train", "c" * 8)
    for cell in (tuned, evaluated):
        assert not cell.is_done() and f"it was made from {cell.needs.name}, and of that one: " in cell.problem()


def test_a_run_that_does_not_tell_its_data_is_taken_as_it_is(tmp_path):
    test = packed(tmp_path / "test", "b" * 8)
    study = study_in(tmp_path, f"data.test={test}", tables=[{"name": "t", "rows": [{"label": "trained"}]}])
    cell = named(study, "trained")
    cell.folder.mkdir(parents=True)
    (cell.folder / "done.json").write_text('{"step": 2, "best": "x"}')
    assert not cell.problem()

"""bench/options.py without training: which runs it starts, in which order, and what its table says of them."""

import json
import os
import re

import pytest

from bench import options
from c4c.config import dump, load
from c4c.models.backbone import settled
from c4c.training.run_folder import mark_done


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "RUNS", tmp_path)
    monkeypatch.setattr(options, "ROOT", tmp_path.parent)
    return tmp_path


def test_rows_have_names_of_their_own_and_settings_that_exist():
    names = [row.name for row in options.ROWS]
    assert len({options.folder_of(name, 1) for name in names}) == len(names)
    for row in options.ROWS:
        assert all(need in names for need in row.needs)
        load(row.cfg, [*options.BASE, *row.settings], [options.RECIPES])


def test_a_row_brings_what_it_needs_and_comes_after_it():
    chosen = options.chosen(["LoRA", "taught", "average of"])
    assert [row.name for row in chosen] == [
        "plain", "wti", "taught by wti", "average of 3 checkpoints", "stage one", "from stage one, all weights", "from stage one, LoRA",
    ]  # fmt: skip
    assert [row.depth for row in chosen] == [0, 0, 1, 1, 0, 1, 1]
    assert options.chosen([]) == list(options.ROWS)
    with pytest.raises(SystemExit, match="--only wtii: no row has that in its name; the rows are: plain; wti; "):
        options.chosen(["wti", "wtii"])


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], True),
        (["--only", "wti"], False),
        (["--only", "wti", "--json", "x.json"], True),
        (["--only", "wti", "--json", str(options.harness.RESULTS / "x.json")], True),
        (["--only", "wti", "--json", str(options.harness.RESULTS / "options.json")], False),
    ],
)
def test_some_rows_do_not_replace_the_kept_result_of_all(monkeypatch, words, kept):
    saved = []
    monkeypatch.setattr("sys.argv", ["options.py", *words])
    monkeypatch.setattr(options.harness, "save", lambda path, report: saved.append(path))
    for name in ("require_data", "beside_baseline", "outcome_of"):
        monkeypatch.setattr(options, name, lambda *given: None)
    monkeypatch.setattr(options, "inference", lambda *given: {})
    monkeypatch.setattr(options, "show", lambda found, markdown: saved.append(markdown))
    for name in ("run", "require_current"):
        monkeypatch.setattr(options.Cell, name, lambda cell: None)
    options.main()
    assert [path is not None for path in saved] == [kept, kept]  # the numbers, and the table made of them


def test_what_is_started(runs, monkeypatch):
    started = []
    monkeypatch.setattr(options, "start", lambda *words, log: started.append([str(word) for word in words]))
    by_name = {row.name: row for row in options.ROWS}
    for name in ("taught by wti", "from stage one, LoRA", "average of 3 checkpoints", "merged in evaluation only"):
        options.Cell(by_name[name], 7, ("train.max_steps=3",), 5).run()
    taught, lora, average, averaged, merged = started
    assert f"train.teacher={runs.name}/wti-7" in taught and "run.seed=7" in taught
    assert taught.index("train.max_steps=3") > taught.index(options.BASE[0])
    assert f"model.init_from={runs.name}/stage-one-5" in lora and "train.lora=8" in lora
    assert average[:3] == ["-m", "c4c.average", str(runs / "plain-7")] and average[3:5] == ["--last", "3"]
    assert averaged[2] == str(runs / "average-of-3-checkpoints-7/average") and merged[3:5] == ["--merge", "2"]
    (runs / "wti-7").mkdir()
    mark_done(runs / "wti-7", 1, "")
    options.Cell(by_name["wti"], 7, (), 5).run()
    assert len(started) == 5  # what is done is not run again


def test_runs_with_other_settings_or_sources_are_not_read(runs):
    by_name, at = {row.name: row for row in options.ROWS}, 0

    def done(name: str, *words: str) -> options.Cell:
        nonlocal at
        cell, at = options.Cell(by_name[name], 7, words, 5), at + 100
        cell.folder.mkdir(exist_ok=True)
        file = cell.folder / ("eval.json" if cell.row.of else "done.json")
        file.write_text("{}")
        os.utime(file, (at, at))
        if not cell.row.of:
            config = settled(load(cell.row.cfg, cell.words, [options.RECIPES]))
            (cell.folder / "config.yaml").write_text(dump(config))
        return cell

    plain, wti, taught, merged = map(done, ("plain", "wti", "taught by wti", "merged in evaluation only"))
    for cell in (plain, wti, taught, merged):
        cell.require_current()
    with pytest.raises(SystemExit, match=r"delete .*plain-7, .*train\.max_steps was \d+, is 3"):
        options.Cell(plain.row, 7, ("train.max_steps=3",), 5).require_current()
    done("wti"), done("plain")
    for cell, source in ((taught, wti), (merged, plain)):
        with pytest.raises(SystemExit, match=f"{cell.folder} was made from another {source.folder} than there is now"):
            cell.require_current()


def test_data_that_is_not_there_is_told_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no data/demo: .*c4c\.shard demo --out data/demo"):
        options.require_data(options.ROWS)
    (tmp_path / "data/demo").mkdir(parents=True)
    options.require_data(options.chosen(["seqTransf"]))
    with pytest.raises(SystemExit, match=r"no data/narrated: .*demo-narrated"):
        options.require_data(options.ROWS)


def test_a_run_that_fails_is_told(runs, capsys):
    (runs / "bad").mkdir()
    with pytest.raises(options.subprocess.CalledProcessError):
        options.start("-c", "import sys; print('what was wrong'); sys.exit(3)", log=runs / "bad")
    told = capsys.readouterr()
    assert re.fullmatch(r"bad: \d+ s, exit 3\n", told.out) and "what was wrong" in told.err


def test_the_speed_of_the_fastest_tenth(tmp_path):
    rows = [
        json.dumps({"step": step, "clips_per_s": float(speed)}) for step, speed in enumerate([5, 90, *range(10, 28)])
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert options.clips_per_s(tmp_path) == 27.0


def test_the_table(tmp_path, capsys):
    plain = {"row": "plain", "beside": "plain", "R1": [10.0, 12.0, 14.0], "own_first": [50.0, 50.0, 53.0]}
    other = {"row": "other", "beside": "plain", "R1": [15.0, 18.0, 18.0], "own_first": [None, None, None]}
    plain |= {
        "train_clips_per_s": 200.0,
        "inference_clips_per_s": 50.0,
        "bytes_a_video": 256,
        "flop_a_video": 2e6,
        "published": "",
    }
    other |= {
        "published": "43.1",
        "train_clips_per_s": 300.0,
        "inference_clips_per_s": 25.0,
        "flop_a_video": 1.4e6,
        "bytes_a_video": 1024,
    }
    plain |= {"memory_gib": [1.0, 1.25, 1.0], "trained": 3_400_000}
    evaluated = {
        key: other[key]
        for key in ("beside", "published", "R1", "own_first", "inference_clips_per_s", "flop_a_video", "bytes_a_video")
    }
    found = [plain, other, evaluated | {"row": "evaluated"}]
    options.beside_baseline(found)
    assert "R1_difference" not in plain and found[1]["train_ratio"] == 1.5 and found[1]["inference_ratio"] == 0.5
    assert found[1]["R1_difference"]["mean"] == 5
    first, second, third = (options.cells_of(row) for row in found)
    assert first == ["plain", "12.0 ± 2.0", "", "51.0 ± 1.7", "200", "50", "2", "256", "1.25", "3.400"]
    # paired differences 5, 6, 4: 5 ± t(0.975, 2) / sqrt(3), which is 4.3027 / 1.7321 = 2.484
    assert second[2] == "+5.0 (+2.5 to +7.5)" and second[3:6] == ["-", "300 (1.50 ×)", "25 (0.50 ×)"]
    assert third[4] == "-" and third[6:] == ["1", "1024", "-", "-"]
    options.show(found, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 5 and lines[1].startswith("| --- |") and all(line.count("|") == 12 for line in lines)
    assert "own video" in capsys.readouterr().out
    json.dumps(found)

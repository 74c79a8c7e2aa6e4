"""What runs when: order, failures, restarts, two studies at once. The trainings are stand-ins."""

import json
import signal
import threading
import time

import pytest
import yaml

from c4c.config import to_dict
from c4c.study import processes
from c4c.study.attempts import last_error
from c4c.study.cells import cells_of, in_order
from c4c.study.executors import LocalExecutor
from c4c.study.jobs import StopRequest, attempts_path
from c4c.study.lock import FolderLock
from c4c.study.run import StudyProgress, lock_of, run
from tests.c4c.study.studies import events, nothing, results, study_in


def ran(study, say=nothing, jobs=2, **more) -> StudyProgress:
    executor = LocalExecutor(jobs)
    try:
        return run(study, executor, say, write=nothing, **more)
    finally:
        executor.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.05")


def test_every_cell_runs_once_and_sources_come_first(tmp_path):
    study = study_in(tmp_path)
    said = []
    progress = ran(study, said.append)
    assert (progress.done, progress.total, progress.failed) == (10, 10, {})
    done = events(study.out, "done")
    assert len(done) == 10 == len(set(done)) == len(events(study.out, "began"))
    cells = cells_of(study)
    for seed in (1, 2):
        cell = cells["pretraining", "stage one", seed]
        assert done.index(cell.needs.name) < done.index(cell.name)
    assert sum(text.startswith("done ") for text in said) == 10 and "10/10 done" in said[-1]
    assert any(" left, about " in text for text in said)
    assert ran(study).done == 10 and len(events(study.out, "began")) == 10  # nothing is run again


def test_only_so_many_at_once_each_with_its_share(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    study = study_in(tmp_path)
    ran(study, jobs=3)
    rows = [json.loads(line) for line in (study.out / "starts.jsonl").read_text().splitlines()]
    at_work = most = 0
    for row in rows:
        at_work += {"began": 1, "done": -1}[row["what"]]
        most = max(most, at_work)
    assert most == 3
    assert {row["cores"] for row in rows if row["what"] == "began"} == {"4"}


def test_each_cell_has_gpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    study, executor = study_in(tmp_path), LocalExecutor(2, gpus_per_cell=2)
    run(study, executor, nothing, write=nothing)
    executor.close()
    rows = [json.loads(line) for line in (study.out / "starts.jsonl").read_text().splitlines()]
    busy = set()
    for row in rows:
        if row["what"] == "began":
            assert row["gpus"] in {"4,5", "6,7"} - busy
            busy.add(row["gpus"])
            own = {row["cell"]: row["gpus"]}
        else:
            busy = busy - {next(r["gpus"] for r in rows if r["cell"] == row["cell"])}
    assert own
    with pytest.raises(ValueError, match="takes 6 GPUs, and this machine has 4"):
        LocalExecutor(3, gpus_per_cell=2)


def test_a_failure_stops_no_other_cell_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "stage-one-:num_frames=4")
    study, said = study_in(tmp_path), []
    progress = ran(study, said.append)
    cells = cells_of(study)
    assert set(progress.failed.values()) == {"the loss is not finite"} and len(progress.failed) == 4
    assert set(progress.blocked) == {cells["pretraining", "stage one", seed].name for seed in (1, 2)}
    assert progress.done == 4 and str(progress) == "4 of 10 cells done, 4 failed, 2 not run because of that"
    assert sum(text.startswith("not run: from-stage-one") for text in said) == 2
    attempt = json.loads(attempts_path(cells["frames", "4", 1].folder).read_text().splitlines()[-1])
    assert attempt["code"] == 3 and attempt["began"] <= attempt["ended"] <= time.time()
    monkeypatch.delenv("FAKE_FAIL")
    assert ran(study).done == 10
    assert len(events(study.out, "done")) == 10


def test_only_the_tables_that_are_named_run_with_what_they_need(tmp_path):
    study = study_in(tmp_path)
    assert ran(study, only=["pretraining"]).total == 6
    assert not [name for name in events(study.out, "began") if name.startswith("num_frames=")]


def test_what_is_no_longer_asked_for_stays_and_is_named(tmp_path):
    ran(study_in(tmp_path))
    said = []
    progress = ran(study_in(tmp_path, seeds=[1]), said.append)
    assert progress.total == progress.done == 5
    assert len(said) == 1 and "does not ask for them" in said[0] and said[0].count("-seed2") == 5
    assert len(results(tmp_path / "out")) == 10


def test_a_cell_with_other_settings_than_asked_for_fails(tmp_path):
    study = study_in(tmp_path)
    ran(study)
    cell = cells_of(study)["frames", "1", 1]
    settings = to_dict(cell.recipe.config)
    settings["train"]["lr"], settings["run"]["seed"] = 0.5, 1
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    progress = ran(study)
    assert (
        "was made with other settings" in progress.failed[cell.name]
        and "(train.lr was 0.5, is 0.001)" in progress.failed[cell.name]
    )
    assert "train.lr was 0.5" in last_error(cell.folder, 1)
    assert json.loads(attempts_path(cell.folder).read_text().splitlines()[-1])["code"] == 1


def test_a_stop_saves_what_runs_and_the_next_start_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "5")
    study, stop, said = study_in(tmp_path), StopRequest(), []

    def stop_soon() -> None:
        while not events(study.out, "began"):
            time.sleep(0.01)
        stop.by = signal.SIGTERM

    threading.Thread(target=stop_soon).start()
    progress = ran(study, said.append, stop=stop)
    saved = events(study.out, "saved")
    assert 0 < len(saved) <= 2 and progress.done < 10 and not progress.failed
    cell = next(cell for cell in in_order(cells_of(study)) if cell.name == saved[0])
    last = json.loads(attempts_path(cell.folder).read_text().splitlines()[-1])
    assert last["code"] is None and last["stopped"] == "SIGTERM" and last["ended"]
    assert any(text.startswith("stopped ") for text in said)
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    assert ran(study).done == 10
    assert sorted(events(study.out, "done")) == sorted(cell.name for cell in in_order(cells_of(study)))


def test_a_second_study_in_the_folder_is_refused(tmp_path):
    study = study_in(tmp_path)
    lock = lock_of(study)
    with pytest.raises(ValueError, match=r"out is in use: process \d+ on .* is running a study in it"):
        ran(study)
    lock.release()
    assert ran(study).done == 10


def test_a_cell_that_somebody_else_is_at_is_waited_for(tmp_path):
    study, said = study_in(tmp_path), []
    cell = cells_of(study)["frames", "1", 1]
    cell.folder.mkdir(parents=True)
    lock = FolderLock(cell.folder / ".study.lock")
    assert lock.take()
    processes.sign(cell.folder)

    def end() -> None:
        (cell.folder / "eval.jsonl").write_text('{"step": 2, "val/t2v_R1_pct": 5}\n')
        (cell.folder / "done.json").write_text("{}")
        lock.release()

    threading.Timer(1, end).start()
    assert ran(study, said.append).done == 10
    assert cell.name not in events(study.out, "began")
    assert any(text.startswith(f"waiting for {cell.name}") for text in said)


def test_outputs_that_cannot_be_written_end_nothing(tmp_path):
    def write(_):
        raise OSError("no space left")

    study, said, executor = study_in(tmp_path), [], LocalExecutor(2)
    progress = run(study, executor, said.append, write=write)
    executor.close()
    assert progress.done == 10 and progress.unwritten == "no space left"
    assert any("warning: the outputs could not be written: no space left" in text for text in said)


def test_a_result_that_cannot_be_read_is_no_success(tmp_path):
    study = study_in(tmp_path)
    assert ran(study).damaged == {}
    first, second = in_order(cells_of(study))[:2]
    (first.folder / "eval.jsonl").unlink()
    (second.folder / "done.json").write_text("")
    progress = ran(study)
    assert str(progress) == "10 of 10 cells done, 2 with a damaged result"
    assert "has no validation of the last step" in progress.damaged[first.name]
    assert "done.json is damaged" in progress.damaged[second.name]


def test_a_folder_that_cannot_be_made_is_told_without_numbers(tmp_path):
    study = study_in(tmp_path)
    study.out.mkdir()
    (study.out / "cells").touch()
    with pytest.raises(ValueError, match=r"^out: .*/out/cells: File exists$"):
        ran(study)

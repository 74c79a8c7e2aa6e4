"""What a person sees while training, and the table of results."""

import io

import pytest
from rich.console import Console

from c4c.training import screen as report
from c4c.training.screen import Report, metrics_table

STEP = {"train/loss": 1.23456, "train/lr": 1e-4, "train/logit_scale": 14.3, "clips_per_s": 20.0,
        "frames_per_s": 240.0, "data/wait_pct": 12.5, "memory_gib": 1.5, "mfu_pct": 33.3}  # fmt: skip
RESULT = {
    "t2v": {"R1": 43.1, "R5": 70.4, "R10": 80.8, "MdR": 2.0, "MnR": 16.2},
    "v2t": {"R1": 42.5, "R5": 70.6, "R10": 80.2, "MdR": 2.5, "MnR": 12.4},
    "n_texts": 1000,
    "n_videos": 999,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(report.time, "monotonic", lambda: Clock.now)
    return Clock


def show(on: bool, steps: int, clock, seconds: float = 1.0) -> None:
    with Report(on, total_steps=20, steps_per_epoch=10, done=0) as shown:
        for step in range(1, steps + 1):
            clock.now += seconds
            shown.step(step, STEP)
        shown.validation(steps, RESULT)
        shown.say("done [bold]really[/]")


def test_plain_lines_where_there_is_no_terminal(capsys, clock):
    show(True, 20, clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    first, *rest = err.splitlines()
    assert (
        first
        == "epoch 1/2  step 1/20  loss 1.2346  lr 1.00e-04  scale 14.3  clips/s 20.0  frames/s 240  data wait 12.5%  "
        "memory 1.5 GiB  MFU 33.3%  ETA 0:19"
    )
    assert [line.split("  ")[1] for line in rest if line.startswith("epoch")] == [
        "step 7/20",
        "step 13/20",
        "step 19/20",
        "step 20/20",
    ]
    assert rest[-2].startswith("validation after step 20: t2v R@1 43.1  R@5 70.4  R@10 80.8  MdR 2.0   v2t R@1 42.5")
    assert rest[-1] == "done [bold]really[/]"  # a path in brackets is not markup


def test_epochs_are_counted_from_1(capsys, clock):
    show(True, 11, clock, seconds=6)
    shown = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert shown == ["epoch 1/2"] * 10 + ["epoch 2/2"]


def test_time_to_go_counts_from_where_the_run_was_resumed(capsys, clock):
    with Report(True, total_steps=5000, steps_per_epoch=10, done=1000) as shown:
        clock.now += 2
        shown.step(1001, STEP)
    assert capsys.readouterr().err.rstrip().endswith("ETA 2:13:18")


def test_the_best_validation_is_remembered(capsys):
    shown = Report(True, 20, 10, 0)
    for r1 in (10.0, 30.0, 20.0):
        shown.validation(1, RESULT | {"t2v": RESULT["t2v"] | {"R1": r1}})
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["10.0", "30.0", "30.0"]


def test_the_best_of_an_earlier_start_counts(capsys, clock):
    shown = Report(True, 20, 10, 10, [41.0, 12.0])
    shown.step(11, STEP)
    shown.validation(11, RESULT | {"t2v": RESULT["t2v"] | {"R1": 30.0}})
    first, second = capsys.readouterr().err.splitlines()
    assert "best R@1 41.0%" in first
    assert second.endswith("best t2v R@1 41.0")


def test_the_summary_says_what_to_do_next(capsys, clock):
    shown = Report(True, 20, 10, 0, [41.0])
    clock.now += 125
    shown.summary(20, 2, "python launch/eval.py --ckpt runs/a", "tensorboard --logdir runs/a")
    assert capsys.readouterr().err.splitlines() == [
        "done: 20 steps, 2:05 for the last 20; best t2v R@1 41.0; 2 steps skipped. Next:",
        "    python launch/eval.py --ckpt runs/a",
        "    tensorboard --logdir runs/a",
    ]


def test_other_ranks_say_nothing(capfd, monkeypatch, clock):
    show(False, 20, clock)
    monkeypatch.setattr("sys.stderr", Terminal())
    show(False, 20, clock)
    assert report.sys.stderr.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_a_live_screen_on_a_terminal(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    show(True, 15, clock)
    text = report.sys.stderr.getvalue()
    assert "\x1b" in text
    for part in (
        "epoch 2/2",
        "5/10",
        "step 15/20",
        "33.3%",
        "240",
        "1.5 GiB",
        "1.2346",
        "data wait",
        "12.5%",
        "ETA 0:05",
        "validation after step 15",
    ):
        assert part in text


def test_the_table():
    console = Console(file=io.StringIO(), width=100)
    console.print(metrics_table(RESULT))
    text = console.file.getvalue()
    assert "1000 texts, 999 videos" in text
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if "video" in line and "│" in line
    ]
    assert rows == [
        ["text to video", "43.1", "70.4", "80.8", "2.0", "16.2"],
        ["video to text", "42.5", "70.6", "80.2", "2.5", "12.4"],
    ]

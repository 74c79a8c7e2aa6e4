"""bench/gpu.py: its plan, parts that crash or hang, what is written when, and what the summary says."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, harness, smi
from bench.gpu_parts import report
from bench.gpu_parts.parts import CPU_ONLY, PARTS, Part
from bench.gpu_parts.process import end_of
from bench.gpu_parts.process import run as run_process

HEAVY = ("torch", "numpy", "nvidia", "deepspeed", "av", "open_clip", "pyarrow")


def part(name: str, limit_s: float = 60, **more) -> Part:
    return Part(name, f"tests.bench.stand_ins:{name.partition(' ')[0]}", limit_s, "a stand-in", **more)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


def measure(out, parts: list[Part], *words: str) -> tuple[int, dict]:
    code = gpu.main(["--json", str(out), *words], parts)
    return code, json.loads(out.read_text())


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_lists_every_part_with_its_limit_and_imports_nothing_heavy():
    script = f"import sys; from bench import gpu; gpu.main(['--plan']); print('HEAVY', {{*{HEAVY}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=harness.environment())
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    limits = {row[0]: float(row[1]) for row in rows if row[0]}
    assert limits == {part.name: part.limit_s for part in PARTS}
    assert "HEAVY set()" in done.stdout
    total = sum(part.limit_s * (2 if part.again else 1) for part in PARTS)
    assert f"Limits together: {total / 60:.0f} min with a GPU" in done.stdout


def test_the_decoder_is_swept_in_every_form():
    forms = {tuple(part.words.values()) for part in PARTS if part.run.endswith("decode:jpegs")}
    assert forms == {(crop, load, n) for crop in ("roi", "whole") for load in (0.0, 0.65, 1.0) for n in (4, 8, 16)}
    assert {part.limit_s for part in PARTS if part.run.endswith("decode:jpegs")} == {60}
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.mark.slow
def test_parts_that_crash_or_hang_cost_only_themselves(out, monkeypatch, capsys):
    monkeypatch.setattr(smi, "gpu_name", lambda: None)
    parts = [part("hangs", 6), part("crashes", again=True), part("fails"), part("lacks", again=True),
             part("crashes_at_exit"), part("ends on a GPU", gpu=True), part("ends", words={"rate": 5.0}, again=True)]  # fmt: skip
    code, found = measure(out, parts, "--runs", "2")
    assert code == 1
    parts = found["parts"]
    (hung,) = parts["hangs"]["runs"]
    assert hung["ended"] == "killed after 6 s" and not hung["ok"] and 6 <= hung["wall_s"] < 40
    assert any("stand_ins.py" in line for line in hung["stderr"]), "where it hung"
    time.sleep(0.1)
    assert not alive(hung["child"]), "a child outlived the part"
    (crashed,) = parts["crashes"]["runs"]  # not run again
    assert crashed["ended"] == "signal 11, SIGSEGV" and crashed["clips_per_s"] == 7.0
    assert any("stand_ins.py" in line and "crashes" in line for line in crashed["stderr"])
    assert parts["fails"]["runs"][0]["ended"] == "exit code 1"
    assert parts["fails"]["runs"][0]["stderr"][-1] == "ValueError: no dog to catch it"
    assert parts["crashes_at_exit"]["runs"][0] | {"wall_s": 0, "cpu_s": 0} == {
        "clips_per_s": 3.0, "ended": "exit code 9", "ok": False, "wall_s": 0, "cpu_s": 0, "stderr": [],
    }  # fmt: skip
    (lacking,) = parts["lacks"]["runs"]
    assert lacking["ok"] and lacking["left_out"] == "frisbee is not installed: pip install frisbee"
    assert parts["ends on a GPU"] == {"left_out": "it needs a GPU"}
    assert [run["clips_per_s"] for run in parts["ends"]["runs"]] == [5.0, 5.0]
    assert found["machine"]["gpu"] == "cpu" and found["machine"]["versions"]["python"]
    warned = "JPEGs on cuda:0: roi: signal 11; whole pictures are decoded (data.jpeg_crop=whole)"
    assert parts["ends"]["runs"][0]["warnings"] == [warned]
    assert f"The loader warned: {warned}" in found["summary"]
    said = " ".join(found["summary"])
    assert re.search(r"`crashes` failed: signal 11, SIGSEGV\. File \S+stand_ins\.py\S+ line \d+ in crashes", said)
    assert re.search(r"`hangs` failed: killed after 6 s\. File \S+stand_ins\.py\S+ line \d+ in hangs", said)
    assert "`fails` failed: exit code 1. ValueError: no dog to catch it" in said
    assert "frisbee is not installed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_measure_the_cpu(out, monkeypatch):
    monkeypatch.setattr(smi, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, found = measure(out, [part("ends", words={"rate": 5.0}), part("ends anyway", words={"rate": 5.0}, env=CPU_ONLY)])
    assert "torch cannot use it" in found["parts"]["ends"]["runs"][0]["left_out"]
    assert found["parts"]["ends anyway"]["runs"][0]["clips_per_s"] == 5.0


@pytest.mark.slow
def test_an_interrupt_ends_the_part_too(tmp_path):
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    mark = tmp_path / "pid"
    child = (
        f"{script.replace('print(os.getpid(), flush=True)', f'open({str(mark)!r}, chr(119)).write(str(os.getpid()))')}"
    )
    runner = (
        "import os, signal, sys, threading, time; from bench.gpu_parts.process import run\n"
        f"def later():\n"
        f"    while not os.path.exists({str(mark)!r}) or not open({str(mark)!r}).read(): time.sleep(0.05)\n"
        f"    os.kill(os.getpid(), signal.SIGINT)\n"
        f"threading.Thread(target=later, daemon=True).start()\n"
        f"run([sys.executable, '-c', {child!r}], 60, os.environ)"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner], capture_output=True, text=True, env=harness.environment(), timeout=30
    )
    assert "KeyboardInterrupt" in done.stderr
    assert not alive(int(mark.read_text()))


def test_results_are_written_as_each_part_ends(out, monkeypatch):
    seen = []

    def run(part, args, has_gpu, until):
        seen.append(list(json.loads(out.read_text())["parts"]) if out.exists() else None)
        return {"ended": "exit code 0", "ok": True, "wall_s": 1.0}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(smi, "gpu_name", lambda: None)
    code, found = measure(out, [part("ends a"), part("ends b"), part("ends c")])
    assert (code, list(found["parts"])) == (0, ["ends a", "ends b", "ends c"])
    assert seen == [None, ["ends a"], ["ends a", "ends b"]]


def test_first_runs_of_all_parts_come_before_second_ones(out, monkeypatch):
    order = []

    def run(part, args, has_gpu, until):
        order.append(part.name)
        return {"ended": "exit code 0", "ok": True, "wall_s": 1.0, "clips_per_s": 10.0 + len(order)}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(smi, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    _, found = measure(out, [part("ends a", again=True), part("ends b"), part("ends c", again=True)])
    assert order == ["ends a", "ends b", "ends c", "ends a", "ends c"]
    assert report.values(found, "ends a", "clips_per_s") == [11.0, 14.0]
    assert report.spread_pct(found, "ends a") == pytest.approx(100 * 3 / 12.5)
    assert report.spread_pct(found, "ends b") is None


def test_no_part_starts_after_the_minutes_are_over(out, monkeypatch):
    monkeypatch.setattr(smi, "gpu_name", lambda: None)
    code, found = measure(out, [part("ends a"), part("ends b")], "--minutes", "0.001")
    assert code == 0
    assert [entry["left_out"] for entry in found["parts"].values()] == ["--minutes 0.001 were over"] * 2


def test_only_chooses_parts_by_their_names_or_by_pieces(out, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *_: {"ended": "exit code 0", "ok": True, "wall_s": 1.0})

    def chosen(*only: str) -> list[str]:
        return list(measure(out, PARTS, "--runs", "1", "--only", *only)[1]["parts"])

    assert chosen("step") == ["step"]
    assert chosen("step compiled") == ["step compiled"]
    assert chosen("step ") == ["step compiled", "step plain attention"]
    corruption = [f"corruption load={share}" for share in (0, 0.65, 1)]
    assert chosen("decode sizes", "corruption") == ["clips", *corruption, "decode sizes"]
    assert len(chosen("decode")) > 18
    assert chosen("card", "equal h264", "train intra") == ["card", "clips", "train intra", "equal h264"]


# ---- mistakes are told before the first part ----


@pytest.fixture
def no_part(monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("a part was run"))
    monkeypatch.setattr(smi, "gpu_name", lambda: None)


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    "only, said",
    [
        ("nosuch", "--only nosuch: no part's name holds it. Names begin with card, step, profile, "),
        ("pradicted", "Did you mean predicted? Names begin with "),
        ("decde", "Did you mean decode? "),
        ("engine.compile=true", "Settings come before --only, or after another option. "),
    ],
)
def test_only_refuses_what_is_no_part(out, no_part, capsys, plan, only, said):
    assert gpu.main(["--json", str(out), *plan, "--only", "card", only]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert not out.exists()


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    "word, said",
    [
        ("bogus=1", "unknown key bogus"),
        ("engine.compil=true", "did you mean engine.compile?"),
        ("train.epochs=many", "train.epochs"),
        ("nothing", "write it as key=value"),
    ],
)
def test_settings_that_do_not_exist_are_refused_once(out, no_part, capsys, plan, word, said):
    assert gpu.main(["--json", str(out), *plan, word]) == 2
    assert said in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert not out.exists()


def test_settings_are_checked_without_torch():
    script = "import sys; from bench import gpu; gpu.require_settings(['model.backbone=ViT-demo-16'], 8); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=harness.environment())
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("option", ["--minutes", "--runs", "--seconds", "--clips", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_numbers_are_above_nothing(out, no_part, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--json", str(out), f"{option}={value}"])
    assert ended.value.code == 2
    assert re.search(
        rf"argument {option}: {value}: must be a (number above 0|whole number of at least 1)\n", capsys.readouterr().err
    )
    assert not out.exists()


def test_a_result_that_cannot_be_written_is_told_first(tmp_path, no_part, capsys):
    (tmp_path / "file").write_text("a dog catches a frisbee")
    for path, said in {
        tmp_path: "it is a folder; name a file",
        tmp_path / "file/out.json": "is not a folder",
        tmp_path / "file/more/out.json": "is not a folder",
        tmp_path / "file": "would replace a file of another kind",
    }.items():
        assert gpu.main(["--json", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --json {path}") and said in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "a dog catches a frisbee"


def test_the_next_run_of_a_day_takes_another_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run", lambda *_: {"ended": "exit code 0", "ok": True, "wall_s": 1.0})
    monkeypatch.setattr(smi, "gpu_name", lambda: "NVIDIA H100 80GB")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "made/results")
    made = []
    for only in ("ends a", "ends b", "ends c"):
        assert gpu.main(["--runs", "1", "--only", only], [part("ends a"), part("ends b"), part("ends c")]) == 0
        made.append(Path(capsys.readouterr().out.rpartition("-> ")[2].strip()))
    first = made[0].stem
    assert re.fullmatch(r"gpu-nvidia-h100-80gb-\d{4}-\d\d-\d\d", first)
    assert [path.name for path in made] == [f"{first}.json", f"{first}-2.json", f"{first}-3.json"]
    assert [list(json.loads(path.read_text())["parts"]) for path in made] == [["ends a"], ["ends b"], ["ends c"]]
    assert gpu.main(["--json", str(made[0])], [part("ends b")]) == 0  # a name that is given is taken
    assert list(json.loads(made[0].read_text())["parts"]) == ["ends b"]


@pytest.mark.parametrize("ended", [1, 0])
def test_ctrl_c_says_where_the_results_are(out, monkeypatch, capsys, ended):
    runs = iter([{"ended": "exit code 0", "ok": True, "wall_s": 1.0}] * ended)

    def run(*_):
        for found in runs:
            return found
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(smi, "gpu_name", lambda: None)
    assert gpu.main(["--json", str(out)], [part("ends a"), part("ends b")]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    if ended:
        assert said == f"stopped by SIGINT; results so far -> {out}"
        assert list(json.loads(out.read_text())["parts"]) == ["ends a"]
    else:
        assert said == "stopped by SIGINT; no part had ended, and nothing was written"
        assert not out.exists()


def test_ends_in_words():
    assert [end_of(code) for code in (0, 1, -11, -9, -6)] == [
        "exit code 0", "exit code 1", "signal 11, SIGSEGV", "signal 9, SIGKILL", "signal 6, SIGABRT",
    ]  # fmt: skip


def test_stderr_is_kept_from_its_end():
    script = "import sys; [print('line', i, 'x' * 1000, file=sys.stderr) for i in range(100)]; sys.exit(3)"
    found = run_process([sys.executable, "-c", script], 60, os.environ)
    assert found["ended"] == "exit code 3" and not found["ok"]
    assert found["stderr"][-1].startswith("line 99 ") and len(found["stderr"]) <= 30


# ---- the summary ----

PROFILE = {
    "busy_pct": 96.0, "step_s": 0.1, "launches": 1900.0, "synchronisations": {"cudaStreamSynchronize": {"calls": 7.0, "ms": 1.0}},
    "kinds_ms": {"matrix products": 60.0, "element-wise and reductions": 30.0, "copies": 5.0},
}  # fmt: skip


def findings(**parts: dict) -> dict:
    ended = {"ended": "exit code 0", "ok": True, "wall_s": 1.0}
    named = {name.replace("_", " "): {"runs": [ended | found]} for name, found in parts.items()}
    return {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "parts": named}


def test_the_summary_says_that_loading_limits():
    said = report.limit(
        findings(
            step={"clips_per_s": 1200.0},
            train_intra={"clips_per_s": 900.0},
            lane_intra={"clips_per_s": 950.0},
            profile=PROFILE,
        )
    )
    assert said.startswith("Loading limits the step:")
    assert "1200 clips/s" in said and "900" in said and "950" in said
    rates = {"step": {"clips_per_s": 1200.0}, "train_intra": {"clips_per_s": 900.0}}
    said = report.limit(findings(**rates, lane_intra={"clips_per_s": 3000.0}, profile=PROFILE))
    assert said.startswith("The loader slows the step down although it is fast enough by itself (3000 clips/s)")


def test_the_summary_says_that_the_host_limits():
    step = {"clips_per_s": 1200.0}
    said = report.limit(findings(step=step, train_intra={"clips_per_s": 1190.0}, profile=PROFILE | {"busy_pct": 70.0}))
    assert said == (
        "The host limits the step: for 30 % of it the GPU has nothing to do, with 1900 launches and 7 waits of the host a step."
    )


def test_the_summary_says_which_kernels_limit():
    step, card = {"clips_per_s": 1280.0, "tflop_per_s": 420.0}, {"tflops_bf16": [700.0, 710.0]}
    said = report.limit(findings(step=step, card=card, profile=PROFILE))
    assert said.startswith("Matrix products limit the step: the GPU is busy for 96 % of it, 63 % of that with them")
    assert "at 700 of the 705 TFLOP/s" in said
    slow = PROFILE | {"kinds_ms": {"matrix products": 30.0, "element-wise and reductions": 60.0}}
    assert "Element-wise and reductions limit the step" in report.limit(findings(step=step, profile=slow))


def test_the_summary_says_why_nothing_is_known():
    nothing = {"machine": {"gpu": "cpu"}, "parts": {"step": {"runs": [{"ended": "killed after 240 s", "ok": False}]}}}
    assert "(killed after 240 s)" in report.limit(nothing)
    assert "(it was not run)" in report.limit({"machine": {"gpu": "cpu"}, "parts": {}})
    on_cpu = findings(step={"clips_per_s": 3.0}, profile={"left_out_here": "kernels need a GPU"})
    assert "kernels need a GPU" in report.limit(on_cpu)


def test_the_summary_holds_predicted_beside_measured():
    found = findings(
        step={"clips_per_s": 1200.0}, predicted={"clips_per_s": 1000.0, "gpu": "H100", "limit": "launches"}
    )
    assert "clips_per_s: predicted 1000, measured 1200, 1.20 times that." in report.summary(found)
    assert "The model of a step expects that this takes longest: launches." in report.summary(found)
    assert not [line for line in report.summary(found | {"machine": {"gpu": "cpu"}}) if "predicted" in line]


def test_the_summary_names_corruption_the_best_decoder_and_losses():
    said = report.summary(
        findings(**{
            "decode whole": {"frames_per_s": [10.0, 12.0]}, "decode roi": {"frames_per_s": [20.0, 22.0]},
            "corruption load=1": {
                "quiet_compared": 8, "quiet_differ": 0, "held_compared": 300, "held_differ": 0, "released_compared": 300,
                "released_differ": 12,
            },
            "losses 16 bits": {"losses": [2.0, 1.01]}, "losses fp32 on the CPU": {"losses": [2.0, 1.0]},
        })
    )  # fmt: skip
    assert "Fastest decoder of stored JPEGs: `decode roi`, 21 frames/s." in said
    assert (
        "`corruption load=1`: batches that differ: 0 of 300 behind queued work, 12 of 300 if their memory is given back at once, "
        "0 of 8 without queued work."
    ) in said
    assert "The losses of the first steps in 16 bits differ from fp32 on the CPU by at most 1 %." in said

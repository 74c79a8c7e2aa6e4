"""Before torch is there: ports, signals while a command starts, packages that are missing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from c4c.errors import speak
from c4c.launched import command_again, free_port, open_streams, require_port
from c4c.training.screen import Report
from tests.launch.runs import ROOT


@pytest.fixture
def deepspeed_env(monkeypatch):
    """Of rank 0 of two that deepspeed's launcher started."""
    env = {
        "RANK": "0",
        "LOCAL_SIZE": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["launch/train.py", "--local_rank=0", "--cfg", "demo.yaml"])
    return env


def test_a_port_that_is_taken_is_named_with_a_command_that_works(deepspeed_env, monkeypatch):
    port = int(deepspeed_env["MASTER_PORT"])
    require_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match=f"port {port}, at which the ranks meet, is taken") as caught:
            require_port()
        monkeypatch.setenv("RANK", "1")
        require_port()  # one rank says it
    command = str(caught.value).splitlines()[1].split()
    assert command[:4] == ["deepspeed", "--num_accelerators", "2", "--master_port"]
    assert command[5:] == ["launch/train.py", "--cfg", "demo.yaml"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", command[4])
    require_port()
    assert command_again().split() == command


def test_a_single_rank_takes_another_port(deepspeed_env, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    with socket.socket() as other:
        other.bind(("", int(deepspeed_env["MASTER_PORT"])))
        other.listen()
        require_port()
        assert os.environ["MASTER_PORT"] != deepspeed_env["MASTER_PORT"]
        require_port()


STARTING = """
import sys, time
from c4c.launched import Starting
sys.argv = ["launch/train.py", "--cfg", "demo.yaml"]
with Starting("before the first step"):
    print("ready", flush=True)
    {work}
"""

# a wait that no signal ends
DEADLOCK = "import ctypes; c = ctypes.CDLL(None); m = ctypes.create_string_buffer(64); c.pthread_mutex_lock(m); c.pthread_mutex_lock(m)"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("work", ["time.sleep(3600)", DEADLOCK], ids=["python", "C code"])
def test_a_signal_before_the_first_step_is_one_line(work, number, rank):
    env = os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", STARTING.format(work=work)], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate()  # which the work does not end: it goes on for longer than a test may take
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    command = "python launch/train.py --cfg demo.yaml"
    assert err == ("" if rank else f"stopped by {name} before the first step. Start again with\n    {command}\n")


def test_a_signal_because_of_a_lost_rank_says_that():
    work = 'from c4c.launched import explained_by\n    with explained_by(lambda: "rank 1 vanished"): time.sleep(60)'
    env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", STARTING.format(work=work)], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.terminate()
    assert process.communicate(timeout=30)[1] == "error: rank 1 vanished\n"


INTERRUPTED = """
import signal, sys, time
from c4c.errors import exit_code
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs these tests may ignore it
def command():
    print("ready", flush=True)
    time.sleep(3600)
sys.exit(exit_code(command))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_one_line_where_nothing_else_heeds_it(rank):
    env = os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ("" if rank else "stopped by SIGINT\n")
    assert process.returncode == 130


def test_a_lost_rank_is_not_looked_for_without_torch():
    code = "import sys; from c4c.errors import lost_peer; print(lost_peer(RuntimeError('Broken pipe')), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("words", [["launch/train.py", "--cfg", "demo.yaml"], ["launch/train.py", "--keys"],
                                   ["launch/stages.py", "--cfg", "two_stage.yaml"], ["launch/eval.py", "--ckpt", "a"],
                                   ["-m", "c4c.export", "--ckpt", "a", "--to", "b.safetensors"], ["-m", "c4c.shard", "info", "a"]])  # fmt: skip
def test_without_the_environment_it_says_so(words, monkeypatch):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys._base_executable, "-S", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("error: the package ") and "activate the environment first (" in line


def test_help_names_recipes_and_keys():
    done = subprocess.run([sys.executable, "-S", "launch/train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for path in (ROOT / "launch" / "cfg").glob("*.yaml"):
        assert (f"  {path.name} " in done.stdout) == ("two_stage" not in path.name and "study" not in path.name)
    from c4c.config import Config

    assert all(f"{group}.*" in done.stdout for group in Config.__dataclass_fields__)


def test_a_screen_that_is_gone_ends_nothing(monkeypatch):
    """A full disk behind 2>log, and 2>&-: nothing is raised, and what asks for the streams finds some."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        open_streams()
        print("lost" * 10_000, file=sys.stderr, flush=True)
        Report(True, 1, 1, 0).say("lost")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would raise
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    open_streams()
    print("nowhere")
    sys.stdout.flush()
    print("nowhere", file=sys.stderr, flush=True)


def printed_by(code: str, encoding: str, **how) -> subprocess.CompletedProcess:
    program = f"from c4c.launched import open_streams, seen_enough\nimport json, sys\nopen_streams()\n{code}"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, **({"stdout": subprocess.PIPE} | how))


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\u00e9 \\u89c6 \\ud83d\\udc15"), ("latin-1", "é \\u89c6 \\ud83d\\udc15")]
)
def test_letters_that_the_terminal_lacks_are_escaped_as_in_json(encoding, shown):
    text = "é 视 🐕"
    done = printed_by(f"print(json.dumps({text!r}, ensure_ascii=False))", encoding)
    line = done.stdout.decode(encoding)
    assert (done.returncode, line) == (0, f'"{shown}"\n') and json.loads(line) == text


@pytest.mark.parametrize("script", ["train", "search", "serve", "eval", "stages"])
def test_help_is_printed_on_a_terminal_that_lacks_letters(script):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, f"launch/{script}.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough():
    """`| head`: the program goes on, and says nothing of it, at its end either."""
    reader, writer = os.pipe()
    os.close(reader)
    code = "with seen_enough(): print('x' * 100_000)\nprint('later')\nprint('it went on', file=sys.stderr)"
    done = printed_by(code, "utf-8", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"it went on\n")


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_of_torch_sleep_while_they_wait(script, given):
    """OpenMP reads it when torch is imported."""
    program = (
        "import os, runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_path('launch/{script}', run_name='__main__')\nexcept SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
        {"OMP_WAIT_POLICY": given} if given else {}
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == f"{given or 'PASSIVE'} False", done.stderr


def test_an_error_of_the_system_is_told_without_its_number(capsys):
    speak(OSError(28, "a.html could not be written: No space left on device"), 0)
    speak(FileNotFoundError(2, "No such file or directory", "b.html"), 0)
    assert capsys.readouterr().err.splitlines() == [
        "error: a.html could not be written: No space left on device",
        "error: [Errno 2] No such file or directory: 'b.html'",
    ]

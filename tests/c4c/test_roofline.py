"""`python -m c4c.roofline`: what it prints and writes, and mistakes, which are answered before torch is imported."""

import json
import subprocess
import sys

import pytest

from c4c import roofline
from c4c.performance.hardware import GPUS

pytestmark = pytest.mark.slow

LIGHT = """
import sys
from c4c.roofline import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
assert not {"torch", "open_clip", "deepspeed", "nvidia"} & sys.modules.keys(), "something heavy was imported"
sys.exit(code)
"""


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True)


def test_help():
    done = run("--help")
    assert done.returncode == 0 and all(gpu.name in done.stdout for gpu in GPUS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H10"], "--gpu H10: unknown GPU; did you mean H100?"),
        (["--gpu", "H100", "--assume", "gem=1"], "unknown assumption gem; did you mean gemm?"),
        (["--gpu", "H100", "--cfg", "demos.yaml"], "did you mean demo.yaml?"),
        (["--gpu", "H100", "train.batchsize=3"], "unknown key train.batchsize"),
        (["--gpu", "H100", "--gpus", "3"], "train.batch_size=128 does not divide by 3 ranks"),
        (["--gpu", "H100", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_mistakes(words, message):
    done = run("--cfg", "demo.yaml", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_one_gpu(capsys, tmp_path):
    file = tmp_path / "out.json"
    words = ["--cfg", "demo.yaml", "--gpu", "l4", "--decoder", "cpu", "--assume", "gemm=0.5", "--json", str(file)]
    assert roofline.main([*words, "train.batch_size=32"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    (found,) = written["predictions"]
    assert written["assumptions"]["gemm"] == 0.5 and "* gemm=0.5" in printed
    assert f"{1e3 * found['step_s']:.1f} ms, {found['clips_per_s']:.0f} clips/s" in printed
    assert f"encode {found['largest_rank_batch']} pairs at once" in printed
    assert (found["gpu"], found["decoder"], found["shape"]["rows"], found["fits"]) == ("L4", "cpu", 32, True)
    assert roofline.main([*words, "train.batch_size=64"]) == 0  # its own file is replaced


def test_all_gpus(capsys):
    assert roofline.main(["--cfg", "demo.yaml", "--gpu", "all", "--gpus", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line.split()[:1] and line.split()[0] in {g.name for g in GPUS}] == [
        gpu.name for gpu in GPUS
    ]

"""`python -m c4c.roofline`: what it prints and writes, and mistakes, which are answered before torch is imported."""

import json
import os
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
        (["--gpu", "H100", "deepspeed.zero_optimization.reduce_bucket_size=abc"], "reduce_bucket_size=abc: must be"),
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


@pytest.mark.nightly
def test_a_reader_that_leaves_ends_it_quietly_with_the_json_written(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "c4c.roofline", "--cfg", "demo.yaml", "--gpu", "L4", "--json", str(file)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(file.read_text())["predictions"]


@pytest.mark.parametrize("words", [[], ["train.micro_batch_size=512"], ["train.accumulate=4"]], ids=" ".join)
def test_whether_it_fits_and_how_many_fit_agree(words, tmp_path):
    file, most = tmp_path / "out.json", 0

    def predicted(*more: str) -> dict:
        command = ["--cfg", "demo.yaml", "--gpu", "L4", "train.batch_size=16384", "data.num_frames=16", *words, *more]
        assert roofline.main([*command, "--json", str(file)]) == 0
        return json.loads(file.read_text())["predictions"][0]

    first = predicted()
    most = first["largest_rank_batch"]
    assert first["fits"] == (first["shape"]["encoded"] <= most)
    if not words or "micro" in words[0]:
        key = "train.micro_batch_size" if words else "train.batch_size"
        one, more = predicted(f"{key}={most}"), predicted(f"{key}={most + 1}")
        for found in (one, more):  # a curve was drawn through other counts
            assert abs(found["largest_rank_batch"] - most) < 0.03 * most
            assert found["fits"] == (found["shape"]["encoded"] <= found["largest_rank_batch"])


def test_all_gpus(capsys):
    assert roofline.main(["--cfg", "demo.yaml", "--gpu", "all", "--gpus", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line.split()[:1] and line.split()[0] in {g.name for g in GPUS}] == [
        gpu.name for gpu in GPUS
    ]

"""Every example runs as its first lines say, and comes to something."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.c4c.retrieval.encoders import write
from tests.c4c.retrieval.test_encoder import as_run
from tests.examples.conftest import ROOT

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


def run(script: str, *words: str, cwd, env) -> str:
    """What the script prints. Fails with all of it if the script does."""
    command = [sys.executable, str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_has_a_test():
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    notebooks = {"look_into_a_split.ipynb", "search_your_videos.ipynb"}
    assert files == {"README.md", "own_videos.py", "plain_loop.py", "mteb_model.py"} | notebooks


def test_plain_loop(work, environment):
    out = run("plain_loop.py", "--steps", "22", "--batch-size", "32", cwd=work, env=environment)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_own_videos(tmp_path, environment):
    out = run("own_videos.py", "--folder", str(tmp_path), cwd=tmp_path, env=environment)
    assert out.count("$ python") == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_videos"] == 24
    assert metrics["t2v"]["R1"] > 50  # by chance it is 4


def outputs_of(name: str, cwd, monkeypatch, env) -> list[dict]:
    """What the cells of a notebook give. Fails if one does."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "store the notebook without outputs"
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])  # the kernel inherits it
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(outputs: list[dict]) -> str:
    return "".join(output.get("text", "") for output in outputs)


def test_look_into_a_split(work, environment, monkeypatch):
    outputs = outputs_of("look_into_a_split.ipynb", work, monkeypatch, environment)
    assert "8 videos, 8 captions" in text_of(outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "the strip of frames"


@pytest.mark.nightly
def test_search_your_videos(work, environment, monkeypatch):
    """With a model of random weights: what it finds is tests/launch/test_search.py's business."""
    backbone = "ViT-demo-16-small"
    as_run(write(work / "random.safetensors", backbone=backbone), work / "runs" / "demo", backbone)
    outputs = outputs_of("search_your_videos.ipynb", work, monkeypatch, environment)
    text = text_of(outputs)
    assert "8 videos, 8 segments" in text and "4. test0000" in text and "(3, 64)" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "what was found, and what is similar"
    assert "test00004" in outputs[-1]["data"]["text/plain"], "the table"

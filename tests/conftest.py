"""Shared by all tests. Importing it costs next to nothing: what a test needs, its own file imports."""

import ast
import gc
import os
import sys
from pathlib import Path

import pytest

# Test processes share the cores, and torch's threads wait for each other: spinning meanwhile costs many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NOT_QUICK = {"slow", "launch", "network", "gpu"}  # marks, described in pyproject.toml

# A test that trains in this process leaves these in the environment; commands that later tests start are not ranks.
RANK_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
} - os.environ.keys()


def pytest_addoption(parser):
    marks = ", ".join(sorted(NOT_QUICK))
    parser.addoption("--quick", action="store_true", help=f"leave out what is marked {marks}, without importing it")


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """A file that is marked as a whole is not even imported with --quick: torch, DALI and DeepSpeed take seconds."""
    if config.getoption("quick") and collection_path.suffix == ".py" and file_marks(collection_path) & NOT_QUICK:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        left_out = [item for item in items if NOT_QUICK & {mark.name for mark in item.iter_markers()}]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if of_gpu and not _has_gpu():
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish():
    """What is imported by now stays, and need not be looked through at each collection; the rest is, at every tenth of these."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)


def file_marks(path: Path) -> set[str]:
    """Names of the marks in a file's `pytestmark = ...`, read from its source."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            return {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
    return set()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def no_rank():
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def one_group(monkeypatch):
    """DeepSpeed keeps the process group that it first sees, so whatever trains in this process has to share one."""
    if (torch := sys.modules.get("torch")) is not None and "torch.distributed" in sys.modules:
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *_: None)

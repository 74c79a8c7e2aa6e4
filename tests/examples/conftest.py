"""A small demo set, packed once for all examples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """So that examples find the packages from any working directory, as an installed c4c would."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def work(tmp_path_factory, environment) -> Path:
    """A working directory that holds data/demo, as `make demo` leaves one."""
    folder = tmp_path_factory.mktemp("examples")
    command = [sys.executable, "-m", "c4c.shard", "demo", "--out", "data/demo", "--train", "64", "--test", "8"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder

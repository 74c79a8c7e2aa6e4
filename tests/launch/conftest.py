"""A tiny packed data set and finished runs on it, made once for all tests of this folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shards.datasets import demo
from shards.pack import pack
from shards.profiles import Profile
from tests.launch.runs import Launcher


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="compares ranks on CPU; here the launcher gives each a GPU"))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("launch")
    items = demo.generate(folder / "source", seed=0, train=40, test=17, workers=2)
    for split in ("train", "test"):
        pack(items[split], folder / split, dataset="demo", split=split, profile=Profile(short_side=64), workers=2)
    return Launcher(folder)


@pytest.fixture(scope="session")
def runs(launcher) -> dict[str, Path]:
    """Finished runs of two epochs that differ in nothing but ranks and ZeRO stage."""
    ways = {"1 rank": (1, 1), "2 ranks": (2, 1), "2 ranks, ZeRO 2": (2, 2), "2 ranks, ZeRO 3": (2, 3)}
    folders = {name: launcher.folder / f"run{i}" for i, name in enumerate(ways)}

    def run(name: str) -> None:
        ranks, stage = ways[name]
        words = [f"run.dir={folders[name]}", f"engine.zero_stage={stage}"]
        code, out, err = launcher.finish(launcher.command(ranks, *words))
        assert code == 0, out + err

    with ThreadPoolExecutor(2) as pool:  # a launch is mostly one core importing
        list(pool.map(run, ways))
    return folders

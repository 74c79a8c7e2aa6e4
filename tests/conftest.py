import os

import pytest
import torch

# what a test that trains in this process leaves in the environment: commands that later tests start are no ranks
_OF_RANKS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
} - os.environ.keys()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def no_rank():
    for name in _OF_RANKS:
        os.environ.pop(name, None)
    yield
    for name in _OF_RANKS:
        os.environ.pop(name, None)

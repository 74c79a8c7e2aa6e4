"""Many epochs in one process: memory, open files and threads stay what they were. bench/soak.py runs it for longer."""

import pytest

from bench.soak import soak
from pipelines.config import DataConfig

pytestmark = pytest.mark.slow  # imports DALI


@pytest.mark.nightly
@pytest.mark.parametrize("profile", ["intra", "copy"])
def test_nothing_grows_over_many_epochs(numbered, tmp_path, profile):
    config = DataConfig(num_frames=3, image_size=32, max_words=8, threads=2)
    cache = tmp_path if profile == "intra" else None
    found = soak(getattr(numbered, profile), config, rounds=8, cache=cache, every=0)
    assert (found["epochs"], len(found["samples"])) == (24, 9)
    first, last = found["samples"][1], found["samples"][-1]
    assert last["files"] <= first["files"] and last["threads"] <= first["threads"]
    assert last["mib"] - first["mib"] < 40

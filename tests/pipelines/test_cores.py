"""A rank's part of the machine's cores."""

import pytest

from pipelines.cores import SHARE, cores


@pytest.mark.parametrize(
    ("share", "ranks", "own"), [("", "", 12), ("", "4", 3), ("6", "", 6), ("6", "4", 1), ("1", "4", 1), ("", "24", 1)]
)
def test_a_rank_has_an_equal_part_of_what_its_run_may_use(monkeypatch, share, ranks, own):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setenv(SHARE, share)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks) if ranks else monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == own


@pytest.mark.parametrize("share", ["0", "two", "-1"])
def test_a_share_that_is_none_is_refused(monkeypatch, share):
    monkeypatch.setenv(SHARE, share)
    with pytest.raises(ValueError, match=f"C4C_CORES={share} in the environment: must be a whole number"):
        cores()

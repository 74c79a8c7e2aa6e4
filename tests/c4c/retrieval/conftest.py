"""A search server that several files of tests ask."""

import pytest

from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server over the stand-in's index, with `make`'s videos."""
    with Served(stand_in.make(tmp_path_factory.mktemp("serve"))) as it:
        yield it

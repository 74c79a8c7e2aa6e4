"""Where the shipped settings are, and what is said of settings that cannot be."""

from pathlib import Path

import pytest

from c4c.config import ConfigError, load

SHIPPED = Path(__file__).parents[2] / "launch" / "cfg"


def refused(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return str(caught.value)

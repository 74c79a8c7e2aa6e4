"""The Hugging Face hub, asked only where it answers: its client otherwise tries for most of a minute before it says so."""

import os
import socket
from functools import cache
from urllib.parse import urlsplit

_PATIENCE_S = 5.0


def mind_the_network() -> None:
    """Have Hugging Face's client look at this machine's own copies alone, if the hub cannot be reached from here."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True  # asked at every call


@cache
def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows
    url = urlsplit(endpoint)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=_PATIENCE_S):
            return True
    except OSError:
        return False

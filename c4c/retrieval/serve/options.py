"""What the command line of the server asks for. Mistakes are found here, before anything is loaded."""

import errno
import ipaddress
import os
import re
import secrets
import socket
from dataclasses import dataclass, replace

from c4c.option_checks import require_device, require_not_empty

MAX_UPLOAD_MB = 200
_SHORTEST_TOKEN = 12  # characters
TOKEN_VARIABLE = "C4C_TOKEN"  # unlike an option, other users of the machine cannot read it in the list of processes


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How an index is served.

    host, port      where; port 0: one that is free
    token           what a request must carry; '' on loopback: nothing
    checkpoint      where the checkpoint of the index is now, for search by example; None: where it was
    device          cpu, cuda or cuda:N; None: sentences on the CPU, examples on a GPU where there is one
    max_upload_mb   the largest clip or picture that is accepted, in megabytes
    root_path       the path under which a reverse proxy serves the page, '' or '/search'
    """

    index: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    checkpoint: str | None = None
    device: str | None = None
    max_upload_mb: int = MAX_UPLOAD_MB
    root_path: str = ""

    def __post_init__(self):
        if not self.index:
            raise ValueError("the index is not given: name what `python -m c4c.index --out` wrote")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: must be from 1 to 65535, or 0 for one that is free")
        require_not_empty([("host", self.host)])
        require_device(self.device)
        if not 1 <= self.max_upload_mb <= 100_000:
            raise ValueError(f"--max-upload-mb {self.max_upload_mb}: must be from 1 to 100000")
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ValueError(f"--root-path {self.root_path}: must be a path like /search, without a slash at its end")
        if self.token and not re.fullmatch(rf"[\x21-\x7e]{{{_SHORTEST_TOKEN},256}}", self.token):
            raise ValueError(
                f"--token: must have {_SHORTEST_TOKEN} to 256 characters, letters, digits and signs without spaces; "
                "leave it out, and one is made"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this machine can reach the server."""
        return is_loopback(self.host)

    def with_token(self) -> "ServeOptions":
        """The same, with a token made up where one is needed and none was given."""
        return self if self.token or self.is_loopback else replace(self, token=secrets.token_urlsafe(18))


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_index(index: str) -> None:
    """Raise ValueError if there is no index at a path, which `Store.open` would say only after seconds of imports."""
    from c4c.retrieval.index.database import MAKE, may_be_index, plain

    if not may_be_index(plain(index)):
        raise ValueError(f"there is no index at {index}. {MAKE}")


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to that address. Raises OSError with what to do where that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"--host {host}: no address is known for it ({error.strerror})") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {host} is taken: choose another one, --port {_next_free(host, port)}"
            ) from error
        if error.errno == errno.EACCES:
            raise OSError(
                f"port {port} needs more rights than this user has: choose one from 1024 on, --port 8000"
            ) from error
        raise OSError(f"--host {host} --port {port}: {os.strerror(error.errno or 0)}") from error
    return listener


def _next_free(host: str, port: int) -> int:
    for other in range(port + 1, min(port + 200, 65536)):
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host.strip("[]"), other))
                return other
        except OSError:
            continue
    return 0

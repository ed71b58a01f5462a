"""HTTP servers of the API: the socket is ours before they start, and signals stay ours."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn

from citybrain.errors import Unavailable


class Server(uvicorn.Server):
    """uvicorn that leaves signals to us: it would raise them again when it is done, and we end with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises Unavailable where the port is taken."""
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(128)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            what = "is taken by another program: stop that one, or start `citybrain run` with another --api-port"
            raise Unavailable(f"api: port {port} on {host} {what}") from None
        raise Unavailable(f"api: cannot listen on {host}:{port}: {error.strerror}") from None
    return taken

"""Reaching the broker without the gateway waiting for it: name, TCP and TLS in a thread of their own.

A resolver that does not answer takes ten seconds and more, a line without an end two for each try: a box that waited
for them would meanwhile sync no event.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import msgspec

from citybrain.errors import ConfigError
from gateway.broker.tls import client_context, failure, handshake, refusal
from gateway.config import Tls, loopback

CONNECT_TIMEOUT_S = 2.0  # of TCP, and again of TLS


class Broker(msgspec.Struct, frozen=True):
    """Where the broker is and who we are to it. The files of `tls` are read anew for every connection."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None
    tls: Tls | None = None


class Dial:
    """One try. Once it is `done` it has a `line`, or says in `failed` why it has none.

    ask: the broker hung up last time and did not say why: find out first.
    """

    def __init__(self, broker: Broker, wall_ms: Callable[[], int], *, ask: bool = False) -> None:
        self.line: socket.socket | None = None
        self.failed = ""
        self.done = False
        self._broker = broker
        self._wall_ms = wall_ms
        self._ask = ask
        self._unwanted = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin; what cannot take long is done before this returns."""
        if self._broker.tls is None and loopback(self._broker.host):
            self._work()
        else:
            threading.Thread(target=self._work, name="dial", daemon=True).start()

    def abandon(self) -> None:
        """Nobody waits for it any more: the line is closed as soon as there is one."""
        with self._lock:
            self._unwanted = True
            if self.line is not None:
                self.line.close()

    def _work(self) -> None:
        line: socket.socket | None = None
        try:
            self.failed = self._refusal()
            line = None if self.failed else self._open()
        except OSError as error:
            self.failed = f"{self._broker.host}:{self._broker.port}: {self._why(error)}"
        except ConfigError as error:  # a file of ours: whoever renews it need not start us again
            self.failed = str(error)
        with self._lock:
            self.line, self.done = line, True
            if self._unwanted and line is not None:
                line.close()

    def _refusal(self) -> str:
        tls = self._broker.tls
        if tls is None or not self._ask:
            return ""
        found = refusal(self._broker.host, self._broker.port, tls, self._wall_ms())
        return found or "the broker hung up without a reason; its log has one"

    def _open(self) -> socket.socket:
        tls = self._broker.tls
        context = client_context(tls) if tls is not None else None
        line = socket.create_connection((self._broker.host, self._broker.port), CONNECT_TIMEOUT_S)
        if context is None:
            return line
        with contextlib.ExitStack() as undo:
            undo.callback(line.close)
            wrapped = handshake(context, line, self._broker.host)
            undo.pop_all()
        return wrapped

    def _why(self, error: OSError) -> str:
        if isinstance(error, socket.gaierror):
            return f"its name is not known: {error.strerror or error}"
        return failure(error, self._broker.host, self._wall_ms())

"""The door of the listener for boxes, which may face the Internet: how many may come in, from where, for how long.

A fleet may stand behind one address (a mobile operator's NAT), so one address is bounded by a rate with a large burst
and by most, not all, of the places; strangers who hold connections open are put out in seconds, whatever they do in
them. A full house leaves newcomers in the kernel's queue, where a box waits as it does for a slow answer.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from api.problem import Problem
from api.server import Server
from citybrain.clock import monotonic_s
from citybrain.counters import Counters

Why = Literal["rate", "crowd", "handshake", "slow", "large"]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
MOST_ADDRESSES = 20_000  # remembered; those with nothing open and a full allowance are forgotten first
SAY_AGAIN_S = 3600.0
NO_FILES_S = 0.5  # before it is tried again where the process has no descriptor left


class Bounds(msgspec.Struct, frozen=True):
    """All bounds of the door. [U]: our choice, for 500 boxes behind one address that enrol at once, two calls each."""

    connections: int = 768  # [U] at once, in all: about 100 kB each
    of_one_address: int = 600  # [U] so that one address alone cannot keep everybody out
    burst: int = 1200  # [U] new connections of one address at once: 500 boxes, two calls each, and some again
    per_s: float = 25.0  # [U] after that: 2,000 boxes renew within three minutes
    handshake_s: float = 10.0  # [U] TLS over a bad mobile line takes 3 s
    head_s: float = 10.0  # [U] a request's first lines come in one or two packets
    stranger_s: float = 30.0  # [U] the whole exchange without a certificate; a box gives up after 20 s without a byte
    known_s: float = 180.0  # [U] with one of ours: a sheet with its photo, 2.8 MB, at 16 kB/s
    shutdown_s: float = 10.0  # [U] for the last bytes and the goodbye of TLS
    head_bytes: int = 16 * 1024
    stranger_bytes: int = 64 * 1024  # a body without a certificate: a code and a request of 8 KiB
    known_bytes: int = 4 * 1024 * 1024  # with one: a sheet of 512 KiB, escaped in JSON, and its photo in base64


BOUNDS = Bounds()


class _Address(msgspec.Struct):
    tokens: float
    at_s: float
    open: int = 0


class Doorman:
    """Decides who may come in, by address. Pure: whoever asks says what time it is (monotonic s)."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._known: dict[str, _Address] = {}

    def admit(self, host: str, now_s: float) -> Why | None:
        """Let a connection in, and return None; or return why not. Say with `left` when it is over."""
        known = self._known.get(host)
        if known is None:
            self._forget(now_s)
            known = self._known[host] = _Address(float(self._bounds.burst), now_s)
        known.tokens, known.at_s = self._allowance(known, now_s), now_s
        if known.tokens < 1:
            return "rate"
        known.tokens -= 1
        if known.open >= self._bounds.of_one_address:
            return "crowd"
        known.open += 1
        return None

    def left(self, host: str) -> None:
        """A connection that was let in is over."""
        self._known[host].open -= 1

    def _allowance(self, known: _Address, now_s: float) -> float:
        return min(self._bounds.burst, known.tokens + (now_s - known.at_s) * self._bounds.per_s)

    def _forget(self, now_s: float) -> None:
        """Keep the table small; where all of it is in use, those with nothing open begin anew."""
        if len(self._known) < MOST_ADDRESSES:
            return
        for least in (self._bounds.burst, 0.0):
            gone = [host for host, one in self._known.items() if not one.open and self._allowance(one, now_s) >= least]
            for host in gone:
                del self._known[host]
            if len(self._known) < MOST_ADDRESSES:
                return


class Protocol(H11Protocol):
    """uvicorn's HTTP, one request a connection, within the door's bounds of time and size.

    The peer's certificate (DER) stands in the scope under `extensions.tls.client_cert`.
    """

    def __init__(self, config: Config, state: ServerState, app_state: dict[str, Any], door: Door) -> None:
        super().__init__(config, state, app_state)
        self.gone = asyncio.Event()
        self._door = door
        self._known = False
        self._in_time: asyncio.TimerHandle | None = None
        self._headed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        shown = tls.getpeercert(binary_form=True) if tls is not None else None
        self._known = shown is not None
        self._limit(self._door.bounds.head_s)
        app = self.app

        async def bounded(scope: Any, receive: Receive, send: Any) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), "tls": {"client_cert": shown}}
            await app(scope, self._sized(dict(scope["headers"]), receive), send)

        self.app = bounded

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self._headed:
            self._headed = True
            bounds = self._door.bounds
            self._limit(bounds.known_s if self._known else bounds.stranger_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._in_time is not None:
            self._in_time.cancel()
        self.gone.set()

    def _limit(self, seconds: float) -> None:
        if self._in_time is not None:
            self._in_time.cancel()
        self._in_time = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._door.refused("slow", self.client[0] if self.client else "")
        self.transport.abort()

    def _sized(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Return what gives a body part by part, and refuses one that is too large as soon as that is known."""
        bounds, seen = self._door.bounds, 0
        most = bounds.known_bytes if self._known else bounds.stranger_bytes
        said = headers.get(b"content-length", b"0")  # h11 has checked that it is a number

        async def part() -> Message:
            nonlocal seen
            if int(said) <= most:
                message = await receive()
                seen += len(message.get("body", b""))
                if seen <= most:
                    return message
            self._door.refused("large", self.client[0] if self.client else "")
            raise Problem(413, "too_large", "body", f"at most {most} bytes are taken here")

        return part


class Door:
    """Takes connections from a listening socket, as far as the bounds allow, and has them served.

    counters: `box_connections_total`, `box_refused_total{reason}`, `boxes_full_total`.
    """

    def __init__(self, taken: socket.socket, context: ssl.SSLContext, counters: Counters, bounds: Bounds) -> None:
        self.bounds = bounds
        self._taken = taken
        self._context = context
        self._counters = counters
        self._doorman = Doorman(bounds)
        self._said_s: dict[Why, float] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self, protocol: Callable[[Door], Protocol]) -> None:
        """Take connections until cancelled."""
        loop, room = asyncio.get_running_loop(), asyncio.Semaphore(self.bounds.connections)
        self._taken.setblocking(False)
        try:
            while True:
                if room.locked():
                    self._counters.add("boxes_full_total")
                await room.acquire()
                line, host = await self._accepted(loop)
                why = self._doorman.admit(host, monotonic_s())
                if why is not None:
                    self.refused(why, host)
                    line.close()
                    room.release()
                    continue
                self._counters.add("box_connections_total")
                task = loop.create_task(self._serve(line, host, protocol))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)
                task.add_done_callback(lambda _: room.release())
        finally:
            for task in self._serving:
                task.cancel()

    async def _accepted(self, loop: asyncio.AbstractEventLoop) -> tuple[socket.socket, str]:
        while True:
            try:
                line, address = await loop.sock_accept(self._taken)
            except ConnectionError:  # it was gone again
                continue
            except OSError as error:  # no descriptor or no memory left: those who are in go on
                self._counters.add("errors_total", stage="boxes")
                self._counters.warn(f"boxes: no connection can be taken: {error.strerror or error}")
                await asyncio.sleep(NO_FILES_S)
                continue
            return line, str(address[0])

    async def _serve(self, line: socket.socket, host: str, protocol: Callable[[Door], Protocol]) -> None:
        """Shake hands, and wait until the connection is over; who does not get that far is counted."""
        made = protocol(self)
        times = {"ssl_handshake_timeout": self.bounds.handshake_s, "ssl_shutdown_timeout": self.bounds.shutdown_s}
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_accepted_socket(lambda: made, line, ssl=self._context, **times)
            try:
                await made.gone.wait()
            finally:
                transport.abort()
        except OSError:  # TLS's own errors are among them
            self.refused("handshake", host)
        finally:
            self._doorman.left(host)

    def refused(self, why: Why, host: str) -> None:
        """Count a connection that was not served, and say it once an hour."""
        self._counters.add("box_refused_total", reason=why)
        now_s = monotonic_s()
        if why != "handshake" and now_s - self._said_s.get(why, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said_s[why] = now_s
            self._counters.warn(f"boxes: a connection of {host} was refused: {WORDS[why]}")


WORDS: dict[Why, str] = {
    "rate": "too many new ones from this address",
    "crowd": "too many open ones from this address",
    "slow": "it took too long",
    "large": "what it sent was too large",
}


class DoorServer(Server):
    """uvicorn behind a door: it serves, the door takes connections."""

    def __init__(self, config: Config, door: Door) -> None:
        super().__init__(config)
        self._door = door
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._accepting = asyncio.get_running_loop().create_task(self._door.run(self._protocol))
        self._accepting.add_done_callback(self._over)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets=[])

    def _protocol(self, door: Door) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state, door)

    def _over(self, task: asyncio.Task[None]) -> None:
        """End with the door, so that whoever watches us sees it; asyncio logs the error."""
        self.should_exit = True


def open_files(wanted: int) -> int:
    """Raise how many files this process may have open, as far as the system lets us; return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def fitting(bounds: Bounds, files: int) -> Bounds:
    """Return bounds that leave half of this process's files to the rest of the API.

    >>> fitting(BOUNDS, 1024).connections, fitting(BOUNDS, 1024).of_one_address
    (512, 400)
    """
    connections = min(bounds.connections, max(files // 2, 1))
    of_one = min(bounds.of_one_address, max(connections * bounds.of_one_address // bounds.connections, 1))
    return msgspec.structs.replace(bounds, connections=connections, of_one_address=of_one)

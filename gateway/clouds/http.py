"""A small HTTP/1.1 server on asyncio for one purpose: bodies that are POSTed, with limits on everything.

A proxy stands before it (TLS, the public address); on its own it is safe against what is too large, too slow, too much
or no HTTP. What it refuses it answers as JSON: status, error, where, what.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec

from citybrain.counters import Counters
from citybrain.errors import Unavailable

MOST_DRAINED = 16 * 1024 * 1024  # read and thrown away after a refusal, so that the client can read why
READ_BYTES = 64 * 1024


class Limits(msgspec.Struct, frozen=True):
    """What a client may take. idle_s: between two requests; head_s, body_s: for each as a whole."""

    head_bytes: int = 16 * 1024
    body_bytes: int = 1024 * 1024  # the largest pushes documented by operators are some 100 kB [U]
    idle_s: float = 60.0
    head_s: float = 5.0
    body_s: float = 10.0
    connections: int = 64  # each with a body of its own in memory


class Request(msgspec.Struct, frozen=True):
    """One request, read whole; header names in small letters."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Reply(msgspec.Struct, frozen=True):
    """What is answered: a status and a JSON body."""

    status: int
    body: dict[str, object]
    retry_after_s: int = 0


class Refused(Exception):
    """The request is answered with `reply` and the connection ends."""

    def __init__(self, reply: Reply, reason: str) -> None:
        super().__init__(reason)
        self.reply = reply
        self.reason = reason


def problem(status: int, error: str, where: str, what: str, *, retry_after_s: int = 0) -> Reply:
    """Return a refusal that says what is wrong and where."""
    return Reply(status, {"status": status, "error": error, "where": where, "what": what}, retry_after_s)


Handle = Callable[[Request], Awaitable[Reply]]


class HttpServer:
    """Serves `handle` on one address. counters: `requests_total{status}`, `dropped_total{reason}` in requests."""

    def __init__(self, handle: Handle, counters: Counters, limits: Limits | None = None) -> None:
        self._handle = handle
        self._counters = counters
        self._limits = limits if limits is not None else Limits()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> None:
        """Listen; raises Unavailable where the port is taken."""
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=self._limits.head_bytes, backlog=self._limits.connections
            )
        except OSError as error:
            raise Unavailable(
                f"cloud: cannot listen on {host}:{port}: {error.strerror}; stop the program that has the port, "
                "or start `citybrain run` with another --cloud-port"
            ) from None

    async def stop(self) -> None:
        """Take no more connections and end those that are there."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await self._talk(reader, writer, crowded=len(self._open) > self._limits.connections)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or we are going
        finally:
            self._open.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, crowded: bool) -> None:
        """Answer one request after another until either side has enough."""
        goes_on = True
        while goes_on:
            try:
                request = await (_crowded() if crowded else self._request(reader, writer))
                if request is None:
                    return
                reply = await self._handle(request)
                goes_on = request.headers.get("connection", "").lower() != "close"
            except Refused as refused:
                self._counters.drop(refused.reason)
                reply, goes_on = refused.reply, False
            self._counters.add("requests_total", status=str(reply.status))
            writer.write(_encoded(reply, goes_on=goes_on))
            await writer.drain()
        await self._drain(reader, writer)

    async def _drain(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let the client finish: closing with bytes unread resets the line, and he would not see our answer."""
        if writer.can_write_eof():
            writer.write_eof()
        left = MOST_DRAINED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.head_s):
                while left > 0 and (some := await reader.read(READ_BYTES)):
                    left -= len(some)

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
        """Read one request, None where the client has nothing more to say."""
        try:
            async with asyncio.timeout(self._limits.idle_s):
                first = await reader.readexactly(1)
        except (TimeoutError, asyncio.IncompleteReadError):
            return None
        try:
            async with asyncio.timeout(self._limits.head_s):
                head = first + await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            raise Refused(
                problem(408, "slow", "headers", f"not whole within {self._limits.head_s:g} s"), "slow"
            ) from None
        except asyncio.LimitOverrunError:
            what = f"more than {self._limits.head_bytes} bytes"
            raise Refused(problem(431, "oversized", "headers", what), "oversized") from None
        method, path, headers = read_head(head)
        size = _length(method, headers, self._limits.body_bytes)
        if size and headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await reader.readexactly(size)
        except TimeoutError:
            what = f"{size} bytes were announced and not there within {self._limits.body_s:g} s"
            raise Refused(problem(408, "slow", "body", what), "slow") from None
        return Request(method, path, headers, body)


async def _crowded() -> None:
    raise Refused(problem(503, "crowded", "connection", "too many at a time", retry_after_s=5), "crowded")


def read_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Return (method, path, headers) of a request's head; raises Refused."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(problem(400, "not_http", "request line", f"{lines[0]!r:.80} is no HTTP/1.1"), "not_http")
    headers: dict[str, str] = {}
    for line in lines[1:-2]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Refused(problem(400, "not_http", "headers", f"{line!r:.80} is no header"), "not_http")
        name, value = name.lower(), value.strip()
        if headers.setdefault(name, value) != value:
            raise Refused(problem(400, "not_http", f"header {name}", "given twice, and not the same"), "not_http")
    return words[0], words[1], headers


def _length(method: str, headers: dict[str, str], most: int) -> int:
    """Return how long the body is; raises Refused."""
    if "transfer-encoding" in headers:
        what = "chunked bodies are not taken: send content-length (a proxy that buffers requests does)"
        raise Refused(problem(411, "no_length", "header transfer-encoding", what), "no_length")
    if headers.get("content-encoding", "identity").lower() != "identity":
        what = "send the body as it is, without compression"
        raise Refused(problem(415, "encoded", "header content-encoding", what), "encoded")
    text = headers.get("content-length", "" if method == "POST" else "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise Refused(problem(411, "no_length", "header content-length", f"{text!r:.40} is no length"), "no_length")
    if int(text) > most:
        what = f"{int(text)} bytes, at most {most} are taken: push smaller batches"
        raise Refused(problem(413, "oversized", "body", what), "oversized")
    return int(text)


def _encoded(reply: Reply, *, goes_on: bool) -> bytes:
    content = msgspec.json.encode(reply.body)
    kind = "application/json" if reply.status < 400 else "application/problem+json"
    lines = [
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
    ]
    if reply.retry_after_s:
        lines.append(f"retry-after: {reply.retry_after_s}")
    if not goes_on:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + content

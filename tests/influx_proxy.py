"""An HTTP proxy in front of a server's write API that can be told to refuse, or to dislike lines."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import httpx


class Told(NamedTuple):
    """An answer that the server behind never sees."""

    status: int
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()


Judge = Callable[[list[str]], Told | None]


class Proxy:
    """`judge` is given the lines of each request; None passes it on. `requests` counts them by status."""

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.judge: Judge = lambda _: None
        self.requests: dict[int, int] = {}
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> Told:
        self.tokens.add(headers.get("Authorization", ""))
        plain = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        told = self.judge(plain.decode().splitlines())
        if told is None:
            found = httpx.post(self.behind + path, content=plain, timeout=10)
            told = Told(found.status_code, found.text)
        self.requests[told.status] = self.requests.get(told.status, 0) + 1
        return told


@contextmanager
def proxy(behind: str) -> Iterator[Proxy]:
    """Serve a proxy on a free loopback port."""
    made = Proxy(behind)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told = made.answer(self.path, dict(self.headers), body)
            self.send_response(told.status)
            for name, value in told.headers:
                self.send_header(name, value)
            content = told.body.encode() if told.status != 204 else b""
            self.send_header("Content-Length", str(len(content)))
            with contextlib.suppress(ConnectionError):  # who asked was killed
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

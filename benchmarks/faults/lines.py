"""Lines that can be cut: TCP proxies on loopback in front of a part, or between a part and what it needs.

A line is cut in one of two ways, as lines are: *refused*, where every connection is reset and none is accepted, and
*silent*, where connections stay and nothing passes; what was on its way arrives when the line is whole again.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Self

HOST = "127.0.0.1"
CHUNK = 64 * 1024
PATIENCE_S = 10.0
RESET = struct.pack("ii", 1, 0)  # to linger for 0 s: what is closed then is reset


class Line:
    """A proxy from a port of its own to `target`; made by `Lines.line`."""

    def __init__(self, lines: Lines, target: int) -> None:
        self.target = target
        self.port = 0  # set when it first listens, and the same ever after
        self._lines = lines
        self._server: asyncio.Server | None = None
        self._whole = asyncio.Event()
        self._ends: set[asyncio.StreamWriter] = set()

    def cut(self, *, silent: bool) -> None:
        """Let nothing pass any more."""
        self._lines.do(self._cut(silent=silent))

    def restore(self) -> None:
        """Be a line again."""
        self._lines.do(self.open())

    async def open(self) -> None:
        """Listen, and let pass."""
        self._whole.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, HOST, self.port)
            self.port = int(self._server.sockets[0].getsockname()[1])

    async def _cut(self, *, silent: bool) -> None:
        self._whole.clear()
        if silent or self._server is None:
            return
        self._server.close()
        self._server = None
        for end in list(self._ends):
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            await self._whole.wait()
            there, back = await asyncio.open_connection(HOST, self.target)
        except OSError:  # the part behind the line is down
            self._drop(writer)
            return
        self._ends.add(back)
        both = (self._pump(reader, back), self._pump(there, writer))
        await asyncio.gather(*both)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        except OSError:  # one end broke; the other learns it by ours
            pass
        self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._ends.discard(writer)
        writer.close()

    async def close(self) -> None:
        """End it for good."""
        await self._cut(silent=False)


class Lines:
    """All lines of a benchmark, served by one thread until the block ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lines", daemon=True)
        self._lines: list[Line] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            self.do(line.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)

    def line(self, target: int) -> Line:
        """Return a whole line to a port."""
        made = Line(self, target)
        self.do(made.open())
        self._lines.append(made)
        return made

    def do(self, step: Coroutine[Any, Any, None]) -> None:
        """Have the thread do something, and wait for it."""
        asyncio.run_coroutine_threadsafe(step, self._loop).result(PATIENCE_S)

"""Around the gateway of `benchmarks.gateway_chaos`: a source that counts what it says, and a cable that can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from benchmarks.gateway_chaos.box import METRICS, Said, Told, reading
from citybrain.model import Lane

LANES = list(Lane)


class Source:
    """Says numbered things at `rates` (a second, by lane) and says again what the gateway did not commit.

    It listens; a gateway that is killed comes back by itself. Read the numbers under `lock`.
    """

    def __init__(self, rates: dict[Lane, float]) -> None:
        self.rates = rates
        self.lock = threading.Lock()
        self.said = dict.fromkeys(LANES, 0)  # highest number that was ever due
        self.committed = dict.fromkeys(LANES, 0)
        self.acked = dict.fromkeys(LANES, 0)
        self.evicted = dict.fromkeys(LANES, 0)  # messages, over all processes of the gateway
        self.spooled = -1
        self._counted: dict[int, dict[Lane, int]] = {}  # what each process said it evicted
        self.said_again = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._begun_s = time.monotonic()
        self._quiet = False
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self._begun_s = time.monotonic()
        self._thread.start()

    def quiet(self) -> None:
        """Say nothing new any more."""
        with self.lock:
            self._due()
            self._quiet = True

    def stop(self) -> None:
        self._stopping = True
        self._listener.close()
        self._thread.join(5)

    def _due(self) -> None:
        if not self._quiet:
            passed_s = time.monotonic() - self._begun_s
            self.said = {lane: int(passed_s * self.rates.get(lane, 0.0)) for lane in LANES}

    def _serve(self) -> None:
        self._listener.settimeout(0.2)
        while not self._stopping:
            try:
                connection, _ = self._listener.accept()
            except (TimeoutError, OSError):
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        sent: dict[Lane, int] | None = None
        rest = b""
        connection.setblocking(False)
        while not self._stopping:
            with contextlib.suppress(BlockingIOError):
                data = connection.recv(1 << 16)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    told = msgspec.json.decode(line, type=Told)
                    self._hear(told)
                    if told.hello:
                        with self.lock:
                            if sent is None:
                                sent = dict(self.committed)
                            self.said_again += sum(self.said[lane] - sent[lane] for lane in LANES)
            if sent is not None:
                self._say(connection, sent)
            time.sleep(0.01)

    def _hear(self, told: Told) -> None:
        with self.lock:
            counted = self._counted.setdefault(told.pid, dict.fromkeys(LANES, 0))
            for lane in LANES:
                self.committed[lane] = max(self.committed[lane], told.committed[lane])
                self.acked[lane] = max(self.acked[lane], told.acked[lane])
                self.evicted[lane] += told.evicted[lane] - counted[lane]
                counted[lane] = told.evicted[lane]
            self.spooled = told.spooled

    def _say(self, connection: socket.socket, sent: dict[Lane, int]) -> None:
        with self.lock:
            self._due()
            lines = [
                msgspec.json.encode(Said(int(lane), n)) + b"\n"
                for lane in LANES
                for n in range(sent[lane] + 1, self.said[lane] + 1)
            ]
            sent.update(self.said)
        connection.setblocking(True)
        connection.settimeout(5)
        connection.sendall(b"".join(lines))
        connection.setblocking(False)

    def progress(self) -> dict[Lane, int]:
        """Return the highest number by lane that is acknowledged."""
        with self.lock:
            return dict(self.acked)

    def done(self) -> bool:
        """Return whether everything that was said is committed and nothing waits in the spool."""
        with self.lock:
            return self.spooled == 0 and all(self.committed[lane] >= self.said[lane] for lane in LANES)


class Lines(Source):
    """The same for the driver `json_lines` of the real gateway, which confirms nothing: each number is said once.

    What the gateway had in memory when it was killed is gone; `look` says what the log has.
    """

    def __init__(self, rates: dict[Lane, float]) -> None:
        super().__init__({lane: rate for lane, rate in rates.items() if lane in METRICS})
        self.look: Callable[[], dict[Lane, int]] = lambda: self.acked
        self._sent = dict.fromkeys(LANES, 0)

    def _talk(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        while not self._stopping:
            with contextlib.suppress(BlockingIOError):
                if not connection.recv(1024):
                    return
            with self.lock:
                self._due()
                numbers = [
                    (lane, n) for lane in METRICS for n in range(self._sent[lane] + 1, self.said[lane] + 1)
                ]  # fmt: skip
                self._sent = dict(self.said)
            for lane, n in numbers:
                said = reading(Said(int(lane), n))
                line = msgspec.json.encode({"d": said.device, "t": said.observed_at, "m": said.values})
                connection.setblocking(True)
                connection.sendall(line + b"\n")
                connection.setblocking(False)
            time.sleep(0.01)

    def progress(self) -> dict[Lane, int]:
        """Return the highest number by lane that is in the log."""
        self.acked = self.look()
        return self.acked

    def done(self) -> bool:
        """Return whether the last thing said is in the log."""
        return all(self.progress()[lane] >= self.said[lane] for lane in METRICS)


class Cable:
    """A TCP proxy between the gateway and the broker."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_cut = threading.Event()
        self._flows = threading.Event()
        self._flows.set()
        self._stopping = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, silently: bool) -> None:
        """Break the line: connections are reset, or nothing passes any more and nobody is told."""
        self._is_cut.set()
        self._flows.clear()
        if not silently:
            self._reset()

    def mend(self) -> None:
        """Let everything through again; what was under way over a silent cut is lost with its connection."""
        self._reset()
        self._is_cut.clear()
        self._flows.set()

    def stop(self) -> None:
        self._stopping = True
        self._flows.set()
        self._listener.close()
        self._reset()

    def _reset(self) -> None:
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 2)
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            one.settimeout(None)
            while data := one.recv(1 << 16):
                self._flows.wait()
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

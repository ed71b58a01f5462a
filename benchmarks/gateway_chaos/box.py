"""A gateway for `benchmarks.gateway_chaos`: real agent, spool, uplink and service, fed by a numbered source over TCP.

    python -m benchmarks.gateway_chaos.box --spool DIR --source PORT --broker PORT

The source numbers what it says, by lane. At every start the gateway tells it up to where its spool has it, and after
every commit again; what is not committed the source says once more. So a reading that was only in memory is nobody's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from citybrain.clock import monotonic_s, system_clock
from citybrain.errors import DiskFull
from citybrain.model import Lane, Reading
from citybrain.wire import CHUNK, Header, Message, blob_chunks, open_chunk, readings_of
from edge.agent import Agent
from gateway.pace import Paced
from gateway.service import Broker, GatewayService
from gateway.spool import Spool
from gateway.uplink import Uplink

GATEWAY, SHARD, DEVICES = "chaos-gw", 0, 8
METRICS = {Lane.TELEMETRY: "value", Lane.EVENT: "evidence"}
PICTURE_BYTES = 100_000
BORN_MS = 1_767_225_600_000
TURN_S = 0.02
COMMIT_EVERY_S = 0.25  # instead of 10 s: a run has as many commits as a day


class Said(msgspec.Struct, array_like=True):
    """What the source says: the n-th thing of a lane."""

    lane: int
    n: int


class Told(msgspec.Struct):
    """What the gateway tells the source, by lane: up to which number it committed, and had acknowledged; and so on."""

    committed: list[int]
    acked: list[int]
    evicted: list[int]  # messages, by this process
    spooled: int
    hello: bool = False
    pid: int = 0


def reading(said: Said) -> Reading:
    """Return the reading that the source's n-th word is: its value is its number."""
    return Reading(f"meter-{said.n % DEVICES}", BORN_MS + said.n, {METRICS[Lane(said.lane)]: float(said.n)})


def picture(n: int) -> bytes:
    """Return the n-th picture: its number, again and again, so that every chunk begins with it."""
    return b"%012d" % n * (PICTURE_BYTES // 12)


class Numbered(Paced):
    """The paced spool, and which number the last thing of each message had."""

    def __init__(self, spool: Spool) -> None:
        super().__init__(spool, monotonic_s, COMMIT_EVERY_S)
        self.committed = {lane: _last_number(spool, lane) for lane in Lane}
        self.acked = dict.fromkeys(Lane, 0)
        self._waiting: dict[Lane, deque[tuple[int, int]]] = {lane: deque() for lane in Lane}
        self._unacked: dict[Lane, deque[tuple[int, int]]] = {lane: deque() for lane in Lane}

    def append(self, lane: Lane, readings: Sequence[Reading], at_ms: int) -> int:
        seq = super().append(lane, readings, at_ms)
        if readings:
            self._waiting[lane].append((seq, round(readings[-1].values[METRICS[lane]])))
        return seq

    def blob(self, n: int, at_ms: int) -> None:
        """Spool the n-th picture."""
        waiting = self._waiting[Lane.BLOB]
        last = waiting[-1][0] if waiting else self.spool.next_seq(Lane.BLOB) - 1
        self.spool.put_blob(picture(n), at_ms)
        waiting.append((last + len(blob_chunks(picture(n))), n))

    def look(self) -> None:
        """Learn what is committed and acknowledged by now."""
        for lane in Lane:
            waiting, unacked = self._waiting[lane], self._unacked[lane]
            while waiting and waiting[0][0] < self.spool.next_seq(lane):
                unacked.append(waiting.popleft())
                self.committed[lane] = unacked[-1][1]
            while unacked and unacked[0][0] < self.spool.floor(lane):
                self.acked[lane] = unacked.popleft()[1]

    def forget(self) -> None:
        """Nothing waits any more: a full disk took it."""
        for waiting in self._waiting.values():
            waiting.clear()


def _last_number(spool: Spool, lane: Lane) -> int:
    """Return the number of the last thing that the spool committed; 0 where it has none to tell."""
    body = spool.body(lane, spool.next_seq(lane) - 1)
    if body is None:
        return 0
    message = Message(Header(1, 1, 1, 0), True, body, 0)
    if lane is not Lane.BLOB:
        return round(readings_of(message)[-1].values[METRICS[lane]])
    chunk = open_chunk(message)
    n = int(body[CHUNK.size : CHUNK.size + 12])
    return n if chunk.offset + len(chunk.content) == chunk.size else n - 1


class Line:
    """The connection to the source, as a source of the agent (`edge.agent.Source`)."""

    def __init__(self, port: int, sink: Numbered) -> None:
        self._port = port
        self._sink = sink
        self._socket: socket.socket | None = None
        self._rest = b""

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        """Return what was said since the last call; pictures go into the spool at once."""
        found: list[tuple[Lane, Reading]] = []
        for line in self._lines():
            said = msgspec.json.decode(line, type=Said)
            if said.lane == Lane.BLOB:
                self._sink.blob(said.n, now_ms)
            else:
                found.append((Lane(said.lane), reading(said)))
        return found

    def _lines(self) -> list[bytes]:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), 5)
            self._rest = b""
            self.tell(hello=True)
        if not select.select([self._socket], [], [], 0)[0]:
            return []
        data = self._socket.recv(1 << 16)
        if not data:
            raise SystemExit("the source is gone")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines

    def tell(self, *, hello: bool = False) -> None:
        """Say how far we are."""
        self._sink.look()
        spool = self._sink.spool
        evicted = [spool.counters.values[f"evicted_total{{lane={lane.topic}}}"] for lane in Lane]
        told = Told(
            [*self._sink.committed.values()], [*self._sink.acked.values()], evicted, spool.spooled(), hello, os.getpid()
        )  # fmt: skip
        if self._socket is not None:
            self._socket.sendall(msgspec.json.encode(told) + b"\n")

    def begin_again(self) -> None:
        """Have everything that is not committed said once more."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def run(folder: Path, source: int, broker: int, stop: threading.Event) -> None:
    """Run until `stop`; a full disk has what was not committed said again."""
    clock = system_clock()
    spool = Spool(folder, "board")
    spool.start()
    sink = Numbered(spool)
    service = GatewayService(Uplink(spool, GATEWAY, SHARD), GATEWAY, SHARD, Broker("127.0.0.1", broker), clock)
    line = Line(source, sink)
    agent = Agent([line], sink, linger_ms=100)
    while not stop.is_set():
        try:
            agent.step(clock.now_ms())
            sink.commit()
        except DiskFull:
            with contextlib.suppress(DiskFull):  # counted where it arose
                spool.commit()
            sink.look()
            sink.forget()
            line.begin_again()
            agent = Agent([line], sink, linger_ms=100)
        service.poll(TURN_S)
        line.tell()
    service.close(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--source", type=int, required=True, help="port")
    parser.add_argument("--broker", type=int, required=True, help="port")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    run(options.spool, options.source, options.broker, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A load generator: many simulated gateways on one thread, each with its own connection, window and acknowledgements.

It is as cheap as can be, because it shares the machine with what it measures: bodies are encoded once, a message is a
copy of a packet with its numbers patched in. It keeps the wire contract all the same: at most 32 messages or 512 KiB
unacknowledged, resend from ack + 1.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import struct
import sys
import time
from collections import deque
from pathlib import Path

import msgspec

from citybrain import wire
from citybrain.layout import Layout
from citybrain.model import Device, Reading, Registry
from streams.registry import decode_registry
from streams.runtimes.mqtt import CONNACK, PUBLISH, SUBACK, Packets, connect_packet, packet, subscribe_packet, text

NUMBERS = struct.Struct("<QQQq")
RESEND_S = 2.0
EMPTY = wire.Header(wire.MAX_SEQ, wire.MAX_SEQ, wire.MAX_SEQ, wire.MAX_SEQ)


class Result(msgspec.Struct):
    """What was acknowledged in the measured time, and how long an acknowledgement took (from when it was due)."""

    messages_per_s: float
    readings_per_s: float
    p50_ms: float
    p99_ms: float
    acked: dict[str, int]
    resent: int


def sample(devices: list[Device], now_ms: int) -> list[Reading]:
    """Return one plausible reading of each device, four values each, as a sensor with four decimals says them."""
    return [
        Reading(
            device.id,
            now_ms - 7 * n,
            {
                "floor": float(n % 30),
                "moving": float(n % 2),
                "vibration_rms_g": round(0.01 + n * 0.00037, 4),
                "current_a": round(3.0 + n * 0.1113, 2),
            },
        )
        for n, device in enumerate(devices)
    ]


class Template:
    """A PUBLISH packet (QoS 1) whose numbers can be written in place; JSON keeps room for them in white space."""

    def __init__(self, topic: str, readings: list[Reading], *, columns: bool) -> None:
        self.columns = columns
        payload = (
            wire.columns_message(EMPTY, wire.columns_body(readings))
            if columns
            else wire.json_message(EMPTY, wire.json_body(readings))
        )
        name = text(topic)
        self.packet = bytearray(packet(PUBLISH << 4 | 2, name, b"\0\1", payload))
        self.bytes = len(payload)
        start = len(self.packet) - len(payload)
        self._number = start - 2
        mark = str(wire.MAX_SEQ).encode()
        self._at = [start + 8] if columns else _places(bytes(self.packet), mark, 4)
        self._width = len(mark)

    def numbered(self, epoch: int, seq: int, floor: int, sent_at: int) -> bytes:
        """Return the packet of one message."""
        data = self.packet
        struct.pack_into(">H", data, self._number, seq % 65535 + 1)
        if self.columns:
            NUMBERS.pack_into(data, self._at[0], epoch, seq, floor, sent_at)
        else:
            for at, value in zip(self._at, (epoch, seq, floor, sent_at), strict=True):
                data[at : at + self._width] = b"%*d" % (self._width, value)
        return bytes(data)


def _places(data: bytes, mark: bytes, count: int) -> list[int]:
    found, at = [], -1
    for _ in range(count):
        at = data.index(mark, at + 1)
        found.append(at)
    return found


class Simulated:
    """One gateway's connection and telemetry lane."""

    def __init__(self, name: str, shard: int, port: int, template: Template, epoch: int) -> None:
        self.name = name
        self.template = template
        self.epoch = epoch
        self.window = max(1, min(wire.WINDOW_MESSAGES, wire.WINDOW_BYTES // template.bytes))
        self.acked, self.next_seq, self.resent = 0, 1, 0
        self.due: deque[tuple[int, float]] = deque()  # (seq, when it was due), unacknowledged
        self.progress_s = time.monotonic()
        self._packets = Packets()
        self._unsent = b""
        self.socket = socket.create_connection(("127.0.0.1", port), 5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(connect_packet(name, 60) + subscribe_packet(1, [wire.topic(shard, name, "ack")]))
        answered: set[int] = set()
        while not {CONNACK, SUBACK} <= answered:
            answered |= {kind for kind, _, _ in self._packets.feed(self.socket.recv(4096))}
        self.socket.setblocking(False)

    def room(self) -> int:
        return 0 if self._unsent else self.window - (self.next_seq - 1 - self.acked)

    def send(self, count: int, due_s: float) -> None:
        """Send `count` new messages."""
        now_ms, first = int(due_s * 1000), self.next_seq
        floor, make = self.acked + 1, self.template.numbered
        self._unsent += b"".join([make(self.epoch, seq, floor, now_ms) for seq in range(first, first + count)])
        self.due.extend((seq, due_s) for seq in range(first, first + count))
        self.next_seq += count
        self.flush()

    def resend(self, now_s: float) -> None:
        """Go back to ack + 1 where nothing has moved for RESEND_S."""
        if self.next_seq - 1 > self.acked and now_s - self.progress_s > RESEND_S and not self._unsent:
            self.progress_s = now_s
            self.resent += self.next_seq - 1 - self.acked
            make = self.template.numbered
            self._unsent = b"".join(
                [make(self.epoch, seq, self.acked + 1, 0) for seq in range(self.acked + 1, self.next_seq)]
            )
            self.flush()

    def flush(self) -> None:
        if not self._unsent:
            return
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return

    def heard(self, now_s: float, latencies: list[float]) -> int:
        """Take what the broker sent; return how many messages it acknowledges."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return 0
        if not data:
            raise SystemExit(f"{self.name}: the broker closed the connection")
        before = self.acked
        for kind, _, body in self._packets.feed(data):
            if kind == PUBLISH:
                ack = wire.decode_ack(body[2 + int.from_bytes(body[:2]) :])
                if ack.epoch == self.epoch and ack.seq > self.acked:
                    self.acked = ack.seq
        if self.acked > before:
            self.progress_s = now_s
            due = self.due
            while due and due[0][0] <= self.acked:
                latencies.append(now_s - due.popleft()[1])
        return self.acked - before


class Driver:
    """Sends as fast as the windows allow, or `rate` messages/s in all, in turn over the gateways."""

    def __init__(self, gateways: list[Simulated], rate: float) -> None:
        self.gateways = gateways
        self.rate = rate
        self.acked = 0
        self.latencies: list[float] = []
        self._waiting: deque[tuple[Simulated, float]] = deque()
        self._sent = 0
        self._resend_at = 0.0

    def run(self, warm_s: float, measure_s: float) -> float:
        """Return acknowledged messages/s of the measured time; `latencies` are those of that time too."""
        poll = select.epoll()
        by_fd = {gateway.socket.fileno(): gateway for gateway in self.gateways}
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        start = now_s = time.monotonic()
        begin_s, measuring = start + warm_s, False
        self._top_up(self.gateways, now_s)
        while now_s < begin_s + measure_s:
            ready = poll.poll(0.001 if self.rate else 0.05)
            now_s = time.monotonic()
            if not measuring and now_s >= begin_s:
                measuring, begin_s, self.acked = True, now_s, 0
                self.latencies.clear()
            heard = [by_fd[fd] for fd, _ in ready]
            for gateway in heard:
                self.acked += gateway.heard(now_s, self.latencies)
            self._top_up(heard, now_s)
            self._pace(start, now_s)
            self._mend(now_s)
        return self.acked / (now_s - begin_s)

    def _top_up(self, gateways: list[Simulated], now_s: float) -> None:
        """Fill the windows."""
        for gateway in gateways:
            if not self.rate and (room := gateway.room()) > 0:
                gateway.send(room, now_s)

    def _pace(self, start: float, now_s: float) -> None:
        """Send what is due; what finds its window closed waits, and its time runs."""
        while self._sent < (now_s - start) * self.rate:
            self._waiting.append((self.gateways[self._sent % len(self.gateways)], start + self._sent / self.rate))
            self._sent += 1
        for _ in range(len(self._waiting)):
            gateway, due_s = self._waiting.popleft()
            if gateway.room() > 0:
                gateway.send(1, due_s)
            else:
                self._waiting.append((gateway, due_s))

    def _mend(self, now_s: float) -> None:
        """Send the rest of half-sent data, and twice a second again what nobody acknowledges."""
        for gateway in self.gateways:
            gateway.flush()
        if now_s >= self._resend_at:
            self._resend_at = now_s + 0.5
            for gateway in self.gateways:
                gateway.resend(now_s)


def drain(gateways: list[Simulated], limit_s: float = 20.0) -> None:
    """Wait until everything sent is acknowledged."""
    deadline = time.monotonic() + limit_s
    while any(gateway.acked < gateway.next_seq - 1 for gateway in gateways):
        now_s = time.monotonic()
        if now_s > deadline:
            return
        for gateway in gateways:
            gateway.heard(now_s, [])
            gateway.flush()
            gateway.resend(now_s)
        time.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--registry", required=True, help="content hash")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--readings", type=int, required=True, help="in each message")
    parser.add_argument("--encoding", choices=("columns", "json"), default="columns")
    parser.add_argument("--rate", type=float, default=0.0, help="messages/s; 0: as fast as the windows allow")
    parser.add_argument("--warm-s", type=float, default=1.5)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    registry: Registry = decode_registry(Layout(options.data).get_blob(options.registry))
    devices: dict[str, list[Device]] = {}
    for device in registry.devices:
        devices.setdefault(device.gateway, []).append(device)
    gateways = [
        Simulated(
            gateway.id,
            gateway.shard,
            options.port,
            Template(
                wire.topic(gateway.shard, gateway.id, "telemetry"),
                sample(devices[gateway.id][: options.readings], time.time_ns() // 1_000_000),
                columns=options.encoding == "columns",
            ),
            options.epoch,
        )
        for gateway in registry.gateways
    ]
    driver = Driver(gateways, options.rate)
    per_s = driver.run(options.warm_s, options.seconds)
    latencies = sorted(driver.latencies)
    drain(gateways)
    result = Result(
        per_s,
        per_s * options.readings,
        1000 * latencies[len(latencies) // 2] if latencies else -1.0,
        1000 * latencies[int(len(latencies) * 0.99)] if latencies else -1.0,
        {gateway.name: gateway.acked for gateway in gateways},
        sum(gateway.resent for gateway in gateways),
    )
    print(json.dumps(msgspec.to_builtins(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A small, fast MQTT 3.1.1 client: one clean session, QoS 1 in, QoS 0 out, one thread, no callbacks.

A general client spends more time on a message than ingest does on checking and storing it (docs/measurements.md): it
reads a packet in four system calls and keeps a state machine per message. Here many packets come out of one read, and
all PUBACKs and acknowledgements of a burst leave in one write.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence

from citybrain.clock import monotonic_s
from citybrain.errors import ProtocolError, Unavailable

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14
READ_BYTES = 1024 * 1024
MOST_KEPT = 512 * 1024  # of one packet: twice a message; what is longer is cut, and refused as oversized
REFUSED = {1: "protocol version", 2: "client id", 3: "server unavailable", 4: "user name or password", 5: "not allowed"}

NOTHING_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Packet = tuple[int, int, bytes]  # type, flags, everything behind the length


def packet(first: int, *parts: bytes) -> bytes:
    """Return a packet: its first byte, the length of the parts, the parts."""
    length = sum(map(len, parts))
    size = bytearray()
    while True:
        length, digit = divmod(length, 128)
        size.append(digit | (0x80 if length else 0))
        if not length:
            return b"".join((bytes((first,)), size, *parts))


def text(value: str) -> bytes:
    """Return a string as MQTT has it: length, UTF-8."""
    encoded = value.encode()
    return struct.pack(">H", len(encoded)) + encoded


def connect_packet(client_id: str, keep_alive_s: int) -> bytes:
    """Return CONNECT with a clean session."""
    return packet(CONNECT << 4, text("MQTT"), struct.pack(">BBH", 4, 2, keep_alive_s), text(client_id))


def subscribe_packet(number: int, topics: Sequence[str]) -> bytes:
    """Return SUBSCRIBE to all topics with QoS 1."""
    return packet(SUBSCRIBE << 4 | 2, struct.pack(">H", number), *(text(topic) + b"\1" for topic in topics))


def publish_packet(topic: str, payload: bytes) -> bytes:
    """Return PUBLISH with QoS 0, not retained."""
    return packet(PUBLISH << 4, text(topic), payload)


class Packets:
    """Takes packets out of a stream of bytes. A packet beyond MOST_KEPT bytes is cut to that; the rest is skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yield the packets that are complete now; raises ProtocolError where a length makes no sense."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        while end - position >= 2:
            first, length, at = data[position], data[position + 1], position + 2
            if length & 0x80:
                found = _length(data, position + 1)
                if found is None:
                    break
                length, at = found
            if end - at < length:
                if length > MOST_KEPT <= end - at:
                    yield first >> 4, first & 15, data[at : at + MOST_KEPT]
                    self._skip = length - (end - at)
                    position = end
                break
            yield first >> 4, first & 15, data[at : at + min(length, MOST_KEPT)]
            position = at + length
        self._rest = data[position:]


def _length(data: bytes, at: int) -> tuple[int, int] | None:
    """Return (remaining length, behind it), or None where it is not all there; raises ProtocolError."""
    length = shift = 0
    for position in range(at, min(at + 4, len(data))):
        length |= (data[position] & 0x7F) << shift
        if not data[position] & 0x80:
            return length, position + 1
        shift += 7
    if len(data) >= at + 4:
        raise ProtocolError("MQTT: a packet length of more than four bytes")
    return None


class Link:
    """A connection to the broker, within TLS where it has a context; every method raises Unavailable once it breaks."""

    def __init__(
        self, host: str, port: int, client_id: str, keep_alive_s: int = 20, tls: ssl.SSLContext | None = None
    ) -> None:
        self._tls = tls
        self.where = f"MQTT broker at {host}:{port}"
        self._address = (host, port)
        self._client_id = client_id
        self._keep_alive_s = keep_alive_s
        self._socket: socket.socket | None = None
        self._packets = Packets()
        self._ready: list[Packet] = []
        self._out: list[bytes] = []
        self._unsent = b""
        self._heard_s = self._told_s = 0.0

    def open(self, topics: Sequence[str], timeout_s: float = 1.0) -> None:
        """Connect and subscribe; raises Unavailable where that takes longer than `timeout_s`."""
        deadline = monotonic_s() + timeout_s
        self.close()
        try:
            self._socket = socket.create_connection(self._address, timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * READ_BYTES)
            if self._tls is not None:
                self._socket = self._tls.wrap_socket(self._socket, server_hostname=self._address[0])
            self._socket.setblocking(False)
            self._greet(topics, deadline)
        except OSError as error:
            self.close()
            raise Unavailable(f"{self.where}: {error}") from None
        except (Unavailable, ProtocolError):
            self.close()
            raise

    def _greet(self, topics: Sequence[str], deadline: float) -> None:
        self._out.append(connect_packet(self._client_id, self._keep_alive_s))
        answer = self._await(CONNACK, deadline)
        if answer[1:] != b"\0":
            raise Unavailable(f"{self.where}: refused: {REFUSED.get(answer[-1], 'no reason given')}")
        self._out.append(subscribe_packet(1, topics))
        if 0x80 in self._await(SUBACK, deadline)[2:]:
            raise Unavailable(f"{self.where}: subscription refused")

    def _await(self, kind: int, deadline: float) -> bytes:
        """Wait for a packet of the handshake; messages that come before it are kept."""
        while True:
            self.flush()
            for index, (found, _, body) in enumerate(self._ready):
                if found == kind:
                    del self._ready[index]
                    return body
            left = deadline - monotonic_s()
            if left <= 0:
                raise Unavailable(f"{self.where}: no answer")
            self.wait(left)
            self._read()

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to read, or room for what could not be sent."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return  # already out of the kernel: select would not see it
        if self._socket is not None and not self._ready:
            select.select([self._socket], [self._socket] if self._unsent else [], [], max(0.0, timeout_s))

    def _read(self) -> bool:
        """Read what is there, up to READ_BYTES; return whether there was anything."""
        if self._socket is None:
            raise Unavailable(f"{self.where}: not connected")
        try:
            data = self._socket.recv(READ_BYTES)
        except NOTHING_NOW:
            return False
        except OSError as error:
            self.close()
            raise Unavailable(f"{self.where}: {error}") from None
        if not data:
            self.close()
            raise Unavailable(f"{self.where}: it closed the connection")
        self._heard_s = monotonic_s()
        try:
            self._ready += self._packets.feed(data)
        except ProtocolError:
            self.close()
            raise
        return True

    def receive(self) -> list[tuple[str, bytes]]:
        """Return the messages that are there, as (topic, payload), without waiting; PUBACKs leave with `flush`."""
        self._read()
        messages: list[tuple[str, bytes]] = []
        for kind, flags, body in self._ready:
            if kind != PUBLISH:
                continue
            topic_end = 2 + int.from_bytes(body[:2])
            start = topic_end + 2 if flags & 6 else topic_end
            if flags & 6:
                self._out.append(b"\x40\x02" + body[topic_end:start])
            messages.append((body[2:topic_end].decode(errors="replace"), body[start:]))
        self._ready.clear()
        return messages

    def publish(self, topic: str, payload: bytes) -> None:
        """Put a message beside the others that leave with `flush`; without a connection it is dropped."""
        if self._socket is not None:
            self._out.append(publish_packet(topic, payload))

    def flush(self) -> None:
        """Send what there is to send, as far as the broker takes it now."""
        if self._out:
            self._unsent += b"".join(self._out)
            self._out.clear()
        if self._socket is None or not self._unsent:
            return
        try:
            sent = self._socket.send(self._unsent)
        except NOTHING_NOW:
            return
        except OSError as error:
            self.close()
            raise Unavailable(f"{self.where}: {error}") from None
        self._unsent = self._unsent[sent:]
        self._told_s = monotonic_s()

    def keep_alive(self) -> None:
        """Ping before the broker misses us; raises Unavailable where it is silent itself."""
        now_s = monotonic_s()
        if now_s - self._heard_s > 1.5 * self._keep_alive_s:
            self.close()
            raise Unavailable(f"{self.where}: silent for {now_s - self._heard_s:.0f} s")
        if now_s - self._told_s > self._keep_alive_s / 2:
            self._out.append(packet(PINGREQ << 4))
            self.flush()

    def close(self) -> None:
        """Leave; what was not flushed is dropped."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(packet(DISCONNECT << 4))
            self._socket.close()
        self._socket = None
        self._packets = Packets()
        self._ready.clear()
        self._out.clear()
        self._unsent = b""

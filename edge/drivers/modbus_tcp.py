"""Modbus/TCP, as the client of one server: a device, or a gateway with several units behind it.

    pumps:
      driver: modbus_tcp
      address: 192.168.10.20
      interval: 5s
      devices:
        - {device: pump-room-4, unit_id: 1, map: pump_room}

Frames after MODBUS Messaging on TCP/IP Implementation Guide V1.0b, section 3.1.3.
"""

from __future__ import annotations

import socket

import msgspec
from pymodbus.framer.socket import FramerSocket
from pymodbus.pdu import DecodePDU

from citybrain.clock import monotonic_s
from citybrain.config import Duration
from edge.driver import Quality
from edge.drivers.modbus import (
    DEADLINE_S,
    REQUESTS,
    Bus,
    Station,
    Trouble,
    check_stations,
    check_times,
    refusal,
)
from edge.drivers.registers import Block, RegisterMap

__all__ = ["DEADLINE_S", "PROCESS", "Config", "make"]
PROCESS = False
CONNECT_S = 3.0
HEADER_BYTES = 8  # with the function


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server: where it is, its units, how often they are asked, and maps of its own."""

    address: str
    devices_: tuple[Station, ...] = msgspec.field(name="devices")
    port: int = 502
    interval: Duration = Duration(1000)
    timeout: Duration = Duration(1000)
    maps: dict[str, RegisterMap] = {}

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port: expected 1 to 65535, got {self.port}")
        check_times(self.interval, self.timeout)
        check_stations(self.devices_, self.maps, range(256))

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(station.device for station in self.devices_)


class TcpLine:
    """A connection to a server. An answer belongs to its question by number, so that a late one does no harm."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._socket: socket.socket | None = None
        self._heard = b""
        self._number = 0
        self._sent = b""
        self._unused: list[tuple[str, str]] = []
        self._others = ""  # the last number that was not the question's
        self._framer = FramerSocket(DecodePDU(False))

    def open(self) -> None:
        """Connect."""
        self.close()
        where = (self._config.address, self._config.port)
        try:
            self._socket = socket.create_connection(where, CONNECT_S)
        except OSError as error:
            raise OSError(f"{where[0]}:{where[1]}: {error.strerror or error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard = b""

    def close(self) -> None:
        """Disconnect."""
        connected, self._socket = self._socket, None
        if connected is not None:
            connected.close()

    def unused(self) -> list[tuple[str, str]]:
        """Return what was heard since the last call and is no answer to what was asked."""
        found, self._unused = self._unused, []
        return found

    def ask(self, unit_id: int, block: Block) -> bytes | Trouble:
        """Read a block."""
        if self._socket is None:
            raise OSError(f"{self._config.address} is not connected")
        self._number = self._number % 65535 + 1
        request = REQUESTS[block.function](unit_id, self._number, block.address, block.count)
        self._sent, self._others = self._framer.buildFrame(request), ""
        self._socket.sendall(self._sent)
        until_s = monotonic_s() + self._config.timeout / 1000
        while (found := self._understand(unit_id, block)) is None:
            self._socket.settimeout(max(0.001, until_s - monotonic_s()))
            try:
                data = self._socket.recv(4096)
            except TimeoutError:
                what = f"nothing{self._others} within {self._config.timeout} ms"
                return Trouble(Quality.NO_ANSWER, f"unit {unit_id}: {what}")
            if not data:
                raise OSError(f"{self._config.address} closed the connection")
            self._heard += data
        return found

    def _understand(self, unit_id: int, block: Block) -> bytes | Trouble | None:
        """Return the answer to the last question, None where it is not there yet. Raises OSError: out of step."""
        while len(self._heard) >= HEADER_BYTES:
            used, unit, number, frame = self._framer.decode(self._heard)
            if self._heard[2:4] != b"\x00\x00":
                raise OSError(f"{self._config.address} does not speak Modbus: {self._heard[:8].hex(' ')}")
            if not used:
                return None
            whole, self._heard = self._heard[:used], self._heard[used:]
            if whole == self._sent:
                self._pass_over("echo", "our own question", f"{self._config.address} gives back what it is asked")
            elif number != self._number:
                late = f"{self._config.address} answers later than {self._config.timeout} ms: raise `timeout`"
                self._pass_over("late_answer", f"answer number {number} for {self._number}", late)
            else:
                return _evaluate(unit, frame, unit_id, block)
        return None

    def _pass_over(self, reason: str, what: str, sample: str) -> None:
        self._others = f" but {what}"
        self._unused.append((reason, sample))


def _evaluate(unit: int, frame: bytes, unit_id: int, block: Block) -> bytes | Trouble:
    if unit != unit_id:
        return Trouble(Quality.FOREIGN, f"unit {unit} answers for unit {unit_id}")
    if len(frame) == 2 and frame[0] == block.function | 0x80:
        return refusal(block.function, block.address, frame[1])
    if len(frame) < 2 or frame[0] != block.function or frame[1] != block.size or len(frame) != 2 + block.size:
        return Trouble(Quality.GARBLED, f"an answer of {len(frame)} bytes: {frame[:16].hex(' ')}")
    return frame[2:]


def make(name: str, config: Config) -> Bus:
    """Make the driver of one server."""
    return Bus(name, TcpLine(config), config.devices_, config.maps, config.interval)

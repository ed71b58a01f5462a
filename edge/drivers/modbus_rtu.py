"""Modbus RTU on a serial line (RS-485 adapter or built-in port), as the master.

    bus-0:
      driver: modbus_rtu
      port: /dev/ttyUSB0
      baud: 9600
      interval: 1s
      devices:
        - {device: hyd-000123, unit_id: 17, map: hydrant}

Frames after MODBUS over Serial Line Specification V1.02, section 2.5.1. An answer does not say what it answers: see
`edge/drivers/unanswered.py`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Literal

import msgspec
import serial
from pymodbus.framer.rtu import FramerRTU
from pymodbus.pdu import DecodePDU

from citybrain.clock import monotonic_s, wait_until_s
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
    plan,
    refusal,
)
from edge.drivers.registers import Block, RegisterMap
from edge.drivers.unanswered import Unanswered
from edge.serial_port import open_port

__all__ = ["DEADLINE_S", "PROCESS", "Config", "make"]
PROCESS = False
REQUEST_BYTES, ANSWER_BYTES = 8, 5  # an answer's without its data
SHORTEST_GAP_S = 0.00175  # above 19,200 baud
SILENCE_S = 0.05  # a frame that stops so long is over: USB adapters hold bytes back for 16 ms
HELD_BACK_S = 0.02
MOST_CHATTER_S = 0.3  # of what nobody was asked for: the longest frame at 9,600 baud
MOST_LOAD = 0.9
MOST_TRIES = 3  # of a poll: a garbled answer, and a wider read that is refused


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bus: its port and how that is set, its stations, how often they are asked, and maps of its own."""

    port: str
    devices_: tuple[Station, ...] = msgspec.field(name="devices")
    baud: int = 9600
    parity: Literal["N", "E", "O"] = "N"
    stop_bits: Literal[1, 2] = 1
    interval: Duration = Duration(1000)
    timeout: Duration = Duration(200)
    maps: dict[str, RegisterMap] = {}

    def __post_init__(self) -> None:
        if not 300 <= self.baud <= 4_000_000:
            raise ValueError(f"baud: expected 300 to 4000000, got {self.baud}")
        check_times(self.interval, self.timeout)
        check_stations(self.devices_, self.maps, range(1, 248))
        if (load := self.load()) > MOST_LOAD:
            raise ValueError(
                f"interval: reading all devices takes {load:.0%} of what {self.baud} baud allows; "
                "ask less often, or raise the speed"
            )

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(station.device for station in self.devices_)

    @property
    def char_s(self) -> float:
        """How long one character takes on the wire."""
        return (1 + 8 + (self.parity != "N") + self.stop_bits) / self.baud

    @property
    def gap_s(self) -> float:
        """How long the line is silent between two frames: 3.5 characters of 11 bits, 1.75 ms above 19,200 baud."""
        return SHORTEST_GAP_S if self.baud > 19_200 else 3.5 * 11 / self.baud

    def wire_s(self, block: Block) -> float:
        """Return how long reading a block occupies the line: both frames and the silence after each."""
        return (REQUEST_BYTES + ANSWER_BYTES + block.size) * self.char_s + 2 * self.gap_s

    def load(self) -> float:
        """Return the share of the line's time that the stations' reads take."""
        tasks = plan(self.devices_, self.maps, self.interval, 0.0)
        return sum(self.wire_s(block) / task.interval_s for task in tasks for block in task.reads)


class Heard(msgspec.Struct, frozen=True):
    """What bytes on the line are so far. whole: nothing more will come of them."""

    found: bytes | Trouble
    whole: bool


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Find the whole frames of answers in what was heard, each with its place; noise between them is passed over."""
    start = 0
    while start <= len(data) - ANSWER_BYTES:
        size = ANSWER_BYTES + (0 if data[start + 1] & 0x80 else data[start + 2])
        frame = data[start : start + size]
        if 1 <= data[start + 1] & 0x7F <= 4 and len(frame) == size and intact(frame):
            yield start, frame
            start += size
        else:
            start += 1


def understand(data: bytes, unit_id: int, block: Block) -> Heard:
    """Find the answer to a read in what was heard since it was asked: noise before it is passed over.

    A frame of another station does not end the wait.
    """
    foreign: Heard | None = None
    for _, frame in frames(data):
        if frame[1] & 0x7F != block.function:
            continue
        if frame[0] != unit_id:
            foreign = Heard(Trouble(Quality.FOREIGN, f"unit {frame[0]} answers for unit {unit_id}"), whole=False)
        elif frame[1] & 0x80:
            return Heard(refusal(block.function, block.address, frame[2]), whole=True)
        elif frame[2] != block.size:
            return Heard(Trouble(Quality.GARBLED, f"{frame[2]} bytes of data instead of {block.size}"), whole=True)
        else:
            return Heard(frame[3:-2], whole=True)
    what = f"{len(data)} bytes are no answer: {data[:16].hex(' ')}"
    return foreign or Heard(Trouble(Quality.GARBLED, what), whole=False)


def intact(frame: bytes) -> bool:
    """Return whether a frame's checksum is right."""
    return FramerRTU.check_CRC(frame[:-2], int.from_bytes(frame[-2:], "big"))


class SerialLine:
    """A serial port with stations on it. Frames are kept apart by the silence that the standard asks for.

    What is heard and not used: `late_answer` (the answer to an earlier question), `echo` (our own question; said once).
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._port: serial.Serial | None = None
        self._free_s = 0.0  # when the line has been silent for long enough
        self._requests: dict[tuple[int, int, int, int], bytes] = {}
        self._framer = FramerRTU(DecodePDU(False))
        self._unanswered = Unanswered(config.timeout / 1000)
        self._troubles: dict[int, Trouble] = {}  # by unit, of the question that is open
        self._unused: list[tuple[str, str]] = []
        self._echoes = False

    def open(self) -> None:
        """Open the port, for us alone."""
        config = self._config
        self.close()
        self._port = open_port(config.port, config.baud, config.parity, config.stop_bits)
        self._free_s = monotonic_s() + config.gap_s
        self._unanswered = Unanswered(config.timeout / 1000)
        self._echoes = False

    def close(self) -> None:
        """Let go of the port."""
        port, self._port = self._port, None
        if port is not None:
            port.close()

    def unused(self) -> list[tuple[str, str]]:
        """Return what was heard since the last call and is no answer to what was asked."""
        found, self._unused = self._unused, []
        return found

    def ask(self, unit_id: int, block: Block) -> bytes | Trouble:
        """Read a block; once more where the answer is garbled and there is time for it within the time-out."""
        begun_s, until_s = monotonic_s(), float("inf")
        for _ in range(MOST_TRIES):
            asked = self._unanswered.distinct(unit_id, block, monotonic_s())
            if asked is None:  # nothing that can be asked now, and nothing new that is known
                return self._troubles[unit_id]
            found, until_s = self._read_block(unit_id, asked, until_s)
            if not isinstance(found, Trouble):
                return found[: block.size]
            garbled = found.quality is Quality.GARBLED and monotonic_s() - begun_s < self._config.timeout / 2000
            wider_refused = found.quality is Quality.REFUSED and asked is not block  # it has no more registers
            if not (garbled or wider_refused):
                break
        return found

    def _read_block(self, unit_id: int, block: Block, no_later_s: float) -> tuple[bytes | Trouble, float]:
        """Ask once; return what came, and when the wait for it would have ended."""
        fd = self._fd()
        wait_until_s(self._free_s)
        request = self._request(unit_id, block)
        sent_s = self._send(fd, request)
        answer_s = (ANSWER_BYTES + block.size) * self._config.char_s
        wait_s = REQUEST_BYTES * self._config.char_s + self._unanswered.timeout_s(unit_id) + answer_s
        until_s = min(sent_s + wait_s, no_later_s)
        return self._note(unit_id, block, self._listen(fd, unit_id, block, request, until_s), sent_s), until_s

    def _note(self, unit_id: int, block: Block, found: bytes | Trouble, sent_s: float) -> bytes | Trouble:
        """Remember whether an answer may still come; return what was found."""
        if not isinstance(found, Trouble):
            self._unanswered.answered(unit_id)
            return found
        if found.quality is not Quality.REFUSED:
            self._unanswered.timed_out(unit_id, block, sent_s)
        elif self._unanswered.refused(unit_id, block, sent_s) and self._unanswered.late(unit_id):
            found = self._nothing(unit_id)  # rather the late answer to something that it does not have
        self._troubles[unit_id] = found
        return found

    def _nothing(self, unit_id: int) -> Trouble:
        timeout = f"{self._config.timeout} ms"
        why = f"nothing {'but the echo of our question ' * self._echoes}within {timeout}"
        if self._unanswered.late(unit_id):
            why = f"it answers later than {timeout}: raise `timeout`"
        return Trouble(Quality.NO_ANSWER, f"unit {unit_id}: {why}")

    def _fd(self) -> int:
        if self._port is None:
            raise OSError(f"{self._config.port} is not open")
        return int(self._port.fileno())

    def _request(self, unit_id: int, block: Block) -> bytes:
        key = (unit_id, block.function, block.address, block.count)
        if key not in self._requests:
            request = REQUESTS[block.function](dev_id=unit_id, address=block.address, count=block.count)
            self._requests[key] = self._framer.buildFrame(request)
        return self._requests[key]

    def _send(self, fd: int, request: bytes) -> float:
        """Write the request, once the line is silent and what was heard meanwhile is out of the way; return when."""
        heard, until_s = b"", monotonic_s() + MOST_CHATTER_S
        while select.select([fd], [], [], HELD_BACK_S if heard else 0)[0] and monotonic_s() < until_s:
            heard += self._read(fd)
        if heard:
            self._without_late(heard)
        os.write(fd, request)
        return monotonic_s()

    def _read(self, fd: int) -> bytes:
        data = os.read(fd, 512)
        if not data:
            raise OSError(f"{self._config.port} is gone")
        return data

    def _listen(self, fd: int, unit_id: int, block: Block, request: bytes, until_s: float) -> bytes | Trouble:
        heard = b""
        told: bytes | Trouble | None = None
        while True:
            now_s = monotonic_s()
            garbled = isinstance(told, Trouble) and told.quality is Quality.GARBLED
            left_s = min(until_s - now_s, SILENCE_S if garbled else until_s - now_s)
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                self._free_s = monotonic_s() + self._config.gap_s
                return self._nothing(unit_id) if told is None else told
            heard = self._without_echo(heard + self._read(fd), request)
            heard = self._without_late(heard, unit_id)
            self._free_s = monotonic_s() + self._config.gap_s
            verdict = understand(heard, unit_id, block) if heard else None
            told = verdict.found if verdict is not None else None
            if verdict is not None and verdict.whole:
                return verdict.found

    def _without_echo(self, heard: bytes, request: bytes) -> bytes:
        """Return what was heard without our own question, which some adapters give back."""
        if request not in heard:
            return heard
        said, self._echoes = self._echoes, True
        what = "" if said else f"{self._config.port} gives back what it sends (a two-wire adapter with its receiver on)"
        self._unused.append(("echo", what))
        return heard.replace(request, b"", 1)

    def _without_late(self, heard: bytes, asked: int = 0) -> bytes:
        """Return what was heard without the late answers to earlier questions; what the unit refuses that was asked is
        for it to tell.
        """
        if not self._unanswered:
            return heard
        for start, frame in frames(heard):
            refused = bool(frame[1] & 0x80)
            if refused and frame[0] == asked:  # first things first: what is behind it counts for nothing
                return heard[: start + len(frame)]
            if self._unanswered.take(frame[0], frame[1] & 0x7F, None if refused else frame[2], monotonic_s()):
                what = f"unit {frame[0]} answers later than {self._config.timeout} ms: raise `timeout`"
                self._unused.append(("late_answer", what))
                return self._without_late(heard[:start] + heard[start + len(frame) :], asked)
        return heard


def make(name: str, config: Config) -> Bus:
    """Make the driver of one bus."""
    return Bus(name, SerialLine(config), config.devices_, config.maps, config.interval)

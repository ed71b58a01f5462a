"""JSON lines over serial or TCP, for whatever has no driver of its own: one object a line, told by the device.

    kit:
      driver: json_lines
      listen: 7070                # on loopback; or `connect: host:port`, or `port: /dev/ttyACM0` with `baud`
      devices: {probe: hyd-000123}
      metrics: {p: {metric: pressure_mpa, unit: kPa}}

A line is `{"d":"probe","t":1767225600123,"m":{"p":310}}`; `t` (Unix ms) may be left out.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import isfinite
from typing import Literal, Protocol

import msgspec
import serial

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from citybrain.units import CONVERSIONS, METRICS
from edge.driver import Host, Quality
from edge.serial_port import open_port

PROCESS = False
DEADLINE_S = 15.0
MOST_LINE_BYTES = 4096
LOOK_S = 0.2
CONNECT_S = 3.0
FIRST_REOPEN_S, MOST_REOPEN_S = 0.5, 5.0
GARBLED_TRIES = 3  # so many lines that are none, and no good one between: long before every device counts as silent
NOISE_BYTES = 16  # so many that stand in no JSON, or that come while a device is silent, and it is not understood
NOISE = bytes({*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF5, 0x100)} - set(b"\t\r\n"))  # controls, and no UTF-8


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name of the source is: a metric, in `unit` (the metric's own where empty), after scale and offset."""

    metric: str
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    lane: Literal["telemetry", "event"] = "telemetry"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}")
        own = METRICS[self.metric].unit
        if not (isfinite(self.scale) and isfinite(self.offset)) or self.scale == 0:
            raise ValueError(f"scale, offset: expected numbers, scale not 0, got {self.scale:g} and {self.offset:g}")
        if self.unit not in ("", own) and CONVERSIONS.get(self.unit, ("",))[0] != own:
            raise ValueError(f"unit: {self.metric} is in {own}, got {self.unit!r}")

    def of(self, raw: float) -> float:
        """Return a raw value in the metric's unit.

        >>> Value("pressure_mpa", "kPa").of(310)
        0.31
        """
        _, scale, offset = CONVERSIONS.get(self.unit, ("", 1.0, 0.0))
        return (raw * self.scale + self.offset) * scale + offset


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the lines come from (one of `listen`, `connect`, `port`), and what their names mean.

    devices: ours by theirs. metrics: by their names; a name that is a metric's own needs no entry. silence: a device
    that says nothing for so long does not answer.
    """

    devices_: dict[str, str] = msgspec.field(name="devices")
    listen: int | None = None
    connect: str = ""
    port: str = ""
    baud: int = 115_200
    metrics: dict[str, Value] = {}
    silence: Duration = Duration(600_000)

    def __post_init__(self) -> None:
        if (self.listen is not None) + bool(self.connect) + bool(self.port) != 1:
            raise ValueError("expected one of `listen`, `connect` and `port`")
        if self.listen is not None and not 1 <= self.listen <= 65535:
            raise ValueError(f"listen: expected 1 to 65535, got {self.listen}")
        host, _, port = self.connect.rpartition(":")
        if self.connect and not (host and port.isdecimal() and 1 <= int(port) <= 65535):
            raise ValueError(f"connect: expected host:port, got {self.connect!r}")
        if not 300 <= self.baud <= 4_000_000:
            raise ValueError(f"baud: expected 300 to 4000000, got {self.baud}")
        if not 100 <= self.silence <= 86_400_000:
            raise ValueError("silence: expected 100ms to 1d")
        if not self.devices_ or len(set(self.devices_.values())) < len(self.devices_):
            raise ValueError("devices: expected at least one, each of ours once")

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(self.devices_.values())

    @property
    def where(self) -> str:
        """Name the source, for a log."""
        return self.port or self.connect or f"port {self.listen}"


class Line(msgspec.Struct, frozen=True):
    """A line as it comes; unknown fields are ignored."""

    d: str
    m: dict[str, float]
    t: int | None = None


class Stream(Protocol):
    """Bytes from somewhere."""

    def fileno(self) -> int: ...

    def read_some(self) -> bytes:
        """Return what is there, empty at the end; raises OSError."""


class SerialStream:
    """A serial port."""

    def __init__(self, port: serial.Serial) -> None:
        self._port = port

    def fileno(self) -> int:
        return int(self._port.fileno())

    def read_some(self) -> bytes:
        return os.read(self.fileno(), 4096)


class SocketStream:
    """A connection."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def fileno(self) -> int:
        return self._socket.fileno()

    def read_some(self) -> bytes:
        return self._socket.recv(4096)


class Splitter:
    """Cuts bytes into lines; a line that is too long is thrown away up to its end."""

    def __init__(self) -> None:
        self._part = b""
        self._skipping = False

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        """Return the lines that are complete now, and how many were too long."""
        *whole, rest = (self._part + data).split(b"\n")
        long = sum(len(line) > MOST_LINE_BYTES for line in whole[self._skipping :])
        lines = [line for line in whole[self._skipping :] if len(line) <= MOST_LINE_BYTES]
        self._skipping = self._skipping and not whole
        if self._skipping:
            rest = b""
        elif len(rest) > MOST_LINE_BYTES:
            self._skipping, rest, long = True, b"", long + 1
        self._part = rest
        return lines, long

    def end(self) -> bytes:
        """Return what is left of a line that will not be finished."""
        part, self._part, self._skipping = self._part, b"", False
        return part


class Driver:
    """One source of lines."""

    def __init__(self, name: str, config: Config) -> None:
        self._name = name
        self._config = config
        self._last_s: dict[str, float] = {}  # when each device was heard last
        self._tries = self._rubbish = self._noise = (
            0  # lines that are none, bytes, and of these noise: since a good one
        )
        self._listener: socket.socket | None = None

    def run(self, host: Host) -> None:
        """Read until the host ends it; open the source anew where it goes away."""
        self._last_s = dict.fromkeys(self._config.devices(), host.mono_s())
        delay_s = 0.0
        try:
            while not host.wait(delay_s):
                why = self._once(host)
                if why is None:
                    return
                for device in self._config.devices():
                    host.quality(device, Quality.UNPLUGGED, why)
                listening = self._listener is not None
                delay_s = 0.0 if listening else min(max(2 * delay_s, FIRST_REOPEN_S), MOST_REOPEN_S)
        finally:
            if self._listener is not None:
                self._listener.close()

    def _once(self, host: Host) -> str | None:
        """Open the source and take its lines until it ends; return why it did, None where the host ended it."""
        try:
            with self._open(host) as stream:
                ended = stream is None or self._read(host, stream)
        except OSError as error:
            return str(error)
        return None if ended else f"{self._config.where} ended"

    def _open(self, host: Host) -> AbstractContextManager[Stream | None]:
        """Open the source; None where the host ended it meanwhile."""
        if self._config.port:
            return _serial(self._config.port, self._config.baud)
        if self._config.connect:
            return _connection(self._config.connect)
        return self._accepted(host)

    @contextmanager
    def _accepted(self, host: Host) -> Iterator[Stream | None]:
        if self._listener is None:
            self._listener = _listening(self._config.listen or 0)
        while not host.wait(0):
            self._judge_silence(host)
            self._refuse(host)
            if select.select([self._listener], [], [], LOOK_S)[0]:
                connected, _ = self._listener.accept()
                with connected:
                    yield SocketStream(connected)
                return
        yield None

    def _read(self, host: Host, stream: Stream) -> bool:
        """Take lines until the source ends; return whether the host ended it."""
        splitter = Splitter()
        try:
            while not host.wait(0):
                self._judge_silence(host)
                self._refuse(host)
                if not select.select([stream], [], [], LOOK_S)[0]:
                    continue
                data = stream.read_some()
                if not data:
                    return False
                lines, long = splitter.feed(data)
                self._rubbish += len(data)
                self._noise += len(data) - len(data.translate(None, NOISE))
                for line in lines:
                    self._take(host, line)
                if long:
                    self._tries += long
                    host.drop("line_too_long", long)
                self._judge_rubbish(host)
            return True
        finally:
            if part := splitter.end():
                host.drop("half_line", 1, _shown(part))

    def _refuse(self, host: Host) -> None:
        for request in host.requests():
            host.answer(request.id, ok=False, text=f"{self._name} tells by itself: it cannot be asked")

    def _judge_silence(self, host: Host) -> None:
        for device, last_s in self._last_s.items():
            if host.mono_s() - last_s > self._config.silence / 1000:
                silent = f"nothing for {self._config.silence / 1000:g} s"
                if self._rubbish >= NOISE_BYTES:
                    host.quality(device, Quality.GARBLED, self._no_lines())
                else:
                    host.quality(device, Quality.NO_ANSWER, silent)

    def _judge_rubbish(self, host: Host) -> None:
        if self._tries >= GARBLED_TRIES or self._noise >= NOISE_BYTES:
            for device in self._config.devices():
                host.quality(device, Quality.GARBLED, self._no_lines())

    def _no_lines(self) -> str:
        return "no JSON lines" + (f"; is {self._config.baud} baud right?" if self._config.port else "")

    def _take(self, host: Host, line: bytes) -> None:
        """Hand over one line's reading; count what is none."""
        text = line.strip()
        if not text:
            return None
        try:
            told = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._tries += 1
            return host.drop("no_json_line", 1, f"{error}: {_shown(text)}")
        self._tries = self._rubbish = self._noise = 0
        device = self._config.devices_.get(told.d)
        if device is None:
            return host.drop("unknown_device", 1, _shown(text))
        odd = self._hand_over(host, device, told)
        self._last_s[device] = host.mono_s()
        host.quality(device, Quality.IMPLAUSIBLE if odd else Quality.GOOD, odd)
        return None

    def _hand_over(self, host: Host, device: str, told: Line) -> str:
        """Hand over what is known and possible; return what is not possible."""
        at_ms = host.now_ms() if told.t is None else told.t
        values: dict[Lane, dict[str, float]] = {Lane.TELEMETRY: {}, Lane.EVENT: {}}
        odd = ""
        for name, raw in told.m.items():
            known = self._config.metrics.get(name) or (Value(name) if name in METRICS else None)
            if known is None:
                host.drop("unknown_metric", 1, f"{device}: {name!r}"[:80])
                continue
            value, metric = known.of(raw), METRICS[known.metric]
            if metric.low <= value <= metric.high:
                values[Lane.EVENT if known.lane == "event" else Lane.TELEMETRY][metric.name] = value
            else:
                odd = odd or f"{name}: {raw:g}"
        for lane, some in values.items():
            if some:
                host.put(lane, Reading(device, at_ms, some), own_time=told.t is not None)
        return odd


def _shown(line: bytes) -> str:
    return line[:40].decode("utf-8", "backslashreplace")


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        why = "is used by another program" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"port {port} {why}") from None


@contextmanager
def _serial(port: str, baud: int) -> Iterator[Stream]:
    with open_port(port, baud) as opened:
        yield SerialStream(opened)


@contextmanager
def _connection(where: str) -> Iterator[Stream]:
    host, _, port = where.rpartition(":")
    try:
        connected = socket.create_connection((host, int(port)), CONNECT_S)
    except OSError as error:
        raise OSError(f"{where}: {error.strerror or error}") from None
    with connected:
        connected.settimeout(None)
        yield SocketStream(connected)


def make(name: str, config: Config) -> Driver:
    """Make the driver of one source."""
    return Driver(name, config)

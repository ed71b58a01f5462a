"""A serial line on which stations send frames by themselves: opened and reopened, listened to, judged.

What all drivers of such a line share. The driver only says what a good frame means.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from citybrain.config import Duration
from edge.driver import Host, Quality
from edge.frames import Deframer, Frame, Heard, Succession
from edge.serial_port import open_port

LOOK_S = 0.2
SILENCE_S = 0.05  # a frame that stops so long is over: USB adapters hold bytes back for 16 ms
FIRST_REOPEN_S, MOST_REOPEN_S = 0.5, 5.0
MOST_READ = 4096
GARBLED_TRIES, GARBLED_BYTES = 3, 256  # so many damaged frames, or so much noise, with no good frame between
FINE = (Quality.GOOD, "")

Verdict = tuple[Quality, str]


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A serial port: its path, speed and parity, and after how long without a frame a station does not answer."""

    port: str
    baud: int = 115_200
    parity: Literal["N", "E", "O"] = "N"
    silence: Duration = Duration(10_000)

    def check(self, devices: Sequence[str], stations: Sequence[int]) -> None:
        """Raise ValueError where the port, the devices or the stations' numbers are none."""
        if not 300 <= self.baud <= 4_000_000:
            raise ValueError(f"baud: expected 300 to 4000000, got {self.baud}")
        if not 100 <= self.silence <= 3_600_000:
            raise ValueError("silence: expected 100ms to 1h")
        if not devices or not all(devices):
            raise ValueError("devices: expected at least one, each with a name")
        for name in devices:
            if devices.count(name) > 1:
                raise ValueError(f"devices: device {name!r} stands there twice")
        for number, station in enumerate(stations):
            if not 0 <= station <= 255:
                raise ValueError(f"devices[{number}] station: expected 0 to 255, got {station}")


class Listener(Protocol):
    """What a driver does with its line."""

    def begin(self, host: Host) -> None:
        """The line was opened: what was known of it before may be wrong."""

    def take(self, host: Host, frame: Frame, missed: int) -> Verdict:
        """Use a frame that is whole and new, behind so many that did not come; return what it says of its station."""

    def tick(self, host: Host) -> None:
        """Do what is due, several times a second."""


class FrameLine:
    """One line. devices: what hangs on each station; most: the longest payload."""

    def __init__(self, name: str, port: Port, devices: Mapping[int, Sequence[str]], most: int) -> None:
        self._name = name
        self._port = port
        self._devices = devices
        self._most = most
        self._deframer = Deframer(most)
        self._successions = {station: Succession() for station in devices}
        self._last_s: dict[int, float] = {}
        self._said: dict[int, Quality] = {}
        self._rubbish = self._tries = 0  # bytes and damaged frames since the last good frame
        self._rubbish_s = 0.0  # when the last of them came

    def run(self, host: Host, listener: Listener) -> None:
        """Listen until the host ends it; open the port anew where it goes away."""
        delay_s = 0.0
        while not host.wait(delay_s):
            try:
                with open_port(self._port.port, self._port.baud, self._port.parity) as opened:
                    delay_s = FIRST_REOPEN_S
                    self._begin(host)
                    listener.begin(host)
                    self._listen(host, listener, int(opened.fileno()))
            except OSError as error:
                for station in self._devices:
                    self._say(host, station, (Quality.UNPLUGGED, str(error)))
                self._refuse(host)
                delay_s = min(2 * delay_s, MOST_REOPEN_S) if delay_s else FIRST_REOPEN_S
            else:
                return

    def _begin(self, host: Host) -> None:
        self._deframer = Deframer(self._most)
        self._successions = {station: Succession() for station in self._devices}
        self._last_s = dict.fromkeys(self._devices, host.mono_s())
        self._said = {}
        self._rubbish = self._tries = 0

    def _listen(self, host: Host, listener: Listener, fd: int) -> None:
        patience_s = LOOK_S
        while not host.wait(0):
            self._refuse(host)
            if select.select([fd], [], [], patience_s)[0]:
                data = os.read(fd, MOST_READ)
                if not data:
                    raise OSError(f"{self._port.port} is gone")
                heard, patience_s = self._deframer.feed(data), SILENCE_S
            else:
                heard, patience_s = self._deframer.rest(), LOOK_S
            self._take(host, listener, heard)
            self._judge(host)
            listener.tick(host)

    def _refuse(self, host: Host) -> None:
        for request in host.requests():
            host.answer(request.id, ok=False, text=f"{self._name} tells by itself: it cannot be asked")

    def _take(self, host: Host, listener: Listener, heard: Heard) -> None:
        if heard.noise:
            host.drop("noise_bytes", heard.noise)
        if heard.spoilt:
            host.drop("bad_checksum", heard.spoilt)
        if heard.half:
            host.drop("half_frame", heard.half)
        if heard.noise:
            self._rubbish_s = host.mono_s()
        self._rubbish += heard.noise
        self._tries += heard.spoilt + heard.half
        for frame in heard.frames:
            self._use(host, listener, frame)

    def _use(self, host: Host, listener: Listener, frame: Frame) -> None:
        self._rubbish = self._tries = 0
        succession = self._successions.get(frame.station)
        if succession is None:
            return host.drop("unknown_station", 1, f"station {frame.station}, type {frame.type}")
        self._last_s[frame.station] = host.mono_s()
        if succession.repeated(frame):
            return host.drop("repeated_frame", 1)
        missed = succession.missed(frame)
        if missed:
            host.drop("missed_frame", missed)
        self._say(host, frame.station, listener.take(host, frame, missed))
        return None

    def _judge(self, host: Host) -> None:
        """Say of which stations nothing is heard, or nothing that can be used."""
        silence_s = self._port.silence / 1000
        garbled = self._tries >= GARBLED_TRIES or self._rubbish >= GARBLED_BYTES
        garbled = garbled and host.mono_s() - self._rubbish_s <= silence_s
        for station, last_s in self._last_s.items():
            if garbled:
                self._say(
                    host, station, (Quality.GARBLED, f"noise instead of frames; is {self._port.baud} baud right?")
                )
            elif host.mono_s() - last_s > silence_s:
                self._say(host, station, (Quality.NO_ANSWER, f"nothing for {silence_s:g} s"))

    def _say(self, host: Host, station: int, verdict: Verdict) -> None:
        if self._said.get(station) is verdict[0]:
            return
        self._said[station] = verdict[0]
        for device in self._devices[station]:
            host.quality(device, *verdict)

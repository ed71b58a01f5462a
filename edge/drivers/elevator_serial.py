"""Lift controllers that tell their state and codes over a serial line, one or several cars on each.

    lifts:
      driver: elevator_serial
      port: /dev/ttyUSB0
      baud: 9600
      region: regional_93
      devices:
        - {device: lift-000017, station: 1}

The frame is that of `edge.frames`; what is in it differs by region (`edge.lifts.controllers`).
"""

from __future__ import annotations

import msgspec

from citybrain.config import Duration
from edge.driver import Host, Quality
from edge.frame_line import FINE, FrameLine, Port, Verdict
from edge.frames import Frame
from edge.lifts.controllers import ADAPTERS, Car, RunState, Said, car

PROCESS = False
DEADLINE_S = 15.0
MOST_PAYLOAD = 16
ODD_FOR_S = 600.0  # one code that nobody knows is worth a look for that long


class Seat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One car: our name of it and its station on the line."""

    device: str
    station: int


class Config(Port, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of cars. region: whose payloads and codes they speak; `telemetry_every`, `events_every`: how often is told
    what has not changed."""

    region: str
    devices_: tuple[Seat, ...] = msgspec.field(name="devices")
    baud: int = 9600
    telemetry_every: Duration = Duration(60_000)
    events_every: Duration = Duration(600_000)

    def __post_init__(self) -> None:
        self.check([one.device for one in self.devices_], [one.station for one in self.devices_])
        stations = [one.station for one in self.devices_]
        if len(set(stations)) < len(stations):
            raise ValueError("devices: a station stands there twice")
        if self.region not in ADAPTERS:
            raise ValueError(f"region: {self.region!r} is none of {', '.join(sorted(ADAPTERS))}")
        if self.telemetry_every <= 0 or self.events_every <= 0:
            raise ValueError("telemetry_every, events_every: expected more than 0")

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(one.device for one in self.devices_)


class Driver:
    """One line."""

    def __init__(self, name: str, config: Config) -> None:
        self._config = config
        self._adapter = ADAPTERS[config.region]()
        self._line = FrameLine(name, config, {one.station: (one.device,) for one in config.devices_}, MOST_PAYLOAD)
        self._cars: dict[int, Car] = {}
        self._odd: dict[int, tuple[float, str]] = {}  # by station, until when, and what

    def run(self, host: Host) -> None:
        """Listen until the host ends it."""
        self._line.run(host, self)

    def begin(self, host: Host) -> None:
        """Know nothing of the cars: what changed while nobody listened is told again."""
        every = self._config.telemetry_every, self._config.events_every
        self._cars = {one.station: car(one.device, self._adapter, *every) for one in self._config.devices_}
        self._odd = {}

    def take(self, host: Host, frame: Frame, missed: int) -> Verdict:
        """Use a frame; what the region's table does not know is counted, and makes the car odd for a while."""
        known = self._cars[frame.station]
        try:
            told = self._adapter.read(frame)
        except ValueError as error:
            host.drop("bad_payload", 1, f"station {frame.station}: {error}")
            return Quality.IMPLAUSIBLE, f"{error}: is region {self._config.region} right?"
        at_ms = host.now_ms()
        _put(host, known.state(told, at_ms) if isinstance(told, RunState) else known.occurrence(told, at_ms))
        if odd := known.odd(told):
            host.drop("unknown_code", 1, f"station {frame.station}: {odd}")
            self._odd[frame.station] = (host.mono_s() + ODD_FOR_S, odd)
        until_s, why = self._odd.get(frame.station, (0.0, ""))
        return (Quality.IMPLAUSIBLE, why) if host.mono_s() < until_s else FINE

    def tick(self, host: Host) -> None:
        """Tell what was held back."""
        for known in self._cars.values():
            _put(host, known.tick(host.now_ms()))


def _put(host: Host, said: Said) -> None:
    for lane, reading in said:
        host.put(lane, reading)


def make(name: str, config: Config) -> Driver:
    """Make the driver of one line."""
    return Driver(name, config)

"""Pressure at 50 Hz and more over a serial line: lowest, highest, mean of each interval, and water hammer at once.

mains:
  driver: pressure_fast
  port: /dev/ttyUSB0
  rate_hz: 100
  devices:
    - {device: hyd-000123, station: 1, low_mpa: 0, high_mpa: 1.6}
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import msgspec

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.driver import Host, Quality
from edge.drivers import need
from edge.frame_line import FINE, FrameLine, Port, Verdict
from edge.frames import MOST_PAYLOAD, Frame
from edge.signals.hammer import Hammer

if TYPE_CHECKING:
    from edge.signals.raw import Block, Raw, Window

PROCESS = True
DEADLINE_S = 15.0
RAW_PRESSURE = 19  # frame type
FULL_SCALE = 32767
MOST_SAMPLES = 1 << 17


class Sensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One transmitter: our name of it, its station, and which pressures its raw values 0 and 32767 are."""

    device: str
    station: int
    low_mpa: float = 0.0
    high_mpa: float = 1.6


class Config(Port, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of transmitters with one rate. hammer_mpa: the least swing that counts; hammer_back: within what time it
    is over; most_missing: the share of an interval that may be missing."""

    devices_: tuple[Sensor, ...] = msgspec.field(name="devices")
    rate_hz: float
    interval: Duration = Duration(10_000)
    hammer_mpa: float = 0.1
    hammer_back: Duration = Duration(1000)
    most_missing: float = 0.05

    def __post_init__(self) -> None:
        need("numpy", "numpy")
        stations = [one.station for one in self.devices_]
        self.check([one.device for one in self.devices_], stations)
        if len(set(stations)) < len(stations):
            raise ValueError("devices: a station stands there twice")
        if not (isfinite(self.rate_hz) and 50 <= self.rate_hz <= 5000):
            raise ValueError(f"rate_hz: expected 50 to 5000, got {self.rate_hz}")
        if not self.rate_hz <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"interval: expected at least 1s and {MOST_SAMPLES} samples, got {self.samples}")
        if not (isfinite(self.hammer_mpa) and self.hammer_mpa > 0):
            raise ValueError(f"hammer_mpa: expected more than 0, got {self.hammer_mpa}")
        if not 50 <= self.hammer_back <= 5000:
            raise ValueError("hammer_back: expected 50ms to 5s")
        if not 0 <= self.most_missing <= 0.5:
            raise ValueError(f"most_missing: expected 0 to 0.5, got {self.most_missing}")
        for number, one in enumerate(self.devices_):
            if not -0.1 <= one.low_mpa < one.high_mpa <= 5:
                raise ValueError(f"devices[{number}]: expected -0.1 <= low_mpa < high_mpa <= 5")

    @property
    def samples(self) -> int:
        """Of one interval."""
        return round(self.rate_hz * self.interval / 1000)

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(one.device for one in self.devices_)


class Seat:
    """What is known of one transmitter."""

    def __init__(self, sensor: Sensor, config: Config, raw: Raw) -> None:
        self.sensor = sensor
        self.raw = raw
        self.hammer = Hammer(config.rate_hz, config.hammer_mpa, config.hammer_back / 1000)
        self.counted = 0  # strokes that were told with an interval
        self.told = False  # whether anything of strokes was told since the start
        self.verdict: Verdict = FINE

    def mpa(self, raw: float) -> float:
        """Return a raw value's pressure."""
        return self.sensor.low_mpa + raw / FULL_SCALE * (self.sensor.high_mpa - self.sensor.low_mpa)


class Driver:
    """One line."""

    def __init__(self, name: str, config: Config) -> None:
        self._config = config
        self._line = FrameLine(name, config, {one.station: (one.device,) for one in config.devices_}, MOST_PAYLOAD)
        self._seats: dict[int, Seat] = {}

    def run(self, host: Host) -> None:
        """Listen until the host ends it."""
        self._line.run(host, self)

    def begin(self, host: Host) -> None:
        """Begin all intervals anew."""
        from edge.signals.raw import Raw  # noqa: PLC0415  (numpy: only where the driver runs)

        self._seats = {one.station: Seat(one, self._config, Raw(self._config.samples)) for one in self._config.devices_}

    def take(self, host: Host, frame: Frame, missed: int) -> Verdict:
        """Take samples: tell strokes at once, and what a full interval says."""
        from edge.signals.raw import decode  # noqa: PLC0415

        seat = self._seats[frame.station]
        if frame.type != RAW_PRESSURE:
            host.drop("bad_payload", 1, f"station {frame.station}: type {frame.type}")
            return Quality.IMPLAUSIBLE, f"frame type {frame.type} is none of a fast transmitter"
        try:
            block = decode(frame.payload, 1)
        except ValueError as error:
            host.drop("bad_payload", 1, f"station {frame.station}: {error}")
            return Quality.IMPLAUSIBLE, str(error)
        self._strike(host, seat, block)
        for window in seat.raw.take(block, host.mono_s()):
            seat.verdict = self._tell(host, seat, window)
        return seat.verdict

    def _strike(self, host: Host, seat: Seat, block: Block) -> None:
        raw, hammer = block.samples[:, 0], seat.hammer
        if seat.raw.gap(block) or raw.min() < 0 or raw.max() >= FULL_SCALE:
            if hammer.forget():
                host.put(Lane.EVENT, Reading(seat.sensor.device, host.now_ms(), {"hammer_mpa": 0.0}))
            return
        low_mpa, high_mpa = seat.mpa(float(raw.min())), seat.mpa(float(raw.max()))
        if hammer.within(low_mpa, high_mpa):
            hammer.settle(seat.mpa(float(raw.mean())), len(raw))
            return
        now_ms = host.now_ms()
        for stroke in hammer.take([seat.mpa(value) for value in raw.tolist()]):
            at_ms = now_ms - round((len(raw) - 1 - stroke.place) / self._config.rate_hz * 1000)
            host.put(Lane.EVENT, Reading(seat.sensor.device, at_ms, {"hammer_mpa": stroke.amplitude_mpa}))

    def _tell(self, host: Host, seat: Seat, window: Window) -> Verdict:
        config, device = self._config, seat.sensor.device
        raw = window.samples[:, 0]
        possible = raw[(raw >= 0) & (raw < FULL_SCALE)]
        impossible = len(raw) - len(possible)
        if window.missing:
            host.drop("missing_samples", window.missing)
        if impossible:
            host.drop("impossible_samples", impossible)
        if window.missing + impossible > config.most_missing * config.samples:
            host.drop("incomplete_window", 1, f"{device}: {window.missing} missing, {impossible} impossible")
            if impossible > window.missing:
                return Quality.IMPLAUSIBLE, f"{impossible} of {config.samples} samples are out of the sensor's range"
            return Quality.GARBLED, f"{window.missing} of {config.samples} samples are missing"
        strokes, seat.counted = seat.hammer.strokes - seat.counted, seat.hammer.strokes
        values = {
            "pressure_mpa": seat.mpa(float(possible.mean())),
            "pressure_min_mpa": seat.mpa(float(possible.min())),
            "pressure_max_mpa": seat.mpa(float(possible.max())),
            "hammer_count": float(strokes),
        }
        host.put(Lane.TELEMETRY, Reading(device, host.now_ms(), values))
        if not seat.told and seat.hammer.calm:  # the end of a stroke may have fallen into a restart
            seat.told = True
            host.put(Lane.EVENT, Reading(device, host.now_ms(), {"hammer_mpa": 0.0}))
        return FINE

    def tick(self, host: Host) -> None:
        """Nothing is due by itself."""


def make(name: str, config: Config) -> Driver:
    """Make the driver of one line."""
    return Driver(name, config)

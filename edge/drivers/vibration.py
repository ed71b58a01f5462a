"""Raw acceleration over a serial line, made into a few numbers a window: RMS, A95, crest, kurtosis, bands.

bearing:
  driver: vibration
  port: /dev/ttyUSB0
  baud: 230400
  rate_hz: 1000
  full_scale_g: 4
  devices:
    - {device: pump-000003, station: 1, bands_hz: [[2, 20], [20, 100], [100, 300], [300, 500]]}
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Literal

import msgspec

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.driver import Host, Quality
from edge.drivers import need
from edge.frame_line import FINE, FrameLine, Port, Verdict
from edge.frames import MOST_PAYLOAD, Frame

if TYPE_CHECKING:
    from edge.signals.raw import Raw, Window

PROCESS = True
DEADLINE_S = 15.0
RAW_AXES = 18  # frame type
MOST_BANDS = 4
MOST_CLIPPED = 0.001  # of a window
RATE_OFF = 0.05  # between the configured rate and the one that comes
LEAST_SAMPLES, MOST_SAMPLES = 64, 1 << 17


class Sensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accelerometer: our name of it, its station, which of its axes count, and up to four bands in Hz."""

    device: str
    station: int
    axes: Literal["x", "y", "z", "xy", "xz", "yz", "xyz"] = "xyz"
    bands_hz: tuple[tuple[float, float], ...] = ()


class Config(Port, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of accelerometers that have one rate and range. most_missing: the share of a window that may be."""

    devices_: tuple[Sensor, ...] = msgspec.field(name="devices")
    rate_hz: float
    full_scale_g: float
    window: Duration = Duration(10_000)
    most_missing: float = 0.05

    def __post_init__(self) -> None:
        need("numpy", "numpy")
        self.check([one.device for one in self.devices_], [one.station for one in self.devices_])
        if not (isfinite(self.rate_hz) and 10 <= self.rate_hz <= 20_000):
            raise ValueError(f"rate_hz: expected 10 to 20000, got {self.rate_hz}")
        if not (isfinite(self.full_scale_g) and 0 < self.full_scale_g <= 500):
            raise ValueError(f"full_scale_g: expected up to 500, got {self.full_scale_g}")
        if not LEAST_SAMPLES <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"window: expected {LEAST_SAMPLES} to {MOST_SAMPLES} samples, got {self.samples}")
        if not 0 <= self.most_missing <= 0.5:
            raise ValueError(f"most_missing: expected 0 to 0.5, got {self.most_missing}")
        for number, sensor in enumerate(self.devices_):
            self._check_bands(f"devices[{number}] bands_hz", sensor.bands_hz)

    def _check_bands(self, where: str, bands: Sequence[tuple[float, float]]) -> None:
        if len(bands) > MOST_BANDS:
            raise ValueError(f"{where}: expected at most {MOST_BANDS}, got {len(bands)}")
        for low, high in bands:
            if not 0 <= low < high <= self.rate_hz / 2:
                raise ValueError(f"{where}: expected low < high up to {self.rate_hz / 2:g}, got {low:g} to {high:g}")

    @property
    def samples(self) -> int:
        """Of one window."""
        return round(self.rate_hz * self.window / 1000)

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(one.device for one in self.devices_)


class Driver:
    """One line."""

    def __init__(self, name: str, config: Config) -> None:
        self._config = config
        stations: dict[int, list[str]] = {}
        for one in config.devices_:
            stations.setdefault(one.station, []).append(one.device)
        self._line = FrameLine(name, config, stations, MOST_PAYLOAD)
        self._raw: dict[int, Raw] = {}
        self._verdicts: dict[int, Verdict] = {}

    def run(self, host: Host) -> None:
        """Listen until the host ends it."""
        self._line.run(host, self)

    def begin(self, host: Host) -> None:
        """Begin a window anew."""
        from edge.signals.raw import Raw  # noqa: PLC0415  (numpy: only where the driver runs)

        config = self._config
        self._raw = {one.station: Raw(config.samples) for one in config.devices_}
        self._verdicts = {}

    def take(self, host: Host, frame: Frame, missed: int) -> Verdict:
        """Take samples; tell what a full window says."""
        from edge.signals.raw import decode  # noqa: PLC0415

        if frame.type != RAW_AXES:
            host.drop("bad_payload", 1, f"station {frame.station}: type {frame.type}")
            return Quality.IMPLAUSIBLE, f"frame type {frame.type} is none of an accelerometer"
        try:
            windows = self._raw[frame.station].take(decode(frame.payload, 3), host.mono_s())
        except ValueError as error:
            host.drop("bad_payload", 1, f"station {frame.station}: {error}")
            return Quality.IMPLAUSIBLE, str(error)
        for window in windows:
            self._verdicts[frame.station] = self._tell(host, frame.station, window)
        return self._verdicts.get(frame.station, FINE)

    def _tell(self, host: Host, station: int, window: Window) -> Verdict:
        config = self._config
        if window.missing:
            host.drop("missing_samples", window.missing)
        if window.missing > config.most_missing * config.samples:
            host.drop(
                "incomplete_window", 1, f"station {station}: {window.missing} of {config.samples} samples missing"
            )
            return Quality.GARBLED, f"{window.missing} of {config.samples} samples are missing"
        clipped, at_ms = 0.0, host.now_ms()
        for sensor in config.devices_:
            if sensor.station == station:
                values, share = measured(window, sensor, config)
                host.put(Lane.TELEMETRY, Reading(sensor.device, at_ms, values))
                clipped = max(clipped, share)
        if clipped > MOST_CLIPPED:
            return Quality.IMPLAUSIBLE, f"{clipped:.1%} of the samples are beyond {config.full_scale_g:g} g"
        if window.rate_hz is not None and abs(window.rate_hz / config.rate_hz - 1) > RATE_OFF:
            return Quality.IMPLAUSIBLE, f"{window.rate_hz:.0f} samples/s come instead of {config.rate_hz:g}"
        return FINE

    def tick(self, host: Host) -> None:
        """Nothing is due by itself."""


def measured(window: Window, sensor: Sensor, config: Config) -> tuple[dict[str, float], float]:
    """Return what a window says of a sensor, and the share of its samples that are clipped.

    RMS and bands are of all its axes together, the rest is of the axis where it is worst. A95 and bands need a whole
    window and are left out where samples are missing.
    """
    from edge.signals import features  # noqa: PLC0415  (numpy: only where the driver runs)

    scale = config.full_scale_g / 32768
    axes = [window.samples[:, "xyz".index(axis)] * scale for axis in sensor.axes]
    clipped = max(features.clipped_share(axis, config.full_scale_g * 32767 / 32768) for axis in axes)
    values = {
        "vibration_rms_g": sum(features.rms(axis) ** 2 for axis in axes) ** 0.5,
        "vibration_pp_g": max(features.peak_to_peak(axis) for axis in axes),
    }
    crests = [one for axis in axes if (one := features.crest(axis)) is not None]
    kurtoses = [one for axis in axes if (one := features.kurtosis(axis)) is not None]
    a95s = [one for axis in axes if not window.missing and (one := features.a95(axis)) is not None]
    for name, found in (("crest", crests), ("kurtosis", kurtoses), ("a95_g", a95s)):
        if found:
            values[f"vibration_{name}"] = max(found)
    if not window.missing and sensor.bands_hz:
        bands = [features.band_rms(axis, config.rate_hz, sensor.bands_hz) for axis in axes]
        for number, of_axes in enumerate(zip(*bands, strict=True), 1):
            values[f"vibration_band_{number}_g"] = sum(one**2 for one in of_axes) ** 0.5
    return values, clipped


def make(name: str, config: Config) -> Driver:
    """Make the driver of one line."""
    return Driver(name, config)

"""What goes up: report by exception, at least every heartbeat; pure.

A metric is told when it is new, left its deadband around what was told last, or was not told for a heartbeat. What is
left out is nothing but a repetition, counted `unchanged_total`.
"""

from __future__ import annotations

from collections.abc import Container
from math import isfinite

import msgspec

from citybrain.config import Duration
from citybrain.model import Reading
from citybrain.units import METRICS


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a driver's telemetry is told: `deadband` by metric in its unit; any change where none is given.

    >>> Report(Duration(300_000), {"pressure_mpa": 0.005}).deadband["pressure_mpa"]
    0.005
    """

    heartbeat: Duration
    deadband: dict[str, float] = {}

    def __post_init__(self) -> None:
        if self.heartbeat <= 0:
            raise ValueError("heartbeat: expected more than 0")
        for name, band in self.deadband.items():
            if name not in METRICS:
                raise ValueError(f"deadband: unknown metric {name!r}")
            if not (isfinite(band) and band >= 0):
                raise ValueError(f"deadband of {name}: expected 0 or more, got {band}")


class Reporter:
    """Remembers what was told last of each series; one for a driver."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def moved(self, by_ms: int, own_time: Container[str] = ()) -> None:
        """The clock was moved: a heartbeat is as long as before. own_time: devices whose time is their own."""
        self._told = {key: (value, at + by_ms * (key[0] not in own_time)) for key, (value, at) in self._told.items()}

    def filter(self, reading: Reading) -> Reading | None:
        """Return what of a reading is to be told, with its own time; None where that is nothing.

        A reading older than what was told last is told: only the receiver knows what it has.
        """
        due = {name: value for name, value in reading.values.items() if self._due(reading, name, value)}
        for name, value in due.items():
            self._told[reading.device, name] = (value, reading.observed_at)
        if len(due) == len(reading.values):
            return reading
        return Reading(reading.device, reading.observed_at, due) if due else None

    def _due(self, reading: Reading, name: str, value: float) -> bool:
        told = self._told.get((reading.device, name))
        if told is None or not 0 <= reading.observed_at - told[1] < self._report.heartbeat:
            return True
        return abs(value - told[0]) > self._report.deadband.get(name, 0.0)

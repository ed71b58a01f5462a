"""Local limits: a value beyond one, long enough, is an event of its own, without the platform; pure.

The event is `local_alarm` with the limit's code; 0 says that the device is within all its limits again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import isfinite

import msgspec

from citybrain.config import Duration
from citybrain.model import Reading
from citybrain.units import METRICS

METRIC = "local_alarm"


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"hold": "for"}):
    """One limit of a metric, in its unit: `below` or `above`, for as long as `for`; it ends `deadband` inside.

    device: only this one, all of the driver's where empty. code: 1–999, a driver's limits have one each.
    """

    metric: str
    code: int
    below: float | None = None
    above: float | None = None
    deadband: float = 0.0
    hold: Duration = Duration(0)
    device: str = ""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}")
        given = [bound for bound in (self.below, self.above) if bound is not None]
        if len(given) != 1 or not isfinite(given[0]):
            raise ValueError("expected one of `below` and `above`")
        if not (isfinite(self.deadband) and self.deadband >= 0):
            raise ValueError(f"deadband: expected 0 or more, got {self.deadband}")
        if not 1 <= self.code <= 999:
            raise ValueError(f"code: expected 1 to 999, got {self.code}")

    def beyond(self, value: float, *, active: bool) -> bool:
        """Return whether a value is beyond it; an active limit ends only `deadband` inside.

        >>> limit = Limit("pressure_mpa", 1, below=0.14, deadband=0.005)
        >>> limit.beyond(0.142, active=False), limit.beyond(0.142, active=True), limit.beyond(0.146, active=True)
        (False, True, False)
        """
        slack = self.deadband if active else 0.0
        if self.below is not None:
            return value < self.below + slack
        return self.above is not None and value > self.above - slack


class Limits:
    """Judges readings by a driver's limits; remembers since when each is beyond, and what was told of each device."""

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limits = limits
        self._since: dict[tuple[int, str], int] = {}
        self._active: dict[str, list[int]] = {}  # codes by device, the latest last
        self._told: dict[str, int] = {}

    def moved(self, by_ms: int, own_time: Container[str] = ()) -> None:
        """The clock was moved: no limit has been passed for longer, or less long, because of it.

        own_time: devices whose time is their own.
        """
        self._since = {key: at + by_ms * (key[1] not in own_time) for key, at in self._since.items()}

    def judge(self, reading: Reading) -> Reading | None:
        """Return the event that a reading makes, at its own time; None where nothing changed.

        The first judgement of a device is always told: after a restart nobody here knows what was told before.
        """
        applying = [one for one in self._limits if one.metric in reading.values and one.device in ("", reading.device)]
        if not applying:
            return None
        active = self._active.setdefault(reading.device, [])
        waiting = [limit for limit in applying if self._step(limit, reading, active)]
        code = active[-1] if active else 0
        if self._told.get(reading.device, -1) == code or (waiting and not active and reading.device not in self._told):
            return None
        self._told[reading.device] = code
        return Reading(reading.device, reading.observed_at, {METRIC: float(code)})

    def _step(self, limit: Limit, reading: Reading, active: list[int]) -> bool:
        """Move one limit on; return whether its value is beyond, and not for long enough yet."""
        key, at_ms = (limit.code, reading.device), reading.observed_at
        if not limit.beyond(reading.values[limit.metric], active=limit.code in active):
            self._since.pop(key, None)
            if limit.code in active:
                active.remove(limit.code)
            return False
        since_ms = self._since.setdefault(key, at_ms)
        if at_ms < since_ms:  # the clock was set back
            since_ms = self._since[key] = at_ms
        if limit.code not in active and at_ms - since_ms >= limit.hold:
            active.append(limit.code)
        return limit.code not in active

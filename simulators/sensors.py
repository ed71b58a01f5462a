"""What is wired to one gateway: a source of readings for `edge.agent`, with the faults of real reporting.

Sensors miss reports and repeat some (`simulators.water`, `simulators.elevators`); here the gateway's clock is wrong by
a little, and a process that was down goes on from now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from citybrain.clock import MINUTE_MS, SECOND_MS, Clock
from citybrain.model import Lane, Reading
from citybrain.storage import OS_FILES
from simulators.district import District
from simulators.elevators import Lift
from simulators.faults import Schedule
from simulators.noise import Noise
from simulators.water import Emitted, Hydrant

FAST_GATEWAY, FAST_MS = "gw-04", 3000
SKEW_MS = 400  # the others are wrong by at most this, either way
CATCH_UP_MS = MINUTE_MS  # a shorter interruption leaves no hole
LEAST_MS = 200  # asked more often than this, there is nothing new
VITALS_MS = 10 * SECOND_MS


def skew_ms(seed: int, gateway: str) -> int:
    """Return by how much a gateway's clock is ahead, in ms."""
    if gateway == FAST_GATEWAY:
        return FAST_MS
    return round(SKEW_MS * (2.0 * Noise(seed, f"{gateway}/clock").uniform(0) - 1.0))


class SkewedClock:
    """A gateway's clock: the run's, and a little."""

    def __init__(self, clock: Clock, ahead_ms: int) -> None:
        self._clock = clock
        self._ahead_ms = ahead_ms

    def now_ms(self) -> int:
        return self._clock.now_ms() + self._ahead_ms


class Sensors:
    """The devices behind one gateway, as an `edge.agent.Source`; `poll` is given the gateway's own (skewed) time.

    `mark` names a file that keeps how far the readings went, written before they are handed out: a process that was
    killed may leave a hole, and never says anything twice.
    """

    def __init__(self, district: District, gateway: str, schedule: Schedule, mark: Path | None = None) -> None:
        self.gateway = gateway
        self.skew_ms = skew_ms(district.seed, gateway)
        self._schedule = schedule
        self._mark = mark
        self._until_ms = OS_FILES.marked(mark) if mark is not None else 0
        self._things: list[tuple[str, Hydrant | Lift]] = [
            (name, _thing(district, name)) for name in district.of_gateway(gateway)
        ]

    def poll(self, now_ms: int) -> list[Emitted]:
        """Return the readings since the last call, in order of their time."""
        to_ms = now_ms - self.skew_ms
        if self._until_ms <= 0 or to_ms - self._until_ms > CATCH_UP_MS:
            self._reach(to_ms)
            return self.power_up(to_ms)
        if to_ms - self._until_ms < LEAST_MS:  # also where the clock was put back: wait until it is past
            return []
        from_ms = self._until_ms
        self._reach(to_ms)
        return self.between(from_ms, to_ms)

    def _reach(self, to_ms: int) -> None:
        self._until_ms = to_ms
        if self._mark is not None:
            OS_FILES.mark(self._mark, to_ms)

    def power_up(self, at_ms: int) -> list[Emitted]:
        """Return every device's event values as they stand: what changed while nobody listened is said again."""
        self._schedule.advance(at_ms)
        return [
            _shifted(thing.standing(at_ms, self._schedule.touching(name)), self.skew_ms) for name, thing in self._things
        ]

    def between(self, from_ms: int, to_ms: int) -> list[Emitted]:
        """Return the readings of [from, to) in true time, stamped by the gateway's clock."""
        self._schedule.advance(to_ms)
        found: list[Emitted] = []
        for name, thing in self._things:
            found += thing.reports(from_ms, to_ms, self._schedule.touching(name))
        found.sort(key=_observed)
        return found if self.skew_ms == 0 else [_shifted(item, self.skew_ms) for item in found]


def _thing(district: District, name: str) -> Hydrant | Lift:
    device = district.devices[name]
    if device.kind == "hydrant":
        near_m = {other: district.distance_m(name, other) for other in district.zones[device.zone]}
        return Hydrant(district.seed, device, near_m)
    return Lift(district.seed, device, district.floors[device.building])


def _observed(item: tuple[Lane, Reading]) -> int:
    return item[1].observed_at


def _shifted(item: tuple[Lane, Reading], by_ms: int) -> tuple[Lane, Reading]:
    lane, reading = item
    return lane, Reading(reading.device, reading.observed_at + by_ms, reading.values)


class Spooled(Protocol):
    """What tells how many messages wait: `gateway.spool.Spool`."""

    def spooled(self) -> int: ...


class Vitals:
    """A gateway's own readings, every 10 s on the grid of its clock: how long it is up, how much waits in its spool."""

    def __init__(self, gateway: str, spool: Spooled) -> None:
        self._gateway = gateway
        self._spool = spool
        self._since_ms = 0
        self._until_ms = 0

    def poll(self, now_ms: int) -> list[Emitted]:
        """Return the reading that is due at `now_ms`, if one is; what a long interruption left out is not made up."""
        if not self._since_ms:
            self._since_ms = self._until_ms = now_ms
        at_ms = now_ms - now_ms % VITALS_MS
        if at_ms <= self._until_ms:
            return []
        self._until_ms = at_ms
        values = {"uptime_s": (at_ms - self._since_ms) / SECOND_MS, "spooled": float(self._spool.spooled())}
        return [(Lane.TELEMETRY, Reading(self._gateway, at_ms, values))]

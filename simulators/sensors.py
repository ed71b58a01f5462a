"""What is wired to one gateway: a source of readings for `edge.agent`, with the faults of real reporting.

Sensors miss reports and repeat some (`simulators.water`, `.elevators`, `.cameras`, `.pumps`); here the gateway's clock
is wrong by a little, a gateway without power says nothing, and a process that was down goes on from now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from citybrain.clock import MINUTE_MS, SECOND_MS, Clock
from citybrain.model import CLOUD_PREFIX, Lane, Reading
from citybrain.storage import OS_FILES
from simulators.cameras import Cameras
from simulators.causes import Cause
from simulators.columns import Columns, Emitted, readings_of
from simulators.district import District
from simulators.elevators import Lifts
from simulators.faults import Schedule
from simulators.noise import Noise
from simulators.pumps import Pumps
from simulators.water import Hydrants

FAST_GATEWAY, FAST_MS = "gw-04", 3000
SKEW_MS = 400  # the others are wrong by at most this, either way
CATCH_UP_MS = MINUTE_MS  # a shorter interruption leaves no hole
LEAST_MS = 200  # asked more often than this, there is nothing new
AHEAD_MS = 2 * MINUTE_MS  # a live source works this far ahead at once: arrays want company
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
    killed may leave a hole, and never says anything twice. swaps: from when (Unix ms) on a device has another sensor,
    and how the wire calls that one.
    """

    def __init__(
        self,
        district: District,
        gateway: str,
        schedule: Schedule,
        mark: Path | None = None,
        swaps: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.gateway = gateway
        self.skew_ms = skew_ms(district.seed, gateway)
        self.names = district.of_gateway(gateway)
        devices = [district.devices[name] for name in self.names]
        self._schedule = schedule
        self._mark = mark
        self._until_ms = OS_FILES.marked(mark) if mark is not None else 0
        self._swaps = dict(swaps or {})
        self._wire = {device.id: device.wire_id for device in devices}
        self._hydrants = Hydrants(district, [d for d in devices if d.kind == "hydrant"])
        self._lifts = Lifts(district, [d for d in devices if d.kind == "elevator"])
        self._cameras = Cameras(district, [d for d in devices if d.kind == "camera"])
        self._pumps = Pumps(district, [d for d in devices if d.kind == "pump_room"])
        self._groups = [g for g in (self._hydrants, self._lifts, self._cameras, self._pumps) if g.names]
        self._ahead: deque[Emitted] = deque()
        self._ahead_until_ms = 0

    # --- live -------------------------------------------------------------------------------------------------------

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
        return self._ready(from_ms, to_ms)

    def _reach(self, to_ms: int) -> None:
        self._until_ms = to_ms
        if self._mark is not None:
            OS_FILES.mark(self._mark, to_ms)

    def _ready(self, from_ms: int, to_ms: int) -> list[Emitted]:
        """Return the readings of [from, to), which follows what was asked for before, from what is worked out ahead."""
        if not from_ms < self._ahead_until_ms:
            self._ahead_until_ms = from_ms
        while self._ahead_until_ms < to_ms:
            until = max(to_ms, self._ahead_until_ms + AHEAD_MS)
            self._ahead.extend(self.between(self._ahead_until_ms, until))
            self._ahead_until_ms = until
        found: list[Emitted] = []
        while self._ahead and self._ahead[0][1].observed_at - self.skew_ms < to_ms:
            found.append(self._ahead.popleft())
        return found

    def power_up(self, at_ms: int) -> list[Emitted]:
        """Return every device's event values as they stand: what changed while nobody listened is said again."""
        self._ahead.clear()
        self._ahead_until_ms = at_ms
        causes = self._schedule.around(self.names, at_ms, at_ms)
        device = np.arange(len(self._hydrants.names))
        blocks = [self._hydrants.standing(device, np.full(len(device), at_ms), causes)] if len(device) else []
        blocks += [group.standing(at_ms, causes) for group in (self._lifts, self._cameras) if group.names]
        found = [block for columns in blocks for block in self._named(columns)]
        place = {wire: number for number, wire in enumerate(self._wire.values())}
        return sorted(readings_of(found, self.skew_ms), key=lambda item: place.get(item[1].device, len(place)))

    # --- in blocks --------------------------------------------------------------------------------------------------

    def between(self, from_ms: int, to_ms: int) -> list[Emitted]:
        """Return the readings of [from, to) in true time, stamped by the gateway's clock."""
        return readings_of(self.columns(from_ms, to_ms), self.skew_ms)

    def columns(self, from_ms: int, to_ms: int) -> list[Columns]:
        """Return the readings of [from, to) in true time, which is also what they are stamped with."""
        causes = self._schedule.around((*self.names, self.gateway), from_ms, to_ms)
        found = [
            block
            for group in self._groups
            for columns in group.columns(from_ms, to_ms, causes)
            for block in self._named(columns)
        ]
        for cause in causes:
            if dead(cause):
                found = [block.rows((block.at < cause.start_ms) | (block.at >= cause.end_ms)) for block in found]
        return [block for block in found if len(block.at)]

    def _named(self, columns: Columns) -> list[Columns]:
        """Return columns with the names of the wire; where a sensor is replaced, before and after."""
        if len(columns.at) == 0:
            return []
        swapped = [(number, *self._swaps[name]) for number, name in enumerate(columns.names) if name in self._swaps]
        names = [self._wire[name] for name in columns.names]
        device = columns.device.copy()
        for number, since_ms, wire in swapped:
            device[(columns.device == number) & (columns.at >= since_ms)] = len(names)
            names.append(wire)
        return [msgspec.structs.replace(columns, names=tuple(names), device=device)]


def is_cloud(gateway: str) -> bool:
    """Return whether a gateway is an operator's cloud."""
    return gateway.startswith(CLOUD_PREFIX)


def dead(cause: Cause) -> bool:
    """Return whether a gateway that is offline has no power either."""
    return cause.kind == "gateway_offline" and cause.strength.get("power", 1.0) < DEAD_SHARE


DEAD_SHARE = 0.3


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

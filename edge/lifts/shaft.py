"""Where a car is and whether it moves, from what a kit on it measures: pressure of the air, acceleration; pure.

Weather moves the barometer as much as a floor does within minutes (1 hPa is 8 m). A car that stands cannot change its
height, so all change while it stands is weather and is forgotten; only what a ride adds counts, and each opening of the
doors puts the car exactly at a landing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from math import log

G_MPS2 = 9.80665
GAS_J_KG_K = 287.05  # of dry air
KEPT_S = 7.0  # of air
NOTICED_S, RATE_S = 0.6, 1.7  # how late a start is noticed: by the acceleration, by the rate of the air
BEFORE_S = 2.0  # the air of so long before it is that of the start
GUST_S, ALONE_S = 2.5, 0.5  # air moves by itself too: a start that only it shows lasts longer, but without acceleration
DOOR_JUMP_S = 0.2
DOOR_BEFORE_S = (-0.85, -0.25)  # of an opening that is told when the contact has stopped bouncing
MOVES_MPS, STANDS_MPS = 0.3, 0.15
MOVES_MPS2 = 0.2
STILL_S = 1.5  # a ride is over after so long without speed
DOOR_AIR_S = 2.0  # doors that open or close change the air, and no height
SHORTEST_BETWEEN_S = 0.5
LONGEST_RIDE_S = 120.0  # a ride that only the accelerometer sees: its integral drifts
GRAVITY_S, MOST_DRIFT_MPS2 = 20.0, 0.1
HALF_WAY_M = 0.5
ZONE_M = 0.5  # GB 7588: unlocking zone up to 0.35 m; what a barometer can tell is coarser
SNAP_SHARE = 0.4  # of the distance between two landings


class Shaft:
    """The landings of a lift: floor → height in m above any zero."""

    def __init__(self, landings: Mapping[int, float]) -> None:
        self.landings = dict(sorted(landings.items(), key=lambda one: one[1]))
        heights = list(self.landings.values())
        self._reach_m = SNAP_SHARE * min((b - a for a, b in pairwise(heights)), default=3.0)

    def nearest(self, height_m: float) -> tuple[int, float]:
        """Return the nearest landing's floor, and how far it is.

        >>> Shaft({1: 0.0, 2: 3.0}).nearest(2.5)
        (2, 0.5)
        """
        floor = min(self.landings, key=lambda one: abs(self.landings[one] - height_m))
        return floor, abs(self.landings[floor] - height_m)

    def landed(self, possible: set[int], moved_m: float) -> set[int]:
        """Return where a car can be that was at one of `possible` and whose doors open `moved_m` higher.

        >>> Shaft({1: 0.0, 2: 4.5, 3: 7.5}).landed({1, 2, 3}, 4.4)
        {2}
        """
        near = (self.nearest(self.landings[floor] + moved_m) for floor in possible)
        return {floor for floor, off_m in near if off_m <= self._reach_m}


def risen_m(from_pa: float, to_pa: float, temperature_c: float) -> float:
    """Return how much higher the second pressure is measured (hypsometric equation).

    >>> round(risen_m(101325, 101289, 15.0), 2)
    3.0
    """
    return GAS_J_KG_K * (temperature_c + 273.15) / G_MPS2 * log(from_pa / to_pa)


class Travel:
    """One car's motion and place. Feed it with times that never step back; what does not work is left out (None).

    >>> travel = Travel(Shaft({1: 0.0, 2: 3.0}))
    >>> travel.moving, travel.floor
    (False, None)
    """

    def __init__(self, shaft: Shaft) -> None:
        self.moving = False
        self.floor: int | None = None  # the nearest; None while several fit, or the air is not known
        self.rides = 0  # that are over
        self.lost = 0  # how often no floor fitted any more
        self.temperature_c = 15.0
        self._shaft = shaft
        self._possible = set(shaft.landings)
        self._moved_m = 0.0  # since the last landing
        self._air: deque[tuple[float, float]] = deque()
        self._start_pa: float | None = None  # of the present ride
        self._gravity: float | None = None
        self._stood_s = 0.0
        self._accelerated: deque[tuple[float, float]] = deque()
        self._speed_mps = 0.0
        self._began_s = self._quiet_s = self._door_s = float("-inf")
        self._rate_since_s: float | None = None
        self._open = False
        self._acceleration_s: float | None = None

    # --- what it is told ---

    def accelerate(self, t_s: float, upward_g: float | None) -> None:
        """Take an acceleration along the vertical, gravity included."""
        if upward_g is None:
            self._acceleration_s = None
            self._accelerated.clear()
            self._speed_mps = 0.0
        else:
            self._integrate(t_s, upward_g * G_MPS2)
        self._decide(t_s)

    def breathe(self, t_s: float, pressure_pa: float | None) -> None:
        """Take a pressure; None where the barometer does not work."""
        if pressure_pa is None:
            self._air.clear()
            self.floor = None
            if not self.moving:
                self._start_pa = None
            return
        self._air.append((t_s, pressure_pa))
        while self._air[0][0] < t_s - KEPT_S:
            self._air.popleft()
        self._decide(t_s)
        self._look()

    def door(self, t_s: float, *, opened: bool) -> None:
        """Take a door that opens or closes. It opens at a landing: there the car is exactly."""
        self._door_s, self._open = t_s, opened
        if opened and self.moving and not self._air:
            self._end(t_s)  # an integral alone cannot say that the car has stopped
        elif opened and not self.moving:
            self._land()

    def _land(self) -> None:
        found = self._shaft.landed(self._possible, self._moved_m)
        self.lost += not found
        self._possible = found or set(self._shaft.landings)
        self._moved_m = 0.0

    def home(self, floor: int) -> None:
        """Take the magnet at a known floor."""
        if not self.moving:
            self._possible, self._moved_m = {floor}, 0.0

    # --- what it knows ---

    def _look(self) -> None:
        """Find the nearest floor; half-way the last one stays, so that noise does not make it jump."""
        height_m = self._height_m()
        if height_m is None:
            self.floor = None
            return
        floor, off_m = self._shaft.nearest(height_m)
        before_m = self._shaft.landings[floor if self.floor is None else self.floor]
        if self.floor is None or abs(before_m - height_m) - off_m > HALF_WAY_M:
            self.floor = floor

    @property
    def outside(self) -> bool | None:
        """Whether the car stands outside the unlocking zone of any landing; None where that is not known."""
        height_m = self._height_m()
        return None if height_m is None else self._shaft.nearest(height_m)[1] > ZONE_M

    def _height_m(self) -> float | None:
        if len(self._possible) != 1 or not self._air:
            return None
        (at,) = self._possible
        moved_m = self._moved_m
        if self.moving and self._start_pa is not None:
            moved_m += risen_m(self._start_pa, self._air[-1][1], self.temperature_c)
        return self._shaft.landings[at] + moved_m

    # --- how it finds out ---

    def _integrate(self, t_s: float, upward_mps2: float) -> None:
        if self._gravity is None:
            self._gravity = upward_mps2
        last_s, self._acceleration_s = self._acceleration_s, t_s
        step_s = t_s - last_s if last_s is not None else 0.0
        if not 0 <= step_s <= SHORTEST_BETWEEN_S:
            self._speed_mps, step_s = 0.0, 0.0
        felt = upward_mps2 - self._gravity
        self._accelerated.append((t_s, felt))
        while self._accelerated[0][0] < t_s - SHORTEST_BETWEEN_S:
            self._accelerated.popleft()
        self._speed_mps += felt * step_s
        if not self.moving:
            self._stood_s += step_s
            drift = max(-MOST_DRIFT_MPS2, min(MOST_DRIFT_MPS2, felt))  # not the beginning of a ride
            self._gravity += drift * step_s / max(1.0, min(GRAVITY_S, self._stood_s))
            self._speed_mps -= self._speed_mps * min(1.0, step_s / 2.0)  # a car that stands has none

    def _rate_mps(self, t_s: float) -> float | None:
        """Return the speed that the barometer sees; None where it sees none that counts."""
        if len(self._air) < 6 or t_s - self._door_s < DOOR_AIR_S:
            return None
        now, before = self._mean(t_s - 0.6, t_s), self._mean(t_s - 1.7, t_s - 1.1)
        return None if now is None or before is None else risen_m(before, now, self.temperature_c) / 1.1

    def _mean(self, from_s: float, to_s: float) -> float | None:
        some = [pa for at_s, pa in self._air if from_s <= at_s <= to_s]
        return sum(some) / len(some) if some else None

    def _decide(self, t_s: float) -> None:
        rate = self._rate_mps(t_s)
        if not self.moving:
            self._start(t_s, rate)
            return
        felt = [a for _, a in self._accelerated]
        even = not felt or abs(sum(felt) / len(felt)) < MOVES_MPS2
        slow = abs(rate) < STANDS_MPS if rate is not None else self._open or abs(self._speed_mps) < MOVES_MPS
        too_long = rate is None and t_s - self._began_s > LONGEST_RIDE_S
        if not (even and (slow or too_long)):
            self._quiet_s = t_s
        elif t_s - self._quiet_s >= STILL_S:
            self._end(t_s)

    def _start(self, t_s: float, rate: float | None) -> None:
        """Begin a ride where the car speeds up, or the air goes on changing."""
        if rate is None or abs(rate) <= MOVES_MPS:
            self._rate_since_s = None
        elif self._rate_since_s is None:
            self._rate_since_s = t_s
        if abs(self._speed_mps) > MOVES_MPS:
            self._begin(t_s, t_s - NOTICED_S)
        elif self._rate_since_s is not None:
            lasts_s = GUST_S if self._acceleration_s is not None else ALONE_S
            if t_s - self._rate_since_s >= lasts_s:
                self._begin(t_s, self._rate_since_s - RATE_S)

    def _begin(self, t_s: float, began_s: float) -> None:
        """Begin a ride; what the air was before, but behind the doors' closing, is where it began."""
        self.moving, self._began_s, self._quiet_s = True, t_s, t_s
        closed_s = self._door_s + DOOR_JUMP_S
        before = self._mean(max(began_s - BEFORE_S, closed_s), began_s)
        self._start_pa = before if before is not None else self._mean(closed_s, t_s)

    def _end(self, t_s: float) -> None:
        """End a ride, in the air since it was still, but before the doors opened."""
        self.moving, self._speed_mps, self._rate_since_s = False, 0.0, None
        self.rides += 1
        opened = self._open and self._door_s > self._began_s
        end_pa = self._mean(*(self._door_s + at_s for at_s in DOOR_BEFORE_S)) if opened else None
        if end_pa is None:
            end_pa = self._mean(self._quiet_s, t_s)
        if self._start_pa is None or end_pa is None:
            self._possible, self._moved_m = set(self._shaft.landings), 0.0  # a ride that nobody measured
        else:
            self._moved_m += risen_m(self._start_pa, end_pa, self.temperature_c)
        if self._open:
            self._land()

"""What happens to one car under a cause, moment by moment, and which codes its controller reports meanwhile."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import pairwise

import numpy as np

from citybrain.clock import MINUTE_MS, SECOND_MS
from simulators.causes import Cause
from simulators.noise import I64

FLOOR_MS, TRAVEL_MS = 2500, 70 * SECOND_MS  # a tall house has fast lifts: none takes longer from bottom to top
LEAD_MS = 20 * SECOND_MS  # a ride begins this long before its cause
AFTER_MS = 60 * SECOND_MS
RETRY_MS = 20 * SECOND_MS

# Codes after GB/T 24476-2017.
SAFETY_CIRCUIT, DOOR_CLOSE, DOOR_OPEN, OUT_OF_ZONE, MOVED = 1, 2, 3, 4, 5
AUTOMATIC, MAINS_LOST, BUTTON = 40, 41, 90
STAYING = (1, 6, 7, 8)
NORMAL, INSPECTION = 1.0, 2.0
# What a technician tries: (minutes after he began, code). Enough of each to raise every rule but for what keeps it still.
TESTS = ((2, SAFETY_CIRCUIT), (4, DOOR_CLOSE), (5, DOOR_CLOSE), (6, DOOR_OPEN), (7, DOOR_CLOSE), (9, BUTTON))
UNMUTED = ((2, MOVED), (4, DOOR_CLOSE), (5, DOOR_OPEN), (6, DOOR_CLOSE), (7, DOOR_OPEN), (9, SAFETY_CIRCUIT))


class Moment:
    """From `at` (Unix ms) on a car stands so: floor, moving, going up, occupied, doors closed, service mode, powered."""

    __slots__ = ("at", "door_closed", "floor", "mode", "moving", "occupied", "powered", "up")

    def __init__(
        self, at: int, floor: int, *, moving: bool = False, up: bool = False, occupied: bool = False,
        door_closed: bool = True, mode: float = NORMAL, powered: bool = True,
    ) -> None:  # fmt: skip
        self.at = at
        self.floor = floor
        self.moving = moving
        self.up = up
        self.occupied = occupied
        self.door_closed = door_closed
        self.mode = mode
        self.powered = powered

    def told(self) -> tuple[bool, bool, float]:
        """Return what is reported as an event."""
        return self.occupied, self.door_closed, self.mode


class Script:
    """A car's moments from the first until `end`, and the (Unix ms, code) its controller reports."""

    def __init__(self, moments: list[Moment], end: int, codes: list[tuple[int, int]]) -> None:
        self.moments = moments
        self.begin = moments[0].at if moments else end
        self.end = end
        self.codes = sorted(codes)
        self.times: I64 = np.array([moment.at for moment in moments], np.int64)

    def at(self, at_ms: int) -> Moment:
        """Return the moment that lasts at a time within the script."""
        return self.moments[max(bisect_right(self.times, at_ms) - 1, 0)]

    def code(self, at_ms: int) -> float:
        """Return the code that stands: the last one reported, 0 where nothing is wrong."""
        said = [code for at, code in self.codes if at <= at_ms]
        return float(said[-1]) if said else 0.0

    @cached_property
    def changes(self) -> list[Moment]:
        """The moments at which an event is to be told; before the script a car stands empty and closed."""
        idle = Moment(0, 1)
        return [now for before, now in pairwise([idle, *self.moments]) if before.told() != now.told()]

    @cached_property
    def turns(self) -> list[Moment]:
        """The moments at which it begins to move, or stops."""
        return [now for before, now in pairwise([Moment(0, 1), *self.moments]) if before.moving != now.moving]


def trip_ms(floors: int) -> int:
    """Return how long a car takes for one floor of a house."""
    return min(FLOOR_MS, TRAVEL_MS // max(floors, 1))


def script(cause: Cause, lift: str, floor: int, floors: int, floor_ms: int, *, codes: bool) -> Script:
    """Return what a cause does to a lift that waits at `floor`; without `codes` its kit knows none."""
    far = floor + 4 if floor + 4 <= floors else max(floor - 4, 1)
    start, end, said = cause.start_ms, cause.end_ms, _codes(cause, lift)
    match cause.kind:
        case "trapped":
            moments = _stuck(start, end, floor, far, powered=True)
        case "power_cut_occupied" | "power_cut_empty" if lift in cause.occupied:
            moments = _stuck(start, end, floor, far, powered=False)
        case "power_cut_occupied" | "power_cut_empty":
            moments = [Moment(start - LEAD_MS, floor), Moment(start, floor, powered=False), Moment(end, floor)]
        case "door_failure":
            moments = [Moment(start, floor, door_closed=False), Moment(end, floor)]
        case "loading":
            moments = [Moment(start, floor, occupied=True, door_closed=False),
                       Moment(end, floor, door_closed=False), Moment(end + 5 * SECOND_MS, floor)]  # fmt: skip
        case "inspection":
            moments = _attended(start, end, floor, INSPECTION)
        case "lift_maintenance":
            moments = _attended(start, end, floor, NORMAL)
        case "unintended_movement":
            moments = [Moment(start, floor, moving=True, door_closed=False),
                       Moment(start + 3 * SECOND_MS, floor, door_closed=False), Moment(end, floor)]  # fmt: skip
        case "lift_fault":
            moments = [Moment(start, floor), Moment(end, floor)]
        case "button_play" if cause.strength["rides"] >= 0.5:
            moments = _ride(start, floor, far, floor_ms)
        case "button_play":
            moments = [Moment(start, floor)]
        case "rough_once":
            moments = _ride(start, floor, far, floor_ms)
        case _:
            return Script([], end, [])
    return Script(moments, max(moments[-1].at, end) + AFTER_MS, said if codes else [])


def _stuck(start: int, end: int, floor: int, far: int, *, powered: bool) -> list[Moment]:
    """Somebody steps in, the car goes, stops between two floors, and he is let out at the end."""
    between = floor + 1 if far > floor else floor - 1
    enter = start - LEAD_MS + 2 * SECOND_MS
    return [
        Moment(start - LEAD_MS, floor),
        Moment(enter, floor, occupied=True, door_closed=False),
        Moment(enter + 4 * SECOND_MS, floor, occupied=True),
        Moment(enter + 5 * SECOND_MS, floor, moving=True, up=far > floor, occupied=True),
        Moment(start, between, occupied=True, powered=powered),
        Moment(end, far, occupied=True, door_closed=False),
        Moment(end + 25 * SECOND_MS, far, door_closed=False),
        Moment(end + 30 * SECOND_MS, far),
    ]


def _ride(start: int, floor: int, far: int, floor_ms: int) -> list[Moment]:
    stop = start + 9 * SECOND_MS + 4 * floor_ms
    return [
        Moment(start, floor, occupied=True, door_closed=False),
        Moment(start + 4 * SECOND_MS, floor, occupied=True),
        Moment(start + 5 * SECOND_MS, floor, moving=True, up=far > floor, occupied=True),
        Moment(stop, far, occupied=True),
        Moment(stop + 1500, far, occupied=True, door_closed=False),
        Moment(stop + 4000, far, door_closed=False),
        Moment(stop + 9000, far),
    ]


def _attended(start: int, end: int, floor: int, mode: float) -> list[Moment]:
    """A technician is inside; where no mode says so, he works with the doors open."""
    closed = mode != NORMAL
    return [
        Moment(start, floor, occupied=True, door_closed=closed, mode=mode),
        Moment(end, floor, occupied=True, door_closed=False),
        Moment(end + 5 * SECOND_MS, floor, door_closed=False),
        Moment(end + 10 * SECOND_MS, floor),
    ]


def _codes(cause: Cause, lift: str) -> list[tuple[int, int]]:
    start, end, strength = cause.start_ms, cause.end_ms, cause.strength
    place = cause.subjects.index(lift)
    button = start + round(strength.get("button_s", 0.0) * SECOND_MS) + 2500 * place
    presses = [(button, BUTTON), (button + 45 * SECOND_MS, BUTTON), (button + 150 * SECOND_MS, BUTTON)]
    match cause.kind:
        case "trapped":
            return [(start + round(strength["code_s"] * SECOND_MS), OUT_OF_ZONE), *presses, (end, 0)]
        case "power_cut_occupied" | "power_cut_empty":
            lost = [(start + 700 * place, MAINS_LOST)]
            back = [(end + 700 * place, AUTOMATIC), (end + 20 * SECOND_MS + 700 * place, 0)]
            return lost + (presses if lift in cause.occupied else []) + back
        case "door_failure":
            n = int(strength["codes"])
            step = strength["over_s"] * SECOND_MS / (n - 1)
            failures = [(start + round(5000 + i * step), (DOOR_CLOSE, DOOR_OPEN)[i % 2]) for i in range(n)]
            return [*_retried(failures), (end, 0)]
        case "loading":
            held = [(start + 30 * SECOND_MS + i * MINUTE_MS, DOOR_CLOSE) for i in range(int(strength["codes"]))]
            return [item for at, code in held for item in ((at, code), (at + RETRY_MS, 0))]
        case "inspection":
            tests = [(start + at * MINUTE_MS, code) for at, code in TESTS]
            return [*_retried(tests), (end - MINUTE_MS, 0)]
        case "lift_maintenance":
            tests = [(start + at * MINUTE_MS, code) for at, code in UNMUTED]
            return [*_retried(tests), (end - MINUTE_MS, 0)]
        case "unintended_movement":
            return [(start + SECOND_MS, MOVED), (end, 0)]
        case "lift_fault":
            return [(start, STAYING[int(strength["code"])]), (end, 0)]
        case "button_play":
            pressed = start + (7 if strength["rides"] >= 0.5 else 0) * SECOND_MS
            return [(pressed, BUTTON), (pressed + round(strength["press_s"] * SECOND_MS), 0)]
        case _:
            return []


def _retried(failures: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Put a 0 behind each code but the last: the controller tries again, it works, and soon fails anew."""
    return sorted(failures + [(at + RETRY_MS, 0) for at, _ in failures[:-1]])

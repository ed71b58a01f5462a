"""What happens to one car under a cause, moment by moment, and which codes its controller reports meanwhile."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import msgspec
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
# What a technician tries: (minutes after he began, code). Enough of each to raise every rule but for what mutes it.
TESTS = ((2, SAFETY_CIRCUIT), (4, DOOR_CLOSE), (5, DOOR_CLOSE), (6, DOOR_OPEN), (7, DOOR_CLOSE), (9, BUTTON))
UNMUTED = ((2, MOVED), (4, DOOR_CLOSE), (5, DOOR_OPEN), (6, DOOR_CLOSE), (7, DOOR_OPEN), (9, SAFETY_CIRCUIT))


class Moment:
    """From `at` (Unix ms) on a car stands so: floor, moving, going up, occupied, doors closed, mode, powered."""

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


class Car(msgspec.Struct, frozen=True):
    """A car before its cause: where it waits, a floor it may be going to, how long it takes for one."""

    lift: str
    floor: int
    far: int
    floor_ms: int


def script(cause: Cause, lift: str, floor: int, floors: int, floor_ms: int, *, codes: bool) -> Script:
    """Return what a cause does to a lift that waits at `floor`; without `codes` its kit knows none."""
    play = MOMENTS.get(cause.kind)
    if play is None:
        return Script([], cause.end_ms, [])
    far = floor + 4 if floor + 4 <= floors else max(floor - 4, 1)
    moments = play(cause, Car(lift, floor, far, floor_ms))
    said = CODES[cause.kind](cause, lift) if codes and cause.kind in CODES else []
    return Script(moments, max(moments[-1].at, cause.end_ms) + AFTER_MS, said)


def _stuck(cause: Cause, car: Car, *, powered: bool = True) -> list[Moment]:
    """Somebody steps in, the car goes, stops between two floors, and he is let out at the end."""
    start, end, floor, far = cause.start_ms, cause.end_ms, car.floor, car.far
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


def _power_cut(cause: Cause, car: Car) -> list[Moment]:
    if car.lift in cause.occupied:
        return _stuck(cause, car, powered=False)
    start = cause.start_ms
    return [
        Moment(start - LEAD_MS, car.floor),
        Moment(start, car.floor, powered=False),
        Moment(cause.end_ms, car.floor),
    ]


def _ride(cause: Cause, car: Car) -> list[Moment]:
    start, floor, far = cause.start_ms, car.floor, car.far
    stop = start + 9 * SECOND_MS + 4 * car.floor_ms
    return [
        Moment(start, floor, occupied=True, door_closed=False),
        Moment(start + 4 * SECOND_MS, floor, occupied=True),
        Moment(start + 5 * SECOND_MS, floor, moving=True, up=far > floor, occupied=True),
        Moment(stop, far, occupied=True),
        Moment(stop + 1500, far, occupied=True, door_closed=False),
        Moment(stop + 4000, far, door_closed=False),
        Moment(stop + 9000, far),
    ]


def _button_play(cause: Cause, car: Car) -> list[Moment]:
    return _ride(cause, car) if cause.strength["rides"] >= 0.5 else [Moment(cause.start_ms, car.floor)]


def _doors_open(cause: Cause, car: Car) -> list[Moment]:
    return [Moment(cause.start_ms, car.floor, door_closed=False), Moment(cause.end_ms, car.floor)]


def _loading(cause: Cause, car: Car) -> list[Moment]:
    end = cause.end_ms
    return [
        Moment(cause.start_ms, car.floor, occupied=True, door_closed=False),
        Moment(end, car.floor, door_closed=False),
        Moment(end + 5 * SECOND_MS, car.floor),
    ]


def _moved(cause: Cause, car: Car) -> list[Moment]:
    start = cause.start_ms
    return [
        Moment(start, car.floor, moving=True, door_closed=False),
        Moment(start + 3 * SECOND_MS, car.floor, door_closed=False),
        Moment(cause.end_ms, car.floor),
    ]


def _out_of_order(cause: Cause, car: Car) -> list[Moment]:
    return [Moment(cause.start_ms, car.floor), Moment(cause.end_ms, car.floor)]


def _attended(cause: Cause, car: Car, mode: float = INSPECTION) -> list[Moment]:
    """A technician is inside; where no mode says so, he works with the doors open."""
    end = cause.end_ms
    return [
        Moment(cause.start_ms, car.floor, occupied=True, door_closed=mode != NORMAL, mode=mode),
        Moment(end, car.floor, occupied=True, door_closed=False),
        Moment(end + 5 * SECOND_MS, car.floor, door_closed=False),
        Moment(end + 10 * SECOND_MS, car.floor),
    ]


MOMENTS: dict[str, Callable[[Cause, Car], list[Moment]]] = {
    "trapped": _stuck,
    "power_cut_occupied": _power_cut,
    "power_cut_empty": _power_cut,
    "door_failure": _doors_open,
    "loading": _loading,
    "inspection": _attended,
    "lift_maintenance": lambda cause, car: _attended(cause, car, NORMAL),
    "unintended_movement": _moved,
    "lift_fault": _out_of_order,
    "button_play": _button_play,
    "rough_once": _ride,
}

# --- what the controller says ---------------------------------------------------------------------------------------

Said = list[tuple[int, int]]  # (Unix ms, code)


def _presses(cause: Cause, lift: str) -> Said:
    button = cause.start_ms + round(cause.strength["button_s"] * SECOND_MS) + 2500 * cause.subjects.index(lift)
    return [(button, BUTTON), (button + 45 * SECOND_MS, BUTTON), (button + 150 * SECOND_MS, BUTTON)]


def _trapped_codes(cause: Cause, lift: str) -> Said:
    stopped = cause.start_ms + round(cause.strength["code_s"] * SECOND_MS)
    return [(stopped, OUT_OF_ZONE), *_presses(cause, lift), (cause.end_ms, 0)]


def _power_codes(cause: Cause, lift: str) -> Said:
    after = 700 * cause.subjects.index(lift)
    lost, back = cause.start_ms + after, cause.end_ms + after
    pressed = _presses(cause, lift) if lift in cause.occupied else []
    return [(lost, MAINS_LOST), *pressed, (back, AUTOMATIC), (back + 20 * SECOND_MS, 0)]


def _door_codes(cause: Cause, _: str) -> Said:
    n = int(cause.strength["codes"])
    step = cause.strength["over_s"] * SECOND_MS / (n - 1)
    failures = [(cause.start_ms + round(5000 + i * step), (DOOR_CLOSE, DOOR_OPEN)[i % 2]) for i in range(n)]
    return [*_retried(failures), (cause.end_ms, 0)]


def _loading_codes(cause: Cause, _: str) -> Said:
    held = [cause.start_ms + 30 * SECOND_MS + i * MINUTE_MS for i in range(int(cause.strength["codes"]))]
    return [item for at in held for item in ((at, DOOR_CLOSE), (at + RETRY_MS, 0))]


def _tests(cause: Cause, tests: Sequence[tuple[int, int]]) -> Said:
    tried = [(cause.start_ms + minute * MINUTE_MS, code) for minute, code in tests]
    return [*_retried(tried), (cause.end_ms - MINUTE_MS, 0)]


def _button_codes(cause: Cause, _: str) -> Said:
    pressed = cause.start_ms + (7 if cause.strength["rides"] >= 0.5 else 0) * SECOND_MS
    return [(pressed, BUTTON), (pressed + round(cause.strength["press_s"] * SECOND_MS), 0)]


def _retried(failures: Said) -> Said:
    """Put a 0 behind each code but the last: the controller tries again, it works, and soon fails anew."""
    return sorted(failures + [(at + RETRY_MS, 0) for at, _ in failures[:-1]])


CODES: dict[str, Callable[[Cause, str], Said]] = {
    "trapped": _trapped_codes,
    "power_cut_occupied": _power_codes,
    "power_cut_empty": _power_codes,
    "door_failure": _door_codes,
    "loading": _loading_codes,
    "inspection": lambda cause, _: _tests(cause, TESTS),
    "lift_maintenance": lambda cause, _: _tests(cause, UNMUTED),
    "unintended_movement": lambda cause, _: [(cause.start_ms + SECOND_MS, MOVED), (cause.end_ms, 0)],
    "lift_fault": lambda cause, _: [(cause.start_ms, STAYING[int(cause.strength["code"])]), (cause.end_ms, 0)],
    "button_play": _button_codes,
}

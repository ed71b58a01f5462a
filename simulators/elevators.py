"""Elevators: trips by time of day, what the controller reports, and what each cause does to a car.

Time is cut into slots of two minutes with at most one trip each, drawn by hash; a car's floor is where its last trip
ended, and one slot in 30 brings it home, so looking back is bounded and nothing needs a memory. A cause has its own
script, during which the ordinary trips it would cut into are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Device, Lane, Reading
from simulators.faults import Cause
from simulators.noise import Noise
from simulators.water import LOCAL_MS, MISSED, REPEATED, Emitted

SLOT_MS = 2 * MINUTE_MS
HOMING_SLOTS = 30
PERIOD_MS = 10 * SECOND_MS
REFRESH_MS = 10 * MINUTE_MS
FLOOR_MS = 2500
LEAD_MS = 20 * SECOND_MS  # a script begins this long before its cause
AFTER_MS = 60 * SECOND_MS
RETRY_MS = 20 * SECOND_MS

DOOR_CLOSE, DOOR_OPEN, OUT_OF_ZONE, SAFETY_CIRCUIT, AUTOMATIC, MAINS_LOST, BUTTON = 2, 3, 4, 1, 40, 41, 90
NORMAL, INSPECTION = 1.0, 2.0
# What a technician tries: (minutes after the mode was set, code). Enough of each to raise every rule but for the mode.
TESTS = ((2, SAFETY_CIRCUIT), (4, DOOR_CLOSE), (5, DOOR_CLOSE), (6, DOOR_OPEN), (7, DOOR_CLOSE), (9, BUTTON))


class Trip(msgspec.Struct, frozen=True):
    """One ride, in Unix ms: in, doors shut, off, stopped, doors open, out, doors shut again."""

    enter_ms: int
    shut_ms: int
    go_ms: int
    stop_ms: int
    open_ms: int
    leave_ms: int
    over_ms: int
    from_floor: int
    to_floor: int
    empty: bool = False

    @property
    def changes(self) -> tuple[int, ...]:
        """When something that is reported as an event changes."""
        return self.enter_ms, self.shut_ms, self.open_ms, self.leave_ms, self.over_ms


class State(msgspec.Struct):
    """A car: floor, moving, occupied, doors closed (0/1 each), service mode, whether the mains feed it."""

    floor: int
    moving: bool = False
    up: bool = False
    occupied: bool = False
    door_closed: bool = True
    mode: float = NORMAL
    powered: bool = True

    def events(self) -> tuple[float, float, float]:
        """Return (occupied, door_closed, service_mode) as reported."""
        return float(self.occupied), float(self.door_closed), self.mode


def traffic(at_ms: int) -> float:
    """Return how likely a slot holds a trip, by local hour: night 0.04, day 0.35, the way to work and home 0.75."""
    hour = (at_ms + LOCAL_MS) % DAY_MS / HOUR_MS
    if hour < 6 or hour >= 23.5:
        return 0.04
    if 7 <= hour < 9 or 17 <= hour < 20:
        return 0.75
    return 0.35


def ride(enter_ms: int, from_floor: int, to_floor: int, *, empty: bool = False) -> Trip:
    """Return the ride that begins with somebody stepping in."""
    go = enter_ms + 5 * SECOND_MS
    stop = go + 4 * SECOND_MS + abs(to_floor - from_floor) * FLOOR_MS
    return Trip(enter_ms, enter_ms + 4000, go, stop, stop + 1500, stop + 4000, stop + 9000, from_floor, to_floor, empty)


def scripted(cause: Cause) -> tuple[int, int]:
    """Return from when until when (Unix ms) a cause writes the car's script."""
    if cause.kind in ("trapped", "power_cut_occupied", "power_cut_empty"):
        return cause.start_ms - LEAD_MS, cause.end_ms + AFTER_MS
    return cause.start_ms, cause.end_ms + AFTER_MS


def codes(cause: Cause, lift: str) -> list[tuple[int, int]]:
    """Return the (Unix ms, fault code) a cause makes a lift's controller report, in order."""
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
            n = round(strength["codes"])
            step = strength["over_s"] * SECOND_MS / (n - 1)
            failures = [(start + round(5000 + i * step), (DOOR_CLOSE, DOOR_OPEN)[i % 2]) for i in range(n)]
            return [*_retried(failures), (end, 0)]
        case "inspection":
            tests = [(start + at * MINUTE_MS, code) for at, code in TESTS]
            return [*_retried(tests), (end - MINUTE_MS, 0)]
        case _:
            return []


def _retried(failures: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Put a 0 behind each code but the last: the controller tries again, it works, and soon fails anew."""
    return sorted(failures + [(at + RETRY_MS, 0) for at, _ in failures[:-1]])


class Lift:
    """One elevator's controller and sensors."""

    def __init__(self, seed: int, device: Device, floors: int) -> None:
        self.id = device.id
        self.floors = floors
        own = Noise(seed, device.id)
        self._draw = Noise(seed, f"{device.id}/trips")
        self._luck = Noise(seed, f"{device.id}/luck")
        self._noise = Noise(seed, f"{device.id}/noise")
        self._phase_ms = int(own.uniform(1) * PERIOD_MS)
        self._slot_phase_ms = int(own.uniform(2) * SLOT_MS)
        self._refresh_ms = int(own.uniform(3) * REFRESH_MS)
        self.trip = lru_cache(maxsize=256)(self._trip)

    # --- what is so -----------------------------------------------------------------------------------------------

    def slot(self, at_ms: int) -> int:
        return (at_ms - self._slot_phase_ms) // SLOT_MS

    def floor_before(self, slot: int) -> int:
        """Return where the car stands when a slot begins: the end of its last trip since it was brought home."""
        for earlier in range(slot - 1, slot - 1 - HOMING_SLOTS, -1):
            if earlier % HOMING_SLOTS == 0:
                return 1
            if self._draw.uniform(2 * earlier) < traffic(earlier * SLOT_MS + self._slot_phase_ms):
                return self._destination(earlier)
        return 1

    def _destination(self, slot: int) -> int:
        return 1 + self._draw.bits(2 * slot + 1) % self.floors

    def _trip(self, slot: int) -> Trip | None:
        start = slot * SLOT_MS + self._slot_phase_ms
        luck = self._draw.uniform(2 * slot)
        homing = slot % HOMING_SLOTS == 0
        if not homing and luck >= traffic(start):
            return None
        here = self.floor_before(slot)
        there = 1 if homing else self._destination(slot)
        if here == there:
            return None
        return ride(start + int(luck * 20 * SECOND_MS), here, there, empty=homing)

    def state(self, at_ms: int, causes: Sequence[Cause] = ()) -> State:
        """Return what is so at a time under the causes that touch this lift."""
        for cause in causes:
            begin, end = scripted(cause)
            if begin <= at_ms < end:
                return self._script(cause, at_ms)
        slot = self.slot(at_ms)
        trip = self.trip(slot)
        if trip is None or any(_cuts(cause, trip) for cause in causes):
            return State(self.floor_before(slot) if trip is None else trip.from_floor)
        return riding(trip, at_ms)

    def _script(self, cause: Cause, at_ms: int) -> State:
        start, end = cause.start_ms, cause.end_ms
        floor = self.floor_before(self.slot(start - LEAD_MS))
        match cause.kind:
            case "inspection":
                mode = INSPECTION if at_ms < end else NORMAL
                return State(floor, occupied=at_ms < end + 5 * SECOND_MS, mode=mode)
            case "door_failure":
                return State(floor, door_closed=at_ms >= end)
        powered = cause.kind == "trapped" or not start <= at_ms < end
        if self.id not in cause.occupied:
            return State(floor, powered=powered)
        far = floor + 4 if floor + 4 <= self.floors else floor - 4
        if at_ms < start:
            return riding(ride(start - LEAD_MS + 2000, floor, far), at_ms)
        if at_ms < end:
            stuck = riding(ride(start - LEAD_MS + 2000, floor, far), start).floor
            return State(stuck, occupied=True, powered=powered)
        return State(far, occupied=at_ms < end + 30 * SECOND_MS, door_closed=at_ms < end + 25 * SECOND_MS)

    # --- what is reported -----------------------------------------------------------------------------------------

    def reports(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Emitted]:
        """Return the readings of [from, to), true times: telemetry each 10 s, events on change and each 10 min."""
        near = [c for c in causes if c.start_ms - 2 * SLOT_MS < to_ms and from_ms < c.end_ms + 2 * SLOT_MS]
        found: list[Emitted] = []
        for at_ms in range(_first(from_ms, self._phase_ms, PERIOD_MS), to_ms, PERIOD_MS):
            self._telemetry(found, at_ms, near)
        self._events(found, from_ms, to_ms, near)
        return found

    def _telemetry(self, found: list[Emitted], at_ms: int, causes: Sequence[Cause]) -> None:
        luck = self._luck.uniform(at_ms)
        if luck < MISSED:
            return
        state = self.state(at_ms, causes)
        wobble = self._noise.uniform(at_ms)
        if state.moving:
            vibration, current = 0.02 + 0.03 * wobble, (14.0 if state.up else 6.0) + 2.0 * wobble
        else:
            vibration, current = 0.001 + 0.002 * wobble, 0.5 + 0.2 * wobble if state.powered else 0.0
        values = {
            "floor": float(state.floor),
            "moving": float(state.moving),
            "vibration_rms_g": round(vibration, 4),
            "current_a": round(current, 2),
        }
        reading = (Lane.TELEMETRY, Reading(self.id, at_ms, values))
        found.append(reading)
        if luck > 1.0 - REPEATED:
            found.append(reading)

    def _events(self, found: list[Emitted], from_ms: int, to_ms: int, causes: Sequence[Cause]) -> None:
        reported = {at: code for cause in causes for at, code in codes(cause, self.id) if from_ms <= at < to_ms}
        refreshed = set(range(_first(from_ms, self._refresh_ms, REFRESH_MS), to_ms, REFRESH_MS))
        for at_ms in sorted(self._changes(from_ms, to_ms, causes) | reported.keys() | refreshed):
            state = self.state(at_ms, causes).events()
            if at_ms in reported or at_ms in refreshed:
                found.append(self.standing(at_ms, causes))
            elif state != self.state(at_ms - 1, causes).events():
                found.append(_event(self.id, at_ms, state, None))

    def standing(self, at_ms: int, causes: Sequence[Cause]) -> Emitted:
        """Return the event values and the code as they stand, as they are told every 10 min and at power-up."""
        return _event(self.id, at_ms, self.state(at_ms, causes).events(), self._code(at_ms, causes))

    def _changes(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> set[int]:
        times: set[int] = set()
        for slot in range(self.slot(from_ms), self.slot(to_ms) + 1):
            trip = self.trip(slot)
            if trip is not None:
                times.update(at for at in trip.changes if from_ms <= at < to_ms)
        for cause in causes:
            start, end = cause.start_ms, cause.end_ms
            scripts = (start - LEAD_MS, start - LEAD_MS + 2000, start - LEAD_MS + 6000, start, end)
            releases = (end + 5 * SECOND_MS, end + 25 * SECOND_MS, end + 30 * SECOND_MS, end + AFTER_MS)
            times.update(at for at in (*scripts, *releases) if from_ms <= at < to_ms)
        return times

    def _code(self, at_ms: int, causes: Sequence[Cause]) -> int:
        """Return the code that stands: the last one reported, 0 where nothing is wrong."""
        said = [item for cause in causes for item in codes(cause, self.id) if item[0] <= at_ms]
        return max(said)[1] if said else 0


def riding(trip: Trip, at_ms: int) -> State:
    """Return the car's state at a time of a trip, before and after it included."""
    up = trip.to_floor > trip.from_floor
    if at_ms < trip.go_ms:
        floor, moving = trip.from_floor, False
    elif at_ms < trip.stop_ms:
        passed = min((at_ms - trip.go_ms) // FLOOR_MS, abs(trip.to_floor - trip.from_floor))
        floor, moving = trip.from_floor + (passed if up else -passed), True
    else:
        floor, moving = trip.to_floor, False
    inside = not trip.empty and trip.enter_ms <= at_ms < trip.leave_ms
    doors_open = not trip.empty and (trip.enter_ms <= at_ms < trip.shut_ms or trip.open_ms <= at_ms < trip.over_ms)
    return State(floor, moving, up, inside, not doors_open)


def _cuts(cause: Cause, trip: Trip) -> bool:
    begin, end = scripted(cause)
    return begin < trip.over_ms and trip.enter_ms < end


def _event(lift: str, at_ms: int, state: tuple[float, float, float], code: int | None) -> Emitted:
    values = {"occupied": state[0], "door_closed": state[1], "service_mode": state[2]}
    if code is not None:
        values["fault_code"] = float(code)  # behind its evidence: guards look at what came before
    return Lane.EVENT, Reading(lift, at_ms, values)


def _first(from_ms: int, phase_ms: int, step_ms: int) -> int:
    return from_ms + (phase_ms - from_ms) % step_ms

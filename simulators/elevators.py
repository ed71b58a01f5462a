"""Elevators: trips by time of day, what the controller or a retrofit kit reports, and what each cause does to a car.

Time is cut into slots of two minutes with at most one trip each, drawn by hash; a car's floor is where its last trip
ended, and one slot in 30 brings it home, so looking back is bounded and nothing needs a memory. A cause has its own
script (`simulators.scripts`), during which the ordinary trips it would cut into are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Device, Lane
from simulators.causes import LOCAL_MS, Cause
from simulators.columns import MISSED, Columns, Event, by_luck, from_events, grid, only
from simulators.district import District
from simulators.noise import F64, I64, keys, stream, uniforms
from simulators.noise import bits as noise_bits
from simulators.scripts import LEAD_MS, Moment, Script, script, trip_ms
from simulators.water import SILENT, air_c

Bools = npt.NDArray[np.bool_]

SLOT_MS = 2 * MINUTE_MS
HOMING_SLOTS = 30
PERIOD_MS = 60 * SECOND_MS
REFRESH_MS = 10 * MINUTE_MS
BUSY = (0.2, 0.6)  # how much of the traffic of a tall office block a lift has
NEAR_MS = 5 * MINUTE_MS  # a script begins and ends within this of its cause
ROOM_C = (10.0, 24.0)  # how much warmer a machine room is than the air

TELEMETRY = ("floor", "moving", "vibration_rms_g", "current_a", "temperature_c")
EVENTS = ("occupied", "door_closed", "service_mode", "fault_code")
ENTER, SHUT, GO, STOP, OPEN, LEAVE, OVER = range(7)
TOLD = ((ENTER, 1.0, 0.0), (SHUT, 1.0, 1.0), (OPEN, 1.0, 0.0), (LEAVE, 0.0, 0.0), (OVER, 0.0, 1.0))


def traffic(at: I64) -> F64:
    """Return how likely a slot holds a trip, by local hour: night 0.04, day 0.35, the way to work and home 0.75."""
    hour = (at + LOCAL_MS) % DAY_MS / HOUR_MS
    rush = ((hour >= 7) & (hour < 9)) | ((hour >= 17) & (hour < 20))
    return np.where((hour < 6) | (hour >= 23.5), 0.04, np.where(rush, 0.75, 0.35))


class Trips(msgspec.Struct, frozen=True, eq=False):
    """The rides of some lifts: `slot` [lifts, slots] where there is one, from and to which floor, its times [.., 7]."""

    first: I64  # slot number of the first column, by lift
    rides: Bools
    empty: Bools
    from_floor: I64
    to_floor: I64
    times: I64


class Stands(msgspec.Struct, frozen=True, eq=False):
    """How lifts stand at some times: floor, moving, (last) going up, powered."""

    device: I64
    at: I64
    floor: I64
    moving: Bools
    up: Bools
    powered: Bools

    def take(self, rows: I64) -> Stands:
        """Return some of them, in this order."""
        return Stands(
            self.device[rows], self.at[rows], self.floor[rows], self.moving[rows], self.up[rows], self.powered[rows]
        )


def joined(parts: Sequence[Stands]) -> Stands:
    """Return all of them, one part behind the other."""
    return Stands(
        np.concatenate([part.device for part in parts]),
        np.concatenate([part.at for part in parts]),
        np.concatenate([part.floor for part in parts]),
        np.concatenate([part.moving for part in parts]),
        np.concatenate([part.up for part in parts]),
        np.concatenate([part.powered for part in parts]),
    )


class Lifts:
    """The elevators behind one gateway."""

    def __init__(self, district: District, devices: Sequence[Device]) -> None:
        self.names = tuple(device.id for device in devices)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.floors: I64 = np.array([district.floors[device.building] for device in devices], np.int64)
        self._telemetry = np.array([[name in d.metrics for name in TELEMETRY] for d in devices], bool).reshape(-1, 5)
        self._spoken = np.array([[name in d.event_metrics for name in EVENTS] for d in devices], bool).reshape(-1, 4)
        own = keys(district.seed, self.names)
        self._draw, self._luck, self._noise = stream(own, 1), stream(own, 2), stream(own, 3)
        self._weather = keys(district.seed, ["weather"] * len(devices))
        draw = uniforms(own[:, None], np.arange(8)[None, :])
        self._phase_ms: I64 = (draw[:, 1] * PERIOD_MS).astype(np.int64)
        self._slot_phase_ms: I64 = (draw[:, 2] * SLOT_MS).astype(np.int64)
        self._refresh_ms: I64 = (draw[:, 3] * REFRESH_MS).astype(np.int64)
        self._busy: F64 = BUSY[0] + (BUSY[1] - BUSY[0]) * draw[:, 4]
        self._room_c: F64 = ROOM_C[0] + (ROOM_C[1] - ROOM_C[0]) * draw[:, 5]
        self._floor_ms: I64 = np.array([trip_ms(int(floors)) for floors in self.floors], np.int64)
        self._scripts: dict[tuple[str, str], Script] = {}

    # --- trips ------------------------------------------------------------------------------------------------------

    def trips(self, from_ms: int, to_ms: int) -> Trips:
        """Return every ride that touches [from, to), with the floors each car comes from."""
        first = (from_ms - self._slot_phase_ms) // SLOT_MS
        back = first % HOMING_SLOTS  # the last time it was certainly at home
        ahead = int((to_ms - from_ms) // SLOT_MS) + 2
        most = int(back.max(initial=0)) + ahead
        slot = (first - back)[:, None] + np.arange(most)
        start = slot * SLOT_MS + self._slot_phase_ms[:, None]
        key = self._draw[:, None]
        luck = uniforms(key, 2 * slot)
        homing = slot % HOMING_SLOTS == 0
        moves = homing | (luck < traffic(start) * self._busy[:, None])
        wants = 1 + (noise_bits(key, 2 * slot + 1) % self.floors[:, None].astype(np.uint64)).astype(np.int64)
        there = np.where(homing, 1, wants)
        last = np.maximum.accumulate(np.where(moves, np.arange(most), 0), axis=1)
        ended = np.take_along_axis(there, last, axis=1)
        here = np.concatenate((np.ones((len(slot), 1), np.int64), ended[:, :-1]), axis=1)
        here[:, 0] = np.where(homing[:, 0], self._home(slot[:, 0]), 1)
        shift = back[:, None] + np.arange(ahead)
        start, luck, homing, moves, here, there = (
            np.take_along_axis(part, shift, axis=1) for part in (start, luck, homing, moves, here, there)
        )
        enter = start + (np.where(homing, 0.1, luck) * 20 * SECOND_MS).astype(np.int64)
        return Trips(first, moves & (here != there), homing, here, there, self._times(enter, here, there))

    def _home(self, slot: I64) -> I64:
        """Return the floor each car is brought home from in a homing slot: where its last trip before it ended."""
        before = slot[:, None] - HOMING_SLOTS + 1 + np.arange(HOMING_SLOTS - 1)
        key = self._draw[:, None]
        start = before * SLOT_MS + self._slot_phase_ms[:, None]
        moves = uniforms(key, 2 * before) < traffic(start) * self._busy[:, None]
        wants = 1 + (noise_bits(key, 2 * before + 1) % self.floors[:, None].astype(np.uint64)).astype(np.int64)
        last = np.where(moves, np.arange(HOMING_SLOTS - 1), -1).max(axis=1)
        return np.where(last < 0, 1, np.take_along_axis(wants, np.maximum(last, 0)[:, None], axis=1)[:, 0])

    def _times(self, enter: I64, here: I64, there: I64) -> I64:
        go = enter + 5 * SECOND_MS
        stop = go + 4 * SECOND_MS + np.abs(there - here) * self._floor_ms[:, None]
        return np.stack((enter, enter + 4000, go, stop, stop + 1500, stop + 4000, stop + 9000), axis=2)

    def rides(self, lift: str, from_ms: int, to_ms: int) -> int:
        """Return how many rides a lift begins within [from, to)."""
        trips, number = self.trips(from_ms, to_ms), self.index[lift]
        go = trips.times[number, trips.rides[number], GO]
        return int(((go >= from_ms) & (go < to_ms)).sum())

    # --- what is reported -------------------------------------------------------------------------------------------

    def columns(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Columns]:
        """Return the readings of [from, to), true times: telemetry each minute and on a change, events on change."""
        trips = self.trips(from_ms, to_ms)
        scripts = self._near(from_ms, to_ms, causes)
        rides = self._uncut(trips, scripts)
        telemetry = self._moves(trips, rides, from_ms, to_ms, scripts, causes)
        events = self._events(trips, rides, from_ms, to_ms, scripts)
        found = [only(telemetry, self._telemetry), only(events, self._spoken)]
        said, told = (self._spared(columns, causes) for columns in found)
        return [said, self._revived(told, from_ms, to_ms, causes)]

    def _near(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[tuple[int, Script]]:
        """Return the scripts that are played around [from, to), with their lifts' numbers."""
        found: list[tuple[int, Script]] = []
        for cause in causes:
            if cause.start_ms - NEAR_MS >= to_ms or cause.end_ms + NEAR_MS <= from_ms:
                continue
            here = [name for name in cause.subjects if name in self.index]
            found += [(self.index[name], self._script(cause, name)) for name in here]
        return [(number, play) for number, play in found if play.moments]

    def _script(self, cause: Cause, name: str) -> Script:
        key = cause.id, name
        if key not in self._scripts:
            number = self.index[name]
            trips = self.trips(cause.start_ms - LEAD_MS, cause.start_ms - LEAD_MS + 1)
            codes = bool(self._spoken[number, EVENTS.index("fault_code")])
            floors, floor_ms = int(self.floors[number]), int(self._floor_ms[number])
            self._scripts[key] = script(cause, name, int(trips.from_floor[number, 0]), floors, floor_ms, codes=codes)
        return self._scripts[key]

    def _uncut(self, trips: Trips, scripts: Sequence[tuple[int, Script]]) -> Bools:
        """Return the rides that no script cuts into."""
        rides = trips.rides.copy()
        for number, play in scripts:
            times = trips.times[number]
            rides[number] &= (times[:, OVER] <= play.begin) | (times[:, ENTER] >= play.end)
        return rides

    def _moves(
        self, trips: Trips, rides: Bools, from_ms: int, to_ms: int, scripts: Sequence[tuple[int, Script]],
        causes: Sequence[Cause],
    ) -> Columns:  # fmt: skip
        minutes = self._where(trips, rides, *grid(self._phase_ms, PERIOD_MS, from_ms, to_ms))
        lift, column = np.nonzero(rides)
        here, there = trips.from_floor[lift, column], trips.to_floor[lift, column]
        yes, up = np.ones(len(lift), bool), there > here
        turns = [
            Stands(lift, trips.times[lift, column, GO], here, yes, up, yes),
            Stands(lift, trips.times[lift, column, STOP], there, ~yes, up, yes),
        ]
        stands = joined([minutes, *turns])
        for number, play in scripts:
            _play(play, np.flatnonzero(stands.device == number), stands)
        stands = joined([stands, *(_turns(number, play) for number, play in scripts)])
        stands = stands.take(np.flatnonzero((stands.at >= from_ms) & (stands.at < to_ms)))
        stands = stands.take(np.lexsort((stands.moving, stands.device, stands.at)))
        columns = Columns(Lane.TELEMETRY, self.names, TELEMETRY, stands.device, stands.at, self._values(stands, causes))
        turned = (columns.at - self._phase_ms[columns.device]) % PERIOD_MS != 0  # told until it is heard
        missed: F64 = np.where(turned, 0.0, MISSED)
        return columns.rows(by_luck(uniforms(self._luck[columns.device], columns.at), missed))

    def _where(self, trips: Trips, rides: Bools, device: I64, at: I64) -> Stands:
        """Return how lifts stand at times within the trips' slots."""
        column = (at - self._slot_phase_ms[device]) // SLOT_MS - trips.first[device]
        times = trips.times[device, column]
        here, there = trips.from_floor[device, column], trips.to_floor[device, column]
        up, ride = there > here, rides[device, column]
        moving: Bools = ride & (at >= times[:, GO]) & (at < times[:, STOP])
        passed = np.minimum((at - times[:, GO]) // self._floor_ms[device], np.abs(there - here))
        floor = np.where(moving, here + np.where(up, passed, -passed), here)
        floor = np.where(ride & (at >= times[:, STOP]), there, floor)
        return Stands(device, at, floor, moving, up, np.ones(len(at), bool))

    def _values(self, stands: Stands, causes: Sequence[Cause]) -> F64:
        device, at, moving = stands.device, stands.at, stands.moving
        wobble = uniforms(self._noise[device], at)
        vibration = np.where(moving, 0.02 + 0.03 * wobble, 0.001 + 0.002 * wobble)
        idle = np.where(stands.powered, 0.5 + 0.2 * wobble, 0.0)
        current = np.where(moving, np.where(stands.up, 14.0, 6.0) + 2.0 * wobble, idle)
        heat = self._room_c[device] + air_c(self._weather[device], at) + wobble
        for cause in causes:
            rows = self._rows(cause, device, at)
            if cause.kind == "machine_room_hot":
                heat[rows] = _hot(cause, at[rows], heat[rows])
            elif cause.kind in ("rough_ride", "rough_once"):
                rough = cause.strength["vibration_g"] * (0.9 + 0.2 * wobble[rows])
                vibration[rows] = np.where(moving[rows], rough, vibration[rows])
        told = (stands.floor.astype(float), moving.astype(float), np.round(vibration, 4), np.round(current, 2))
        return np.stack((*told, np.round(heat, 1)), axis=1)

    def _rows(self, cause: Cause, device: I64, at: I64) -> I64:
        during = np.flatnonzero((at >= cause.start_ms) & (at < cause.end_ms))
        return during[np.isin(device[during], [self.index[name] for name in cause.subjects if name in self.index])]

    def _spared(self, columns: Columns, causes: Sequence[Cause]) -> Columns:
        """Leave out what a dead terminal did not say; one that only misses reports goes on telling each change."""
        for cause in causes:
            if cause.kind not in SILENT or (cause.kind == "missed_reports" and columns.lane is Lane.EVENT):
                continue
            rows = self._rows(cause, columns.device, columns.at)
            if cause.kind == "missed_reports":
                rows = rows[(columns.at[rows] - self._phase_ms[columns.device[rows]]) % PERIOD_MS == 0]
            columns = columns.rows(np.delete(np.arange(len(columns.at)), rows))
        return columns

    def _revived(self, told: Columns, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> Columns:
        """Add what a terminal that was dead tells at its power-up: how things stand now."""
        for cause in causes:
            if cause.kind != "device_dead" or not from_ms <= cause.end_ms < to_ms:
                continue
            numbers = [self.index[name] for name in cause.subjects if name in self.index]
            now = self.standing(cause.end_ms, causes)
            now = now.rows(np.flatnonzero(np.isin(now.device, numbers)))
            both = Columns(
                Lane.EVENT, self.names, EVENTS, np.concatenate((told.device, now.device)),
                np.concatenate((told.at, now.at)), np.concatenate((told.values, now.values)),
            )  # fmt: skip
            told = both.rows(np.lexsort((both.device, both.at)))
        return told

    # --- events -----------------------------------------------------------------------------------------------------

    def _events(
        self, trips: Trips, rides: Bools, from_ms: int, to_ms: int, scripts: Sequence[tuple[int, Script]]
    ) -> Columns:
        lift, column = np.nonzero(rides & ~trips.empty)
        times = trips.times[lift, column]
        refreshed, again = grid(self._refresh_ms, REFRESH_MS, from_ms, to_ms)
        told = self._standing(trips, rides, refreshed, again)
        device = np.concatenate((*(lift for _ in TOLD), refreshed))
        at = np.concatenate((*(times[:, moment] for moment, _, _ in TOLD), again))
        occupied = np.concatenate((*(np.full(len(lift), inside) for _, inside, _ in TOLD), told[0]))
        closed = np.concatenate((*(np.full(len(lift), shut) for _, _, shut in TOLD), told[1]))
        code = np.concatenate((np.full(len(TOLD) * len(lift), np.nan), np.zeros(len(again))))
        keep = (at >= from_ms) & (at < to_ms)
        for number, play in scripts:
            keep &= ~((device == number) & (at >= play.begin) & (at < play.end))
        values = np.stack((occupied, closed, np.ones(len(at)), code), axis=1)
        plain = Columns(Lane.EVENT, self.names, EVENTS, device, at, values).rows(keep)
        played = self._played(from_ms, to_ms, scripts)
        both = Columns(
            Lane.EVENT, self.names, EVENTS, np.concatenate((plain.device, played.device)),
            np.concatenate((plain.at, played.at)), np.concatenate((plain.values, played.values)),
        )  # fmt: skip
        return both.rows(np.lexsort((both.device, both.at)))

    def _standing(self, trips: Trips, rides: Bools, device: I64, at: I64) -> tuple[F64, F64]:
        """Return (occupied, doors closed) at times within the trips' slots."""
        column = (at - self._slot_phase_ms[device]) // SLOT_MS - trips.first[device]
        times = trips.times[device, column]
        ride = rides[device, column] & ~trips.empty[device, column]
        inside = ride & (at >= times[:, ENTER]) & (at < times[:, LEAVE])
        opened = ((at >= times[:, ENTER]) & (at < times[:, SHUT])) | ((at >= times[:, OPEN]) & (at < times[:, OVER]))
        return inside.astype(float), 1.0 - (ride & opened).astype(float)

    def _played(self, from_ms: int, to_ms: int, scripts: Sequence[tuple[int, Script]]) -> Columns:
        found: list[Event] = []
        for number, play in scripts:
            begin, end = max(from_ms, play.begin), min(to_ms, play.end)
            _, again = grid(self._refresh_ms[number : number + 1], REFRESH_MS, begin, max(end, begin))
            refreshed = [Event(number, at, _told(play.at(at), play.code(at))) for at in again.tolist()]
            sharp = {at for at, _ in play.codes}
            changes = [Event(number, m.at, _told(m, None)) for m in play.changes if m.at not in sharp]
            codes = [Event(number, at, _told(play.at(at), float(code))) for at, code in play.codes]
            by_time = {event.at: event for event in (*changes, *refreshed, *codes)}
            found += [event for at, event in sorted(by_time.items()) if from_ms <= at < to_ms]
        return from_events(Lane.EVENT, self.names, EVENTS, found)

    def standing(self, at_ms: int, causes: Sequence[Cause]) -> Columns:
        """Return the event values and the codes of all lifts as they stand, as they are told at power-up."""
        device = np.arange(len(self.names))
        at = np.full(len(device), at_ms)
        trips, scripts = self.trips(at_ms, at_ms + 1), self._near(at_ms, at_ms + 1, causes)
        occupied, closed = self._standing(trips, self._uncut(trips, scripts), device, at)
        values = np.stack((occupied, closed, np.ones(len(at)), np.zeros(len(at))), axis=1)
        for number, play in scripts:
            if play.begin <= at_ms < play.end:
                moment = play.at(at_ms)
                values[number] = (moment.occupied, moment.door_closed, moment.mode, play.code(at_ms))
        return only(Columns(Lane.EVENT, self.names, EVENTS, device, at, values), self._spoken)


def _play(play: Script, rows: I64, stands: Stands) -> None:
    """Let a script say how its lift stands while it lasts."""
    for row in rows.tolist():
        if play.begin <= stands.at[row] < play.end:
            moment = play.at(int(stands.at[row]))
            stands.floor[row], stands.moving[row] = moment.floor, moment.moving
            stands.up[row], stands.powered[row] = moment.up, moment.powered


def _turns(number: int, play: Script) -> Stands:
    moments = play.turns
    return Stands(
        np.full(len(moments), number),
        np.array([moment.at for moment in moments], np.int64),
        np.array([moment.floor for moment in moments], np.int64),
        np.array([moment.moving for moment in moments], bool),
        np.array([moment.up for moment in moments], bool),
        np.array([moment.powered for moment in moments], bool),
    )


def _told(moment: Moment, code: float | None) -> dict[str, float]:
    said = {"occupied": float(moment.occupied), "door_closed": float(moment.door_closed), "service_mode": moment.mode}
    return said if code is None else said | {"fault_code": code}  # behind its evidence: guards look at what came before


def _hot(cause: Cause, at: I64, usual: F64) -> F64:
    rise = np.minimum((at - cause.start_ms) / (cause.strength["rise_s"] * SECOND_MS), 1.0)
    return np.where(at < cause.end_ms, usual + (cause.strength["hot_c"] - usual) * rise, usual)

"""Hydrants: pressure with the city's daily rhythm, flow, battery, tilt and cap, and what each cause does to them.

Everything is a function of time, for many devices and times at once (arrays `device`, `at`): nothing has a memory, so
a simulator may start at any moment, and blocks may be cut anywhere. Magnitudes are engineering choices [U] around
docs/domain.md: 0.30 MPa static, noise of a ±0.02 MPa transmitter.

A hydrant on the mains reports each minute, and each 10 s while water flows or it lies on its side. One with a battery
measures each minute and reports every 1 to 24 h; when its own limits are passed it sends the minute before, and then
each minute until all is normal, at most half an hour, and the minute in which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import READING_LANES, Device, Lane
from simulators.causes import LOCAL_MS, Cause, is_battery, report_ms
from simulators.columns import MISSED, Columns, Event, by_luck, from_events, grid, only
from simulators.district import District
from simulators.noise import F64, I64, keys, normals, stream, uniforms

Bools = npt.NDArray[np.bool_]

PERIOD_MS = 60 * SECOND_MS
ACTIVE_MS = 10 * SECOND_MS  # while water flows or it lies on its side
REFRESH_MS = HOUR_MS
ACTIVE_FLOW_LPS, ACTIVE_TILT_DEG = 0.2, 10.0
BATTERY_MISSED = 0.004  # a battery device tries again; what its operator's push loses is pulled

STATIC_MPA = 0.30
ZONE_SPREAD_MPA, HYDRANT_SPREAD_MPA = 0.012, 0.008  # full widths
RHYTHM_MPA, WANDER_MPA, NOISE_MPA = 0.024, 0.004, 0.005
WANDER_MS = 15 * MINUTE_MS
HIGHEST_MPA = 0.34  # at night
LOWEST_MPA = 0.02  # what stands in the pipe when the main is open
JET_MPA, JET_M = 0.04, 120.0  # what a burst takes beside it: loss grows with the square of the flow in its own pipe
EMPTY_MPA = 0.004  # what a dry barrel's sensor says at rest
BATTERY_NEW_V, BATTERY_OLD_V, BATTERY_LIFE_MS = 3.65, 3.42, 4 * 365 * DAY_MS
BATTERY_LIMIT_V = 3.2
AIR_C, AIR_DAY_C, AIR_WANDER_C, AIR_WANDER_MS = 9.0, 3.0, 1.0, 6 * HOUR_MS  # a mild winter: frost is a cause

# A battery device's own limits: what makes it speak at once. [U] typical alarm settings of such devices.
LIMIT_LOW_MPA, LIMIT_HIGH_MPA, LIMIT_STEP_MPA, LIMIT_V, LIMIT_C = 0.15, 0.45, 0.05, 3.25, 1.0
LIVELY_MINUTES, STEP_MINUTES = 30, 10
SPEAKING = frozenset({
    "mains_burst", "pump_failure", "pump_switch", "low_pressure", "illegal_use", "authorised_use", "sprinkler_lorry",
    "brief_opening", "draining", "slow_leak", "freezing", "frost", "battery_low", "cold_battery", "sensor_jump",
    "knocked_over",
})  # fmt: skip
SILENT = frozenset({"device_dead", "missed_reports"})
OPENED = frozenset({"illegal_use", "authorised_use", "sprinkler_lorry", "brief_opening", "draining"})
BEFORE_MS, AFTER_MS = 40 * MINUTE_MS, 20 * MINUTE_MS  # a cause shows within this of its time

TELEMETRY = ("pressure_mpa", "flow_lps", "battery_v", "temperature_c", "water_present", "rssi_dbm")
EVENTS = ("tilt_deg", "cap_open", "impact_g", "hammer_mpa")


class State(msgspec.Struct):
    """Hydrants without measuring noise, one entry a (device, time): MPa, L/s, degrees, 0/1, V, °C, 0/1."""

    pressure_mpa: F64
    flow_lps: F64
    tilt_deg: F64
    cap_open: F64
    battery_v: F64
    temperature_c: F64
    water_present: F64

    @property
    def active(self) -> Bools:
        """Which report every 10 s instead of every 60."""
        return (self.flow_lps > ACTIVE_FLOW_LPS) | (self.tilt_deg > ACTIVE_TILT_DEG)


def demand(at_ms: int) -> float:
    """Return the city's draw at a time, about -1 (night) to 1 (morning and evening peak)."""
    hour = (at_ms + LOCAL_MS) % DAY_MS / HOUR_MS
    morning = math.exp(-(((hour - 7.5) / 1.6) ** 2))
    evening = math.exp(-(((hour - 19.5) / 2.2) ** 2))
    day = 0.45 / (1.0 + math.exp(-(hour - 7.0) * 1.5)) / (1.0 + math.exp((hour - 22.5) * 2.0))
    return 1.9 * min(morning + evening + day, 1.1) - 1.0


# By the minute: arrays of exponentials may differ in their last bit with their length, tables never do.
_DEMAND = np.array([demand(minute * MINUTE_MS) for minute in range(24 * 60)])
_WARMTH = np.array([math.cos((minute - 14 * 60) / 720 * math.pi) for minute in range(1440)])


def demands(at: I64) -> F64:
    """Return the city's draw at many times."""
    return _DEMAND[at % DAY_MS // MINUTE_MS]


def wander(of: npt.NDArray[np.uint64], at: I64, each_ms: int) -> F64:
    """Return slow noise: normal numbers `each_ms` apart with straight lines between."""
    index = at // each_ms
    share = at % each_ms / each_ms
    return normals(of, index) * (1.0 - share) + normals(of, index + 1) * share


def air_c(of: npt.NDArray[np.uint64], at: I64) -> F64:
    """Return the temperature outside: a daily rhythm and weather."""
    daily = AIR_DAY_C * _WARMTH[(at + LOCAL_MS) % DAY_MS // MINUTE_MS]
    return AIR_C + daily + AIR_WANDER_C * wander(of, at, AIR_WANDER_MS)


def trapezoid(at: I64, start_ms: int, end_ms: int, up_ms: float, down_ms: float) -> F64:
    """Return 0 outside [start, end], 1 inside, with a linear rise after the start and fall before the end."""
    return np.clip(np.minimum((at - start_ms) / up_ms, (end_ms - at) / down_ms), 0.0, 1.0)


class Hydrants:
    """The hydrants behind one gateway."""

    def __init__(self, district: District, devices: Sequence[Device]) -> None:
        self.names = tuple(device.id for device in devices)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.spoken = tuple(_spoken(devices, lane) for lane in READING_LANES)
        self._district = district
        own = keys(district.seed, self.names)
        zone = keys(district.seed, [device.zone for device in devices])
        self._noise, self._rest, self._luck, self._zone = stream(own, 1), stream(own, 2), stream(own, 3), zone
        self._weather = keys(district.seed, ["weather"] * len(devices))
        draw = uniforms(own[:, None], np.arange(8)[None, :])
        self.battery: Bools = np.array([is_battery(device) for device in devices], bool)
        self._dry: Bools = np.array(["dry_barrel" in device.tags for device in devices], bool)
        self._report_ms: I64 = np.array([report_ms(device) for device in devices], np.int64)
        self._phase_ms: I64 = (draw[:, 1] * np.where(self.battery, self._report_ms, PERIOD_MS)).astype(np.int64)
        self._refresh_ms: I64 = (draw[:, 2] * REFRESH_MS).astype(np.int64)
        spread = ZONE_SPREAD_MPA * (uniforms(zone, np.full(len(zone), -1)) - 0.5)
        self._base_mpa: F64 = STATIC_MPA + spread + HYDRANT_SPREAD_MPA * (draw[:, 3] - 0.5)
        self._age_ms: I64 = (draw[:, 4] * BATTERY_LIFE_MS).astype(np.int64)
        self._tilt_deg: F64 = 0.3 + draw[:, 5]
        self._calls: dict[str, tuple[I64, I64]] = {}

    # --- what is so -------------------------------------------------------------------------------------------------

    def state(self, device: I64, at: I64, causes: Sequence[Cause] = ()) -> State:
        """Return what is so at some times under the causes that touch these hydrants."""
        zone = self._zone[device]
        age = (at + self._age_ms[device]) % BATTERY_LIFE_MS / BATTERY_LIFE_MS
        state = State(
            self._base_mpa[device] - RHYTHM_MPA * demands(at) + WANDER_MPA * wander(zone, at, WANDER_MS),
            np.zeros(len(at)),
            self._tilt_deg[device],
            np.zeros(len(at)),
            BATTERY_NEW_V - (BATTERY_NEW_V - BATTERY_OLD_V) * age,
            air_c(self._weather[device], at),
            np.zeros(len(at)),
        )
        for cause in causes:
            self._suffer(state, cause, device, at)
        state.pressure_mpa = np.where(self._dry[device], EMPTY_MPA, np.maximum(state.pressure_mpa, LOWEST_MPA))
        return state

    def touched(self, cause: Cause) -> list[int]:
        """Return the numbers of the hydrants here that a cause touches."""
        return [self.index[name] for name in cause.subjects if name in self.index]

    def _rows(self, cause: Cause, device: I64, at: I64, before_ms: int = 0) -> I64:
        """Return the entries that a cause touches while it lasts."""
        during = np.flatnonzero((at >= cause.start_ms - before_ms) & (at < cause.end_ms))
        return during[np.isin(device[during], self.touched(cause))] if len(during) else during

    def _suffer(self, state: State, cause: Cause, device: I64, at: I64) -> None:
        rows = self._rows(cause, device, at, BEFORE_MS if cause.kind == "battery_low" else 0)
        effect = EFFECTS.get(cause.kind)
        if effect is not None and len(rows):
            effect(self, state, cause, rows, device[rows], at[rows])

    def fall_mpa(self, cause: Cause) -> F64:
        """Return by how much a burst takes the highest pressure down at each hydrant: less with every metre of pipe."""
        found = np.zeros(len(self.names))
        for number in self.touched(cause):
            pipe = self._district.pipe_m(cause.centre, self.names[number])
            found[number] = cause.strength["depth_mpa"] * math.exp(-pipe / cause.strength["reach_m"])
            found[number] += JET_MPA * math.exp(-pipe / JET_M)
        return found

    # --- what is measured -------------------------------------------------------------------------------------------

    def _measure(self, device: I64, at: I64, causes: Sequence[Cause]) -> tuple[State, F64]:
        """Return the state, with the pressure as the sensors say it, and the telemetry [n, metrics]."""
        state = self.state(device, at, causes)
        rest, wet = self._rest[device], state.water_present
        pressure = state.pressure_mpa + NOISE_MPA * normals(self._noise[device], at)
        for cause in causes:
            if cause.kind in ("stuck_sensor", "sensor_jump", "drift"):
                rows = self._rows(cause, device, at)
                pressure[rows] = self._defect(cause, device[rows], at[rows], pressure[rows])
        flow = np.maximum(state.flow_lps * (1 + 0.02 * normals(rest, at)), 0.0) + 0.02 * uniforms(rest, at + 1)
        values: F64 = np.stack(
            (
                np.round(np.maximum(pressure, 0.0), 4),
                np.round(flow, 3),
                np.round(state.battery_v + 0.004 * normals(rest, at + 2), 3),
                np.round(state.temperature_c + 0.2 * normals(rest, at + 4), 1),
                wet,
                np.round(-70.0 - 30.0 * uniforms(rest, at // HOUR_MS)),
            ),
            axis=1,
        )
        return state, values

    def _defect(self, cause: Cause, device: I64, at: I64, pressure: F64) -> F64:
        if cause.kind == "sensor_jump":
            return pressure + cause.strength["jump_mpa"]
        if cause.kind == "drift":
            return pressure + cause.strength["creep_mpa"] * (at - cause.start_ms) / (cause.end_ms - cause.start_ms)
        then = np.full(len(at), cause.start_ms)
        return self.state(device, then).pressure_mpa + NOISE_MPA * normals(self._noise[device], then)

    # --- what is reported -------------------------------------------------------------------------------------------

    def columns(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Columns]:
        """Return the readings of [from, to), true times."""
        device, at = self._times(from_ms, to_ms, causes)
        state, values = self._measure(device, at, causes)
        keep = self.battery[device] | ((at - self._phase_ms[device]) % PERIOD_MS == 0) | state.active
        between = np.flatnonzero(~keep)  # one more report tells that it is over
        keep[between] = self.state(device[between], at[between] - ACTIVE_MS, causes).active
        telemetry = Columns(Lane.TELEMETRY, self.names, TELEMETRY, device, at, values).rows(keep)
        luck = uniforms(self._luck[telemetry.device], telemetry.at)
        missed: F64 = np.where(self.battery[telemetry.device], BATTERY_MISSED, MISSED)
        called = (telemetry.at - self._phase_ms[telemetry.device]) % self._report_ms[telemetry.device] != 0
        missed[self.battery[telemetry.device] & called] = 0.0  # alarms are confirmed
        telemetry = telemetry.rows(by_luck(luck, missed))
        found = [only(telemetry, self.spoken[Lane.TELEMETRY]), self._events(from_ms, to_ms, causes)]
        return [self._spared(columns, causes) for columns in found]

    def _times(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> tuple[I64, I64]:
        """Return (device, time) of every telemetry report there may be: on the grids, and when batteries call."""
        found = [self._grid(from_ms, to_ms)]
        for cause in causes:
            calling, mains = self._called(cause), [n for n in self.touched(cause) if not self.battery[n]]
            during = (calling[1] >= from_ms) & (calling[1] < to_ms)
            found.append((calling[0][during], calling[1][during]))
            start, end = max(from_ms, cause.start_ms), min(to_ms, cause.end_ms + ACTIVE_MS)
            if mains and start < end:
                device, at = grid(self._phase_ms[mains], ACTIVE_MS, start, end)
                found.append((np.array(mains, np.int64)[device], at))
        device, at = (np.concatenate(part) for part in zip(*found, strict=True))
        both = np.unique(np.stack((at, device)), axis=1)
        return both[1], both[0]

    def _grid(self, from_ms: int, to_ms: int) -> tuple[I64, I64]:
        parts = []
        for period in np.unique(self._report_ms).tolist():
            numbers = np.flatnonzero(self._report_ms == period)
            device, at = grid(self._phase_ms[numbers], period, from_ms, to_ms)
            parts.append((numbers[device], at))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _called(self, cause: Cause) -> tuple[I64, I64]:
        """Return (device, time) of what battery devices report because a cause passes their own limits."""
        found = self._calls.get(cause.id)
        if found is None:
            numbers = np.array([n for n in self.touched(cause) if self.battery[n]], np.int64)
            if cause.kind not in SPEAKING or not len(numbers):
                numbers = np.empty(0, np.int64)
            found = self._calls[cause.id] = self._call(cause, numbers)
        return found

    def _call(self, cause: Cause, numbers: I64) -> tuple[I64, I64]:
        device, at = grid(
            self._phase_ms[numbers] % MINUTE_MS, MINUTE_MS, cause.start_ms - BEFORE_MS, cause.end_ms + AFTER_MS
        )
        state, values = self._measure(numbers[device], at, (cause,))
        pressure, battery, temperature = values[:, 0], values[:, 2], values[:, 3]
        passed = np.stack(
            (
                ~self._dry[numbers[device]] & (pressure < LIMIT_LOW_MPA),
                pressure > LIMIT_HIGH_MPA,
                battery < LIMIT_V,
                temperature < LIMIT_C,
                state.tilt_deg > ACTIVE_TILT_DEG,
                state.cap_open > 0,
                state.water_present > 0,
            )
        )
        said_device, said_at = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for place, number in enumerate(numbers.tolist()):
            rows = np.flatnonzero(device == place)
            step = np.abs(np.diff(pressure[rows], prepend=pressure[rows[:1]])) >= LIMIT_STEP_MPA
            minutes = lively(passed[:, rows], step)
            said_device.append(np.full(len(minutes), number))
            said_at.append(at[rows][minutes])
        return np.concatenate(said_device), np.concatenate(said_at)

    def _spared(self, columns: Columns, causes: Sequence[Cause]) -> Columns:
        """Leave out what a dead or failing device did not say."""
        for cause in causes:
            if cause.kind in SILENT:
                rows = self._rows(cause, columns.device, columns.at)
                columns = columns.rows(np.delete(np.arange(len(columns.at)), rows))
        return columns

    # --- events -----------------------------------------------------------------------------------------------------

    def _events(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> Columns:
        mains = np.flatnonzero(~self.battery)
        device, at = grid(self._refresh_ms[mains], REFRESH_MS, from_ms, to_ms)
        events: dict[tuple[int, int], dict[str, float]] = {
            key: {} for key in zip(at.tolist(), mains[device].tolist(), strict=True)
        }
        for cause in causes:
            for number in self.touched(cause):
                for t, said in moments(cause):
                    if from_ms <= t < to_ms:
                        events.setdefault((t, number), {}).update(said)
        order = sorted(events)
        numbers, when = np.array([n for _, n in order], np.int64), np.array([t for t, _ in order], np.int64)
        standing = self.standing(numbers, when, causes)
        sharp = from_events(Lane.EVENT, self.names, EVENTS, [Event(n, t, events[t, n]) for t, n in order])
        values = np.where(np.isnan(sharp.values), standing.values, sharp.values)
        return only(msgspec.structs.replace(standing, values=values), self.spoken[Lane.EVENT])

    def standing(self, device: I64, at: I64, causes: Sequence[Cause]) -> Columns:
        """Return tilt and cap as they stand, as they are told on a change, on the hour and at power-up."""
        state = self.state(device, at, causes)
        tilt = np.round(state.tilt_deg + 0.2 * uniforms(self._rest[device], at + 3), 1)
        nothing = np.full(len(at), np.nan)
        values = np.stack((tilt, state.cap_open, nothing, nothing), axis=1)
        return only(Columns(Lane.EVENT, self.names, EVENTS, device, at, values), self.spoken[Lane.EVENT])


def _spoken(devices: Sequence[Device], lane: Lane) -> Bools:
    if lane is Lane.TELEMETRY:
        return np.array([[name in device.metrics for name in TELEMETRY] for device in devices], bool).reshape(-1, 6)
    return np.array([[name in device.event_metrics for name in EVENTS] for device in devices], bool).reshape(-1, 4)


def lively(passed: Bools, step: Bools) -> I64:
    """Return the minutes that a battery device reports, given in which each limit is passed, or pressure stepped.

    For each: the minute before it noticed, each minute until it is normal or half an hour over, and the first normal
    one. passed: [limits, minutes].
    """
    stepped = np.zeros(len(step), bool)
    for minute in np.flatnonzero(step).tolist():
        stepped[minute : minute + STEP_MINUTES] = True
    found: set[int] = set()
    for calls in (*passed, stepped):
        edges = np.diff(calls.astype(np.int8), prepend=0, append=0)
        for start, end in zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True):
            found.update(range(start - 1, min(end, start + LIVELY_MINUTES)))
            found.add(end)
    return np.array(sorted(minute for minute in found if 0 <= minute < len(step)), np.int64)


IMPACT_OVER_MS, STROKE_OVER_MS = 5 * SECOND_MS, 2 * SECOND_MS


def moments(cause: Cause) -> list[tuple[int, dict[str, float]]]:
    """Return when a hydrant that a cause touches sends an event, and what is in it besides tilt and cap."""
    start, end, strength = cause.start_ms, cause.end_ms, cause.strength
    if cause.kind in ("knocked_over", "bump"):
        sharp = {"impact_g": round(strength["impact_g"], 1)}
        over = (min(start + IMPACT_OVER_MS, end - 1), {"impact_g": 0.0})
        return [(start, sharp), over, (end, {})]
    if cause.kind == "draining":
        return [(start, {}), (start + round(strength["open_s"] * SECOND_MS), {})]
    if cause.kind in OPENED:
        return [(start, {}), (end, {})]
    if cause.kind in ("water_hammer", "single_hammer"):
        apart = round(strength["apart_s"] * SECOND_MS)
        strokes = [start + number * apart for number in range(int(strength["strokes"]))]
        hit = {"hammer_mpa": round(strength["hammer_mpa"], 3)}
        return [(at, hit) for at in strokes] + [(at + STROKE_OVER_MS, {"hammer_mpa": 0.0}) for at in strokes]
    return []


# --- what each cause does -------------------------------------------------------------------------------------------

Effect = Callable[[Hydrants, State, Cause, I64, I64, I64], None]  # rows of the state, their devices and times


def _burst(group: Hydrants, state: State, cause: Cause, rows: I64, device: I64, at: I64) -> None:
    share = trapezoid(at, cause.start_ms, cause.end_ms, 45 * SECOND_MS, 2 * MINUTE_MS)
    state.pressure_mpa[rows] *= 1.0 - group.fall_mpa(cause)[device] / HIGHEST_MPA * share


def _pump_failure(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    share = trapezoid(at, cause.start_ms, cause.end_ms, MINUTE_MS, 2 * MINUTE_MS)
    state.pressure_mpa[rows] -= cause.strength["sag_mpa"] * share


def _pump_switch(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    sign = -1.0 if cause.strength["down"] < 0.7 else 1.0
    share = trapezoid(at, cause.start_ms, cause.end_ms, 15 * SECOND_MS, 15 * SECOND_MS)
    state.pressure_mpa[rows] += sign * cause.strength["step_mpa"] * share


def _low_pressure(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    share = trapezoid(at, cause.start_ms, cause.end_ms, MINUTE_MS, MINUTE_MS)
    state.pressure_mpa[rows] += (cause.strength["level_mpa"] - state.pressure_mpa[rows]) * share


def _knocked_over(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    strength = cause.strength
    stops = min(cause.start_ms + round(strength["flow_s"] * SECOND_MS), cause.end_ms)
    share = trapezoid(at, cause.start_ms, stops, 2 * SECOND_MS, MINUTE_MS)
    state.tilt_deg[rows] = strength["tilt_deg"]
    state.flow_lps[rows] = strength["flow_lps"] * share
    state.pressure_mpa[rows] -= strength["dip_mpa"] * share


def _bump(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, ___: I64) -> None:
    state.tilt_deg[rows] = cause.strength["tilt_deg"]


def _opened(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    strength = cause.strength
    end = min(cause.start_ms + round(strength.get("open_s", 1e9) * SECOND_MS), cause.end_ms)
    slope = min(5 * SECOND_MS, (end - cause.start_ms) // 4)
    share = trapezoid(at, cause.start_ms, end - slope, slope, slope)
    state.cap_open[rows] = np.where(at < end, 1.0, 0.0)
    state.flow_lps[rows] = strength["flow_lps"] * share
    state.pressure_mpa[rows] -= strength["dip_mpa"] * share
    if cause.kind == "draining":
        state.water_present[rows] = 1.0


def _leak(_: Hydrants, state: State, __: Cause, rows: I64, ___: I64, ____: I64) -> None:
    state.water_present[rows] = 1.0


def _cold(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    slope = (cause.end_ms - cause.start_ms) / 5
    share = trapezoid(at, cause.start_ms, cause.end_ms, slope, slope)
    state.temperature_c[rows] += (cause.strength["low_c"] - state.temperature_c[rows]) * share
    if "rise_mpa" in cause.strength:  # ice takes more room than water
        frozen = trapezoid(at, cause.start_ms + round(slope), cause.end_ms, slope, slope)
        state.pressure_mpa[rows] += cause.strength["rise_mpa"] * frozen


def _battery_low(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    """A dying cell: full half an hour before the cause, at the limit when it begins, low 20 min later."""
    before = np.clip((cause.start_ms - at) / (30 * MINUTE_MS), 0.0, 1.0)
    after = np.clip((at - cause.start_ms) / (20 * MINUTE_MS), 0.0, 1.0)
    full = BATTERY_LIMIT_V + (state.battery_v[rows] - BATTERY_LIMIT_V) * before
    low = BATTERY_LIMIT_V + (cause.strength["low_v"] - BATTERY_LIMIT_V) * after
    state.battery_v[rows] = np.where(at < cause.start_ms, full, low)


def _cold_battery(_: Hydrants, state: State, cause: Cause, rows: I64, __: I64, at: I64) -> None:
    if cause.strength["dips"] < 0.5:
        dips = at < cause.start_ms + round(cause.strength["dip_s"] * SECOND_MS)
        state.battery_v[rows] = np.where(dips, cause.strength["low_v"], state.battery_v[rows])
    else:
        state.battery_v[rows] = np.minimum(state.battery_v[rows], cause.strength["above_v"])


EFFECTS: dict[str, Effect] = {
    "mains_burst": _burst,
    "pump_failure": _pump_failure,
    "pump_switch": _pump_switch,
    "low_pressure": _low_pressure,
    "knocked_over": _knocked_over,
    "bump": _bump,
    "slow_leak": _leak,
    "freezing": _cold,
    "frost": _cold,
    "battery_low": _battery_low,
    "cold_battery": _cold_battery,
    **dict.fromkeys(sorted(OPENED), _opened),
}

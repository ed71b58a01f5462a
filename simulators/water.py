"""Hydrants: pressure with the city's daily rhythm, flow, battery, tilt and cap, and what each cause does to them.

Everything is a function of time: a hydrant has no memory, so a simulator may start at any moment. Magnitudes are
engineering choices around docs/domain.md: 0.30 MPa static, noise of a ±0.02 MPa transmitter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Device, Lane, Reading
from simulators.faults import Cause
from simulators.noise import Noise

Emitted = tuple[Lane, Reading]

PERIOD_MS = 60 * SECOND_MS  # at rest; a battery device of the mains-fed kind
ACTIVE_MS = 10 * SECOND_MS  # while water flows or it lies on its side
REFRESH_MS = HOUR_MS
ACTIVE_FLOW_LPS = 0.2
MISSED, REPEATED = 0.015, 0.005  # shares of telemetry reports; events are confirmed and come

STATIC_MPA = 0.30
ZONE_SPREAD_MPA, HYDRANT_SPREAD_MPA = 0.012, 0.008  # full widths
RHYTHM_MPA, WANDER_MPA, NOISE_MPA = 0.024, 0.004, 0.005
WANDER_MS = 15 * MINUTE_MS
LOWEST_MPA = 0.02  # what stands in the pipe when the main is open
LOCAL_MS = 8 * HOUR_MS  # the district keeps UTC+8
BATTERY_NEW_V, BATTERY_OLD_V, BATTERY_LIFE_MS = 3.65, 3.42, 4 * 365 * DAY_MS
BATTERY_LIMIT_V = 3.2


class State(msgspec.Struct):
    """A hydrant without measuring noise: MPa, L/s, degrees, 0/1, V."""

    pressure_mpa: float
    flow_lps: float
    tilt_deg: float
    cap_open: float
    battery_v: float

    @property
    def active(self) -> bool:
        """Whether it reports every 10 s instead of every 60."""
        return self.flow_lps > ACTIVE_FLOW_LPS or self.tilt_deg > 10.0


def demand(at_ms: int) -> float:
    """Return the city's draw at a time, about -1 (night) to 1 (morning and evening peak)."""
    hour = (at_ms + LOCAL_MS) % DAY_MS / HOUR_MS
    morning = math.exp(-(((hour - 7.5) / 1.6) ** 2))
    evening = math.exp(-(((hour - 19.5) / 2.2) ** 2))
    day = 0.45 / (1.0 + math.exp(-(hour - 7.0) * 1.5)) / (1.0 + math.exp((hour - 22.5) * 2.0))
    return 1.9 * min(morning + evening + day, 1.1) - 1.0


def trapezoid(at_ms: int, start_ms: int, end_ms: int, up_ms: int, down_ms: int) -> float:
    """Return 0 outside [start, end], 1 inside, with a linear rise after the start and fall before the end."""
    if at_ms <= start_ms or at_ms >= end_ms:
        return 0.0
    return min((at_ms - start_ms) / up_ms, (end_ms - at_ms) / down_ms, 1.0)


class Hydrant:
    """One hydrant's sensors. `near_m` is its distance to any centre of a burst in its zone."""

    def __init__(self, seed: int, device: Device, near_m: dict[str, float]) -> None:
        self.id = device.id
        own = Noise(seed, device.id)
        zone = Noise(seed, device.zone)
        self._near_m = near_m
        self._zone = zone
        self._pressure = Noise(seed, f"{device.id}/pressure")
        self._rest = Noise(seed, f"{device.id}/rest")
        self._luck = Noise(seed, f"{device.id}/luck")
        self._phase_ms = int(own.uniform(1) * PERIOD_MS)
        self._refresh_ms = int(own.uniform(2) * REFRESH_MS)
        self._base_mpa = (
            STATIC_MPA + ZONE_SPREAD_MPA * (zone.uniform(-1) - 0.5) + HYDRANT_SPREAD_MPA * (own.uniform(3) - 0.5)
        )
        self._age_ms = int(own.uniform(4) * BATTERY_LIFE_MS)
        self._tilt_deg = 0.3 + own.uniform(5)
        self._causes: Sequence[Cause] = ()  # most calls ask for seconds in which nothing is due: we know until when
        self._quiet_from_ms = self._quiet_until_ms = -1

    # --- what is so -----------------------------------------------------------------------------------------------

    def state(self, at_ms: int, causes: Sequence[Cause] = ()) -> State:
        """Return what is so at a time under the causes that touch this hydrant."""
        index, part = divmod(at_ms, WANDER_MS)
        mix = part / WANDER_MS
        wander = WANDER_MPA * (self._zone.normal(index) * (1 - mix) + self._zone.normal(index + 1) * mix)
        age = (at_ms + self._age_ms) % BATTERY_LIFE_MS / BATTERY_LIFE_MS
        state = State(
            self._base_mpa - RHYTHM_MPA * demand(at_ms) + wander,
            0.0,
            self._tilt_deg,
            0.0,
            BATTERY_NEW_V - (BATTERY_NEW_V - BATTERY_OLD_V) * age,
        )
        for cause in causes:
            if cause.start_ms - HOUR_MS < at_ms <= cause.end_ms:
                self._suffer(state, cause, at_ms)
        state.pressure_mpa = max(state.pressure_mpa, LOWEST_MPA)
        return state

    def _suffer(self, state: State, cause: Cause, at_ms: int) -> None:
        strength, start, end = cause.strength, cause.start_ms, cause.end_ms
        holds = start <= at_ms < end
        match cause.kind:
            case "mains_burst":
                fall = strength["depth_mpa"] * math.exp(-self._near_m[cause.centre] / strength["reach_m"])
                state.pressure_mpa -= fall * trapezoid(at_ms, start, end, 45 * SECOND_MS, 2 * MINUTE_MS)
            case "low_pressure":
                share = trapezoid(at_ms, start, end, MINUTE_MS, MINUTE_MS)
                state.pressure_mpa += (strength["level_mpa"] - state.pressure_mpa) * share
            case "knocked_over" if holds:
                state.tilt_deg = strength["tilt_deg"]
                share = trapezoid(at_ms, start, min(start + round(strength["flow_s"] * 1000), end), 2000, 60_000)
                state.flow_lps = strength["flow_lps"] * share
                state.pressure_mpa -= strength["dip_mpa"] * share
            case "illegal_use" | "authorised_use" if holds:
                state.cap_open = 1.0
                share = trapezoid(at_ms, start, end - 5 * SECOND_MS, 5 * SECOND_MS, 5 * SECOND_MS)
                state.flow_lps = strength["flow_lps"] * share
                state.pressure_mpa -= strength["dip_mpa"] * share
            case "battery_low":
                state.battery_v = _sinking(state.battery_v, strength["low_v"], at_ms - start)
            case _:
                pass

    # --- what is reported -----------------------------------------------------------------------------------------

    def reports(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Emitted]:
        """Return the readings of [from, to), true times: telemetry on both grids, events on change and each hour."""
        if causes is self._causes and self._quiet_from_ms <= from_ms and to_ms <= self._quiet_until_ms:
            return []
        near = [c for c in causes if c.start_ms - HOUR_MS < to_ms and from_ms < c.end_ms + PERIOD_MS]
        step_ms = ACTIVE_MS if near else PERIOD_MS
        found: list[Emitted] = []
        for at_ms in range(_first(from_ms, self._phase_ms, step_ms), to_ms, step_ms):
            self._telemetry(found, at_ms, near)
        self._events(found, from_ms, to_ms, near)
        self._causes, self._quiet_from_ms = causes, to_ms
        self._quiet_until_ms = to_ms if near else self._next(to_ms, causes)
        return found

    def _next(self, from_ms: int, causes: Sequence[Cause]) -> int:
        """Return the next time that a quiet hydrant has something to say, or a cause comes near."""
        times = [_first(from_ms, self._phase_ms, PERIOD_MS), _first(from_ms, self._refresh_ms, REFRESH_MS)]
        return min(times + [cause.start_ms - HOUR_MS for cause in causes if cause.end_ms > from_ms])

    def _telemetry(self, found: list[Emitted], at_ms: int, causes: Sequence[Cause]) -> None:
        luck = self._luck.uniform(at_ms)
        if luck < MISSED:
            return
        state = self.state(at_ms, causes)
        if (at_ms - self._phase_ms) % PERIOD_MS and not state.active:
            return
        values = {
            "pressure_mpa": round(state.pressure_mpa + NOISE_MPA * self._pressure.normal(at_ms), 4),
            "flow_lps": round(
                max(state.flow_lps * (1 + 0.02 * self._rest.normal(at_ms)), 0.0) + 0.02 * self._rest.uniform(at_ms + 1),
                3,
            ),
            "battery_v": round(state.battery_v + 0.004 * self._rest.normal(at_ms + 2), 3),
        }
        reading = (Lane.TELEMETRY, Reading(self.id, at_ms, values))
        found.append(reading)
        if luck > 1.0 - REPEATED:
            found.append(reading)

    def _events(self, found: list[Emitted], from_ms: int, to_ms: int, causes: Sequence[Cause]) -> None:
        times = set(range(_first(from_ms, self._refresh_ms, REFRESH_MS), to_ms, REFRESH_MS))
        for cause in causes:
            if cause.kind in ("knocked_over", "illegal_use", "authorised_use"):
                times.update(at for at in (cause.start_ms, cause.end_ms) if from_ms <= at < to_ms)
        found += [self.standing(at_ms, causes) for at_ms in sorted(times)]

    def standing(self, at_ms: int, causes: Sequence[Cause]) -> Emitted:
        """Return the event values as they stand, as they are told on a change, on the hour and at power-up."""
        state = self.state(at_ms, causes)
        tilt = round(state.tilt_deg + 0.2 * self._rest.uniform(at_ms + 3), 1)
        return Lane.EVENT, Reading(self.id, at_ms, {"tilt_deg": tilt, "cap_open": state.cap_open})


def _sinking(full_v: float, low_v: float, after_ms: int) -> float:
    """Return the voltage of a dying cell: full half an hour before 0, at the limit at 0, low 20 min later."""
    if after_ms < 0:
        return BATTERY_LIMIT_V + (full_v - BATTERY_LIMIT_V) * min(-after_ms / (30 * MINUTE_MS), 1.0)
    return BATTERY_LIMIT_V + (low_v - BATTERY_LIMIT_V) * min(after_ms / (20 * MINUTE_MS), 1.0)


def _first(from_ms: int, phase_ms: int, step_ms: int) -> int:
    """Return the first time >= `from_ms` on the grid of `step_ms` through `phase_ms`."""
    return from_ms + (phase_ms - from_ms) % step_ms

"""Pump rooms: pressure and flow of the zone they feed, the motor's current and vibration, water on the floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from citybrain.clock import SECOND_MS
from citybrain.model import Device, Lane
from simulators.causes import Cause
from simulators.columns import Columns, by_luck, grid, only
from simulators.district import District
from simulators.noise import F64, I64, keys, normals, stream, uniforms
from simulators.water import SILENT, demands, trapezoid

PERIOD_MS = 30 * SECOND_MS
OUTLET_MPA, DEMAND_MPA = 0.42, 0.02
FLOW_LPS, DEMAND_LPS = 30.0, 15.0
CURRENT_A, VIBRATION_G = 38.0, 0.06
SUMP_M = 0.03  # what always stands in the drain
TELEMETRY = ("pressure_mpa", "flow_lps", "current_a", "vibration_rms_g", "level_m")
PRESSURE, FLOW, CURRENT, VIBRATION, LEVEL = range(5)
FAILING_MS = 20 * SECOND_MS


class Pumps:
    """The pump rooms behind one gateway."""

    def __init__(self, district: District, devices: Sequence[Device]) -> None:
        self.names = tuple(device.id for device in devices)
        self.index = {name: number for number, name in enumerate(self.names)}
        self._telemetry = np.array([[name in d.metrics for name in TELEMETRY] for d in devices], bool).reshape(-1, 5)
        own = keys(district.seed, self.names)
        self._noise, self._luck = stream(own, 1), stream(own, 2)
        draw = uniforms(own[:, None], np.arange(3)[None, :])
        self._phase_ms: I64 = (draw[:, 1] * PERIOD_MS).astype(np.int64)
        self._size: F64 = 0.8 + 0.4 * draw[:, 2]

    def columns(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Columns]:
        """Return the readings of [from, to), true times."""
        device, at = grid(self._phase_ms, PERIOD_MS, from_ms, to_ms)
        values = self._running(device, at)
        for cause in causes:
            rows = self._rows(cause, device, at)
            if len(rows):
                values[rows] = _fail(cause, values[rows], at[rows])
        found = Columns(Lane.TELEMETRY, self.names, TELEMETRY, device, at, np.round(values, 4))
        found = found.rows(by_luck(uniforms(self._luck[device], at)))
        for cause in causes:
            if cause.kind in SILENT:
                silent = self._rows(cause, found.device, found.at)
                found = found.rows(np.delete(np.arange(len(found.at)), silent))
        return [only(found, self._telemetry)]

    def _running(self, device: I64, at: I64) -> F64:
        draw, size = demands(at), self._size[device]
        load = (FLOW_LPS + DEMAND_LPS * draw) * size
        return np.stack(
            (
                OUTLET_MPA - DEMAND_MPA * draw + 0.004 * normals(self._noise[device], at),
                load * (1.0 + 0.02 * normals(self._noise[device], at + 1)),
                CURRENT_A * size * (0.8 + 0.2 * draw) * (1.0 + 0.01 * normals(self._noise[device], at + 2)),
                VIBRATION_G * (0.8 + 0.4 * uniforms(self._noise[device], at + 3)),
                SUMP_M * (0.8 + 0.4 * uniforms(self._noise[device], at + 4)),
            ),
            axis=1,
        )

    def _rows(self, cause: Cause, device: I64, at: I64) -> I64:
        number = self.index.get(cause.centre, -1)
        return np.flatnonzero((device == number) & (at >= cause.start_ms) & (at < cause.end_ms))


def _fail(cause: Cause, values: F64, at: I64) -> F64:
    strength = cause.strength
    if cause.kind == "pump_failure":
        share = trapezoid(at, cause.start_ms, cause.end_ms, FAILING_MS, FAILING_MS)
        left = 1.0 - share * (1.0 - strength["current_share"])
        values[:, PRESSURE] += (strength["pump_mpa"] - values[:, PRESSURE]) * share
        values[:, FLOW] *= left
        values[:, CURRENT] *= left
        values[:, VIBRATION] *= left
    elif cause.kind == "pump_room_flood":
        rise = strength["rise_s"] * SECOND_MS
        values[:, LEVEL] += strength["level_m"] * trapezoid(at, cause.start_ms, cause.end_ms, rise, rise / 3)
    return values

"""Cameras: the health of the picture each minute, and what is seen in it while it is there.

Shares are of the normal picture: `sharpness` 1 in focus, `view_shift` 0 where it should look, `motion` the share of the
picture that changes (a live sensor's noise is never 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Device, Lane
from simulators.causes import LOCAL_MS, Cause
from simulators.columns import Columns, Event, by_luck, from_events, grid, only
from simulators.district import District
from simulators.noise import F64, I64, keys, stream, uniforms
from simulators.water import SILENT

PERIOD_MS = MINUTE_MS
SCENE_MS = 30 * SECOND_MS
FPS = 25.0
DAY_BRIGHT, NIGHT_BRIGHT = 0.55, 0.14  # street lamps
TELEMETRY = ("signal", "frame_rate_fps", "brightness", "sharpness", "view_shift", "motion")
EVENTS = ("garbage_s", "stall_s", "lane_blocked_s", "crowd")
SCENES = {
    "exposed_garbage": "garbage_s", "sweeping": "garbage_s", "illegal_stall": "stall_s", "short_stop": "stall_s",
    "fire_lane_blocked": "lane_blocked_s", "lorry": "lane_blocked_s", "crowd": "crowd",
}  # fmt: skip


def daylight(at: I64) -> F64:
    """Return 0 at night, 1 by day, with an hour of dusk and dawn."""
    hour = (at + LOCAL_MS) % DAY_MS / HOUR_MS
    return np.clip(np.minimum(hour - 6.0, 18.5 - hour), 0.0, 1.0)


class Cameras:
    """The cameras behind one gateway."""

    def __init__(self, district: District, devices: Sequence[Device]) -> None:
        self.names = tuple(device.id for device in devices)
        self.index = {name: number for number, name in enumerate(self.names)}
        self._telemetry = np.array([[name in d.metrics for name in TELEMETRY] for d in devices], bool).reshape(-1, 6)
        self._spoken = np.array([[name in d.event_metrics for name in EVENTS] for d in devices], bool).reshape(-1, 4)
        own = keys(district.seed, self.names)
        self._noise, self._luck = stream(own, 1), stream(own, 2)
        draw = uniforms(own[:, None], np.arange(4)[None, :])
        self._phase_ms: I64 = (draw[:, 1] * PERIOD_MS).astype(np.int64)
        self._bright: F64 = 0.85 + 0.3 * draw[:, 2]
        self._busy: F64 = 0.3 + 0.7 * draw[:, 3]

    def columns(self, from_ms: int, to_ms: int, causes: Sequence[Cause]) -> list[Columns]:
        """Return the readings of [from, to), true times."""
        device, at = grid(self._phase_ms, PERIOD_MS, from_ms, to_ms)
        telemetry = Columns(Lane.TELEMETRY, self.names, TELEMETRY, device, at, self._picture(device, at, causes))
        telemetry = telemetry.rows(by_luck(uniforms(self._luck[device], at)))
        events = [event for cause in causes for event in self._scene(cause) if from_ms <= event.at < to_ms]
        found = [
            only(telemetry, self._telemetry),
            only(from_events(Lane.EVENT, self.names, EVENTS, events), self._spoken),
        ]
        return [self._spared(columns, causes) for columns in found]

    def _picture(self, device: I64, at: I64, causes: Sequence[Cause]) -> F64:
        one, two, three = (uniforms(stream(self._noise[device], number), at) for number in (1, 2, 3))
        light = daylight(at)
        values = np.stack(
            (
                np.ones(len(at)),
                FPS - 0.5 * one,
                (NIGHT_BRIGHT + (DAY_BRIGHT - NIGHT_BRIGHT) * light) * self._bright[device] * (0.9 + 0.2 * two),
                0.9 + 0.2 * three,
                0.03 * one,
                0.01 + (0.02 + 0.2 * (0.2 + 0.8 * light) * self._busy[device]) * two,
            ),
            axis=1,
        )
        for cause in causes:
            rows = self._rows(cause, device, at)
            if len(rows):
                values[rows] = _spoil(cause, values[rows], light[rows])
        return np.round(values, 4)

    def _rows(self, cause: Cause, device: I64, at: I64) -> I64:
        number = self.index.get(cause.centre, -1)
        return np.flatnonzero((device == number) & (at >= cause.start_ms) & (at < cause.end_ms))

    def _scene(self, cause: Cause) -> list[Event]:
        """Return what is told while something is in the picture: each half minute how long, and 0 when it is gone."""
        metric, number = SCENES.get(cause.kind), self.index.get(cause.centre, -1)
        if metric is None or number < 0:
            return []
        times = range(cause.start_ms, cause.end_ms, SCENE_MS)
        said = [cause.strength.get("crowd", (at - cause.start_ms) / SECOND_MS) for at in times]
        seen = [Event(number, at, {metric: round(value, 3)}) for at, value in zip(times, said, strict=True)]
        return [*seen, Event(number, cause.end_ms, {metric: 0.0})]

    def _spared(self, columns: Columns, causes: Sequence[Cause]) -> Columns:
        """Leave out what a dead or failing camera did not say."""
        for cause in causes:
            if cause.kind in SILENT:
                rows = self._rows(cause, columns.device, columns.at)
                columns = columns.rows(np.delete(np.arange(len(columns.at)), rows))
        return columns

    def standing(self, at_ms: int, causes: Sequence[Cause]) -> Columns:
        """Return what is in the picture now, as it is told at power-up: 0 where nothing is."""
        events = []
        for number in range(len(self.names)):
            seen = dict.fromkeys(EVENTS, 0.0)
            for cause in causes:
                metric = SCENES.get(cause.kind)
                if metric and self.index.get(cause.centre) == number and cause.start_ms <= at_ms < cause.end_ms:
                    seen[metric] = round(cause.strength.get("crowd", (at_ms - cause.start_ms) / SECOND_MS), 3)
            events.append(Event(number, at_ms, seen))
        return only(from_events(Lane.EVENT, self.names, EVENTS, events), self._spoken)


SIGNAL, FRAMES, BRIGHT, SHARP, SHIFT, MOTION = range(6)


def _spoil(cause: Cause, values: F64, light: F64) -> F64:
    """Return what a cause makes of the picture."""
    strength = cause.strength
    match cause.kind:
        case "camera_lost":
            values[:] = 0.0
        case "camera_frozen":
            values[:, MOTION] = 0.0
        case "camera_dirty":
            values[:, SHARP] *= strength["sharpness"]
            values[:, MOTION] *= 0.5
        case "camera_dark":
            values[:, BRIGHT] = strength["brightness"] * (0.5 + 0.5 * values[:, SHARP])
            values[:, MOTION] *= 0.2
        case "camera_moved":
            values[:, SHIFT] += strength["view_shift"] * 0.97
        case "night":  # the lamp is broken: dark, as nights are, with noise and a picture
            dark = light == 0.0
            values[dark, BRIGHT] = strength["brightness"] * (0.9 + 0.2 * values[dark, SHARP])
        case "lorry" if strength["hides"] >= 0.5:
            values[:, SHARP] *= 0.35
            values[:, SHIFT] += 0.5
            values[:, MOTION] *= 0.3
        case _:
            pass
    return values

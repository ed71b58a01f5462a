"""A lift that tells nothing, seen by a kit on its car: what the kit's samples say, and what of it is told; pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.lifts.cabin import Cabin, Delays, Trap
from edge.lifts.shaft import Shaft, Travel
from edge.report import Report, Reporter

NORMAL, INSPECTION = 1, 2  # of `service_mode`
SAME_SAMPLES = 400  # 20 s of acceleration or 80 s of air without the least noise is no measurement
PLAUSIBLE_PA = (30_000.0, 115_000.0)
PLAUSIBLE_G = (-4.0, 4.0)
WORST_AFTER_S = 5.0  # without a sample of the one kind

Said = list[tuple[Lane, Reading]]


class Sample(msgspec.Struct, frozen=True):
    """What the kit says 20 times a second; None is what it does not have or could not measure."""

    upward_g: float | None = None
    door_closed: bool | None = None
    motion: bool | None = None
    button: bool | None = None
    service: bool | None = None
    home: bool | None = None


class Healthy:
    """A sensor that measures: its values are possible, and never the same for long."""

    def __init__(self, plausible: tuple[float, float]) -> None:
        self._plausible = plausible
        self._last: float | None = None
        self._same = 0
        self.seen_s = float("-inf")

    def take(self, t_s: float, value: float | None) -> float | None:
        """Return the value, None where the sensor cannot be right."""
        if value is None or not self._plausible[0] <= value <= self._plausible[1]:
            return None
        self._same = self._same + 1 if value == self._last else 0
        self._last = value
        if self._same >= SAME_SAMPLES:
            return None
        self.seen_s = t_s
        return value


class KitCar:
    """One car. home_floor: where the magnet of the input `home` is; other times as in `edge.lifts.controllers.Car`."""

    def __init__(
        self,
        device: str,
        landings: Mapping[int, float],
        delays: Delays,
        tell_at: float,
        home_floor: int | None,
        telemetry_ms: int,
        events_ms: int,
    ) -> None:
        self.travel = Travel(Shaft(landings))
        self.cabin = Cabin()
        self.trap = Trap(delays, tell_at)
        self._device = device
        self._home_floor = home_floor
        self._accelerometer, self._barometer = Healthy(PLAUSIBLE_G), Healthy(PLAUSIBLE_PA)
        self._telemetry = Reporter(Report(Duration(telemetry_ms), {"temperature_c": 1.0}))
        self._events = Reporter(Report(Duration(events_ms)))
        self._temperature_c: float | None = None
        self._service: bool | None = None
        self._code_told: int | None = None
        self._rides = 0
        self._begun_s: float | None = None

    def air(self, t_s: float, pressure_pa: float | None, temperature_c: float | None) -> None:
        """Take what the barometer says."""
        self._temperature_c = temperature_c
        if temperature_c is not None:
            self.travel.temperature_c = temperature_c
        self.travel.breathe(t_s, self._barometer.take(t_s, pressure_pa))

    def sample(self, t_s: float, at_ms: int, sample: Sample) -> Said:
        """Take a sample; return what is new."""
        self._begun_s = t_s if self._begun_s is None else self._begun_s
        self._service = sample.service
        self.travel.accelerate(t_s, self._accelerometer.take(t_s, sample.upward_g))
        if t_s - self._barometer.seen_s > WORST_AFTER_S:
            self.travel.breathe(t_s, None)
        if self.cabin.step(t_s, door_closed=sample.door_closed, motion=sample.motion):
            self.travel.door(t_s, opened=self.cabin.door.value is False)
        if sample.home and self._home_floor is not None:
            self.travel.home(self._home_floor)
        if self.travel.rides > self._rides:
            self._rides = self.travel.rides
            self.cabin.rode()
        pressed = self.trap.press(t_s, sample.button)
        self._judge(t_s)
        return self._news(t_s, at_ms, pressed=pressed)

    def trouble(self, t_s: float) -> str:
        """Return which sensors cannot be right; empty where all can."""
        found = [self.cabin.blind(t_s), self.cabin.dead_door()]
        if self._begun_s is not None and t_s - self._begun_s > WORST_AFTER_S:
            found += ["no acceleration"] if t_s - self._accelerometer.seen_s > WORST_AFTER_S else []
            found += ["no pressure of the air"] if t_s - self._barometer.seen_s > WORST_AFTER_S else []
        return "; ".join(one for one in found if one)

    def _moving(self, t_s: float) -> bool | None:
        newest_s = max(self._accelerometer.seen_s, self._barometer.seen_s)
        return self.travel.moving if t_s - newest_s <= WORST_AFTER_S else None

    def _judge(self, t_s: float) -> None:
        moving = self._moving(t_s)
        if moving is None:
            return  # who is trapped stays so: that nothing is seen frees nobody
        seen = 0 if self.cabin.blind(t_s) else self.cabin.evidence(t_s)
        closed, outside = self.cabin.closed, self.travel.outside
        self.trap.step(t_s, seen=seen, standing=not moving, closed=closed, outside=outside, service=bool(self._service))

    def _news(self, t_s: float, at_ms: int, *, pressed: bool) -> Said:
        ridden = _known(floor=self.travel.floor, moving=self._moving(t_s), temperature_c=self._temperature_c)
        mode = None if self._service is None else INSPECTION if self._service else NORMAL
        evidence = _known(
            occupied=self.cabin.occupied(t_s),
            door_closed=self.cabin.closed,
            service_mode=mode,
            trapped_certainty=self.trap.certainty if self.trap.known else None,
        )
        said: Said = []
        if telemetry := self._telemetry.filter(Reading(self._device, at_ms, ridden)) if ridden else None:
            said.append((Lane.TELEMETRY, telemetry))
        event = self._events.filter(Reading(self._device, at_ms, evidence)) if evidence else None
        if pressed or (self.trap.known and self.trap.code != self._code_told):
            self._code_told = self.trap.code  # a code goes behind its evidence: who judges it looks at what came before
            event = Reading(self._device, at_ms, evidence | {"fault_code": float(self.trap.code)})
        if event is not None:
            said.append((Lane.EVENT, event))
        return said


def _known(**values: float | None) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}

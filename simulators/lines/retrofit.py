"""The kit on a car, on a pseudo-terminal: what its four sensors say of a journey.

    python -m simulators.lines.retrofit

prints the port as JSON and rides until its input ends; the fourth ride of five ends between two floors.
"""

from __future__ import annotations

import argparse
import random
import struct
from collections.abc import Iterator
from math import exp
from typing import Literal

import msgspec

from edge.drivers.elevator_retrofit import AIR, INPUTS, SAMPLE, UNMEASURED, UNMEASURED_AIR
from simulators.lines.talker import Told, serve

RATE_HZ = 20
AIR_EVERY = 4  # samples
ACCELERATION_MPS2 = 0.7
SEA_PA, SCALE_M = 101_325.0, 8_435.0
NOISE_G, NOISE_PA = 0.004, 1.0  # of a cheap accelerometer and a BMP390 without filter
Broken = Literal["motion_stuck", "motion_dead", "door_closed", "door_open", "accelerometer", "barometer"]
LANDINGS = {-1: 0.0, 1: 4.2, 2: 7.4, 3: 10.6, 4: 13.8, 5: 17.0, 6: 20.2, 7: 23.4, 8: 26.6}


class Tick(msgspec.Struct, frozen=True):
    """What the sensors say at one sample; pressure and temperature every fourth."""

    t_s: float
    upward_g: float | None
    inputs: dict[str, bool]
    pressure_pa: float | None = None
    temperature_c: float | None = None
    has_air: bool = False


class Journey:
    """A car in its shaft. Its methods let time pass and yield what the kit says meanwhile.

    weather_pa_h: how the pressure of the air drifts; stack_pa: by how much it jumps where the doors open; gust_pa: by
    how much it is off now; open_after_s: how soon doors open at a landing. broken: which sensors fail now.
    """

    def __init__(self, landings: dict[int, float], floor: int, weather_pa_h: float = 0.0, seed: int = 1) -> None:
        self.landings = landings
        self.height_m = landings[floor]
        self.people = False
        self.door_closed = True
        self.button = self.service = False
        self.broken: set[Broken] = set()
        self.home_floor: int | None = None
        self.speed_mps, self.open_after_s = 1.0, 3.0
        self.stack_pa = self.gust_pa = 0.0
        self._number = 0
        self._weather_pa_h = weather_pa_h
        self._random = random.Random(seed)
        self._motion_until_s = self._next_motion_s = 0.0

    @property
    def t_s(self) -> float:
        """The time so far."""
        return self._number / RATE_HZ

    def stand(self, seconds: float) -> Iterator[Tick]:
        """Stay as it is."""
        for _ in range(round(seconds * RATE_HZ)):
            yield self._tick(0.0)

    def ride(self, height_m: float) -> Iterator[Tick]:
        """Go to a height: speed up, go on, slow down."""
        way_m = height_m - self.height_m
        if not way_m:
            return
        sign = 1.0 if way_m > 0 else -1.0
        top_mps = min(self.speed_mps, (abs(way_m) * ACCELERATION_MPS2) ** 0.5)
        ramp_s = top_mps / ACCELERATION_MPS2
        cruise_s = (abs(way_m) - top_mps * ramp_s) / top_mps
        begin_m, step_s = self.height_m, 1 / RATE_HZ
        for number in range(round((2 * ramp_s + cruise_s) * RATE_HZ)):
            now_s = number * step_s
            up_s, down_s = min(now_s, ramp_s), max(0.0, now_s - ramp_s - cruise_s)
            gone_m = ACCELERATION_MPS2 * up_s**2 / 2 + max(0.0, min(now_s - ramp_s, cruise_s)) * top_mps
            gone_m += top_mps * down_s - ACCELERATION_MPS2 * down_s**2 / 2
            self.height_m = begin_m + sign * gone_m
            felt = ACCELERATION_MPS2 if now_s < ramp_s else -ACCELERATION_MPS2 if down_s else 0.0
            yield self._tick(sign * felt)
        self.height_m = height_m

    def trip(self, floor: int, *, people: bool) -> Iterator[Tick]:
        """Take somebody, or nobody, to a floor, and let him out."""
        if people:
            self.door_closed, self.people = False, True
            yield from self.stand(5)
        self.door_closed = True
        yield from self.stand(2.5)
        yield from self.ride(self.landings[floor])
        yield from self.stand(self.open_after_s)
        if people:
            self.door_closed = False
            yield from self.stand(4)
            self.people = False
            yield from self.stand(4)
            self.door_closed = True
            yield from self.stand(3)

    def _tick(self, felt_mps2: float) -> Tick:
        self._number += 1
        noise = self._random.gauss
        upward = None if "accelerometer" in self.broken else round(1 + felt_mps2 / 9.80665 + noise(0, NOISE_G), 3)
        tick = Tick(self.t_s, upward, self._inputs())
        if self._number % AIR_EVERY:
            return tick
        air_pa = (SEA_PA + self._weather_pa_h * self.t_s / 3600) * exp(-self.height_m / SCALE_M) + noise(0, NOISE_PA)
        air_pa += self.gust_pa + (0.0 if self.door_closed else self.stack_pa)
        pressure = None if "barometer" in self.broken else round(air_pa, 1)
        return msgspec.structs.replace(tick, pressure_pa=pressure, temperature_c=15.0, has_air=True)

    def _inputs(self) -> dict[str, bool]:
        motion = self._motion()
        if "motion_stuck" in self.broken:
            motion = True
        elif "motion_dead" in self.broken:
            motion = False
        door = True if "door_closed" in self.broken else False if "door_open" in self.broken else self.door_closed
        at_home = self.home_floor is not None and abs(self.height_m - self.landings[self.home_floor]) < 0.1
        return {"door": door, "motion": motion, "button": self.button, "service": self.service, "home": at_home}

    def _motion(self) -> bool:
        """Somebody moves every few seconds, and the sensor holds that for two."""
        if self.people and self.t_s >= self._next_motion_s:
            self._motion_until_s = self.t_s + 2.0
            self._next_motion_s = self.t_s + self._random.uniform(3.0, 12.0)
        return self.t_s < self._motion_until_s


def told(station: int, tick: Tick) -> list[Told]:
    """Return a tick's frames."""
    clock_ms = round(tick.t_s * 1000)
    upward = UNMEASURED if tick.upward_g is None else round(tick.upward_g * 1000)
    inputs = sum(1 << INPUTS.index(name) for name, on in tick.inputs.items() if on)
    found: list[Told] = []
    if tick.has_air:
        pressure = UNMEASURED_AIR if tick.pressure_pa is None else round(tick.pressure_pa * 10)
        temperature = UNMEASURED if tick.temperature_c is None else round(tick.temperature_c * 100)
        found.append((station, AIR, struct.pack(">IIh", clock_ms, pressure, temperature)))
    found.append((station, SAMPLE, struct.pack(">IhhhB", clock_ms, 0, 0, upward, inputs)))
    return found


def endless(journey: Journey) -> Iterator[Tick]:
    """Ride to and fro; the fourth ride of five ends between two floors for two minutes."""
    floors = list(journey.landings)
    while True:
        for number in range(4):
            yield from journey.trip(floors[1 + number * 3 % (len(floors) - 1)], people=number != 2)
        journey.door_closed, journey.people = False, True
        yield from journey.stand(4)
        journey.door_closed = True
        yield from journey.stand(2)
        yield from journey.ride(journey.landings[floors[2]] + 1.5)
        yield from journey.stand(120)
        yield from journey.ride(journey.landings[floors[2]])
        journey.door_closed = False
        yield from journey.stand(5)
        journey.people = False


def main() -> int:
    """Ride until the input ends."""
    argparse.ArgumentParser(prog="python -m simulators.lines.retrofit", description=__doc__).parse_args()
    ticks = endless(Journey(LANDINGS, 1))
    return serve("kit", 115_200, lambda _: told(1, next(ticks)), 1 / RATE_HZ)


if __name__ == "__main__":
    raise SystemExit(main())

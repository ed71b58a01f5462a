"""A kit on the car of a lift that exposes no controller: door magnet, presence, acceleration, air.

    kit:
      driver: elevator_retrofit
      port: /dev/ttyUSB0
      devices:
        - {device: lift-000031, station: 1, floors: {-1: 0, 1: 4.2, 2: 7.4, 3: 10.6}, inputs: [door, motion]}

The frame is that of `edge.frames`; the logic stands in `edge.lifts.shaft`, `edge.lifts.cabin` and `edge.lifts.kit`.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from math import isfinite
from typing import Literal

import msgspec

from citybrain.config import Duration
from edge.driver import Host, Quality
from edge.frame_line import FINE, FrameLine, Port, Verdict
from edge.frames import Frame
from edge.lifts.cabin import Delays
from edge.lifts.kit import KitCar, Sample

PROCESS = False
DEADLINE_S = 15.0
MOST_PAYLOAD = 16
SAMPLE, AIR = 16, 17  # frame types
UNMEASURED, UNMEASURED_AIR = -32768, 0xFFFFFFFF
INPUTS = ("door", "motion", "button", "service", "home")  # by bit of a sample
CLOCK_MS = 1 << 32  # the kit's clock comes round in 49 days
LONGEST_GAP_MS = 10_000  # more, or a step back: the kit began anew
LEAST_BETWEEN_M = 1.5

Input = Literal["door", "motion", "button", "service", "home"]


class Kit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One car: our name of it, its station, its landings (floor → height in m), and which inputs of the kit are wired.

    home_floor: where the magnet of the input `home` is. upward: which axis of the accelerometer points up.
    """

    device: str
    station: int
    floors: dict[int, float]
    inputs: tuple[Input, ...] = ("door", "motion")
    home_floor: int | None = None
    upward: Literal["x", "-x", "y", "-y", "z", "-z"] = "z"

    def __post_init__(self) -> None:
        heights = sorted(self.floors.values())
        if len(heights) < 2 or not all(isfinite(one) for one in heights):
            raise ValueError("floors: expected at least two, each with its height in m")
        if min(b - a for a, b in pairwise(heights)) < LEAST_BETWEEN_M:
            raise ValueError(f"floors: two are less than {LEAST_BETWEEN_M} m apart")
        if self.home_floor is not None and self.home_floor not in self.floors:
            raise ValueError(f"home_floor: {self.home_floor} is none of the floors")
        if ("home" in self.inputs) != (self.home_floor is not None):
            raise ValueError("home_floor and the input `home` go together")
        if "motion" not in self.inputs and "button" not in self.inputs:
            raise ValueError("inputs: without `motion` or `button` nobody inside is ever seen")


class Config(Port, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of kits. delay_…: how long a car with somebody inside stands before he counts as trapped; tell_at: how
    certain that must be for code 93; `telemetry_every`, `events_every`: how often is told what has not changed."""

    devices_: tuple[Kit, ...] = msgspec.field(name="devices")
    delay_outside: Duration = Duration(45_000)
    delay_pressed: Duration = Duration(15_000)
    delay_levelled: Duration = Duration(90_000)
    tell_at: float = 0.75
    telemetry_every: Duration = Duration(60_000)
    events_every: Duration = Duration(600_000)

    def __post_init__(self) -> None:
        self.check([one.device for one in self.devices_], [one.station for one in self.devices_])
        if len({one.station for one in self.devices_}) < len(self.devices_):
            raise ValueError("devices: a station stands there twice")
        if not 0 < self.tell_at <= 1:
            raise ValueError(f"tell_at: expected more than 0 and at most 1, got {self.tell_at}")
        if min(self.delay_outside, self.delay_pressed, self.delay_levelled) < 0:
            raise ValueError("delay_outside, delay_pressed, delay_levelled: expected 0 or more")
        if self.telemetry_every <= 0 or self.events_every <= 0:
            raise ValueError("telemetry_every, events_every: expected more than 0")

    def devices(self) -> tuple[str, ...]:
        """Name the devices."""
        return tuple(one.device for one in self.devices_)


class Bench:
    """One kit's clock, and the car it is on."""

    def __init__(self, kit: Kit, config: Config) -> None:
        self._kit = kit
        self._config = config
        self._bits = {name: 1 << INPUTS.index(name) for name in kit.inputs}
        self._axis = "xyz".index(kit.upward[-1])
        self._sign = -1 if kit.upward.startswith("-") else 1
        self._clock_ms: int | None = None
        self.restarts = 0
        self.t_s = 0.0
        self.car = self._unknown()

    def _unknown(self) -> KitCar:
        config, kit = self._config, self._kit
        waits = (config.delay_outside, config.delay_pressed, config.delay_levelled)
        delays = Delays(*(wait / 1000 for wait in waits))
        every = config.telemetry_every, config.events_every
        return KitCar(kit.device, kit.floors, delays, config.tell_at, kit.home_floor, *every)

    def take(self, host: Host, frame: Frame) -> None:
        """Use a frame; raises ValueError where it is none of a kit."""
        if frame.type == SAMPLE and len(frame.payload) == 11:
            clock_ms, *axes, inputs = struct.unpack(">IhhhB", frame.payload)
            self._pass(clock_ms)
            for lane, reading in self.car.sample(self.t_s, host.now_ms(), self._sample(axes, inputs)):
                host.put(lane, reading)
        elif frame.type == AIR and len(frame.payload) == 10:
            clock_ms, pressure, temperature = struct.unpack(">IIh", frame.payload)
            self._pass(clock_ms)
            pressure_pa = None if pressure == UNMEASURED_AIR else pressure / 10
            self.car.air(self.t_s, pressure_pa, None if temperature == UNMEASURED else temperature / 100)
        else:
            raise ValueError(f"type {frame.type} with {len(frame.payload)} bytes")

    def _pass(self, clock_ms: int) -> None:
        """Let the kit's time pass; where it began anew, what was known of the car is not known any more."""
        passed = 0 if self._clock_ms is None else (clock_ms - self._clock_ms) % CLOCK_MS
        self._clock_ms = clock_ms
        if passed > LONGEST_GAP_MS:
            self.restarts += 1
            self.t_s, self.car = 0.0, self._unknown()
        else:
            self.t_s += passed / 1000

    def _sample(self, axes: list[int], inputs: int) -> Sample:
        raw = axes[self._axis]
        wired = {name: bool(inputs & bit) for name, bit in self._bits.items()}
        return Sample(
            None if raw == UNMEASURED else self._sign * raw / 1000,
            wired.get("door"),
            wired.get("motion"),
            wired.get("button"),
            wired.get("service"),
            wired.get("home"),
        )


class Driver:
    """One line."""

    def __init__(self, name: str, config: Config) -> None:
        self._config = config
        self._line = FrameLine(name, config, {one.station: (one.device,) for one in config.devices_}, MOST_PAYLOAD)
        self._benches: dict[int, Bench] = {}

    def run(self, host: Host) -> None:
        """Listen until the host ends it."""
        self._line.run(host, self)

    def begin(self, host: Host) -> None:
        """Know nothing of the cars."""
        self._benches = {one.station: Bench(one, self._config) for one in self._config.devices_}

    def take(self, host: Host, frame: Frame, missed: int) -> Verdict:
        """Use a frame, and say whether the kit's sensors can be right."""
        bench = self._benches[frame.station]
        try:
            bench.take(host, frame)
        except ValueError as error:
            host.drop("bad_payload", 1, f"station {frame.station}: {error}")
            return Quality.IMPLAUSIBLE, str(error)
        trouble = bench.car.trouble(bench.t_s)
        return (Quality.IMPLAUSIBLE, trouble) if trouble else FINE

    def tick(self, host: Host) -> None:
        """Nothing is due by itself: a kit speaks 20 times a second."""


def make(name: str, config: Config) -> Driver:
    """Make the driver of one line."""
    return Driver(name, config)

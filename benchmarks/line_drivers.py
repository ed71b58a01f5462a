"""CPU seconds an hour of stream costs the drivers that listen all the time: python -m benchmarks.line_drivers --json

Frames of some minutes are made beforehand and go through the driver's own code from the first byte to the readings,
without the port and the pipe: CPU time of this process, which the load of the machine hardly moves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice

from citybrain.model import Lane, Reading
from edge.driver import Host, Quality, Request
from edge.drivers import elevator_retrofit, elevator_serial, pressure_fast, vibration
from edge.frame_line import Listener
from edge.frames import Deframer, Frame
from simulators.lines import accelerometer, elevator, pressure, retrofit
from simulators.lines.talker import Told

HOUR_S = 3600.0


class Counting(Host):
    """A host whose time is that of the stream."""

    def __init__(self) -> None:
        self.t_s = 0.0
        self.values = dict.fromkeys(Lane, 0)
        self.drops = 0

    def now_ms(self) -> int:
        return round(self.t_s * 1000)

    def mono_s(self) -> float:
        return self.t_s

    def put(self, lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        self.values[lane] += len(reading.values)

    def blob(self, content: bytes, *, unmasked: bool = False) -> str:
        return ""

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        self.drops += quality is not Quality.GOOD

    def drop(self, reason: str, amount: int = 1, sample: str = "") -> None:
        self.drops += amount

    def wait(self, seconds: float) -> bool:
        return False

    def requests(self) -> list[Request]:
        return []

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        return


def frames(told: Iterator[list[Told]], every_s: float, seconds: float) -> list[tuple[float, bytes]]:
    """Return what a line carries: (s, bytes)."""
    found: list[tuple[float, bytes]] = []
    sequence = 0
    for number, some in enumerate(islice(told, round(seconds / every_s))):
        data = b""
        for station, kind, payload in some:
            data += Frame(kind, station, sequence % 256, payload).encode()
            sequence += 1
        found.append((number * every_s, data))
    return found


def cost(driver: Listener, stream: list[tuple[float, bytes]], seconds: float, most: int) -> dict[str, float]:
    """Return CPU seconds an hour, with what was told and dropped (nothing should be) in an hour."""
    host, deframer = Counting(), Deframer(most)
    driver.begin(host)
    begin_s = time.process_time()
    for t_s, data in stream:
        host.t_s = t_s
        for frame in deframer.feed(data).frames:
            driver.take(host, frame, 0)
        driver.tick(host)
    cpu_s = time.process_time() - begin_s
    scale = HOUR_S / seconds
    told = sum(host.values.values())
    return {"cpu_s_per_h": round(cpu_s * scale, 2), "values_per_h": round(told * scale), "dropped": host.drops}


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Measure all four."""
    noise = random.Random(1)
    wave = accelerometer.sines(0.2, 49.0)
    accelerations = accelerometer.Accelerometer(1, 1000.0, 4.0, lambda t_s: tuple(wave(t_s)))  # type: ignore[arg-type,return-value]
    bands = ((2.0, 20.0), (20.0, 100.0), (100.0, 300.0), (300.0, 500.0))
    vibrating = vibration.Config(
        port="-", rate_hz=1000.0, full_scale_g=4.0, devices_=(vibration.Sensor("a", 1, bands_hz=bands),)
    )
    transmitter = pressure.Transmitter(1, 100.0)

    def pressures() -> Iterator[list[Told]]:
        while True:
            if noise.random() < 0.2 / 60:  # a stroke a minute
                transmitter.slam(0.4)
            yield [transmitter.frame()]

    kit = elevator_retrofit.Kit("a", 1, retrofit.LANDINGS, ("door", "motion", "button", "service"))
    ticks = retrofit.endless(retrofit.Journey(retrofit.LANDINGS, 1))
    controllers = elevator.Controllers("regional_93", range(1, 3))
    cars = tuple(elevator_serial.Seat(f"a{station}", station) for station in controllers.states)
    return {
        "vibration_1khz_3_axes": cost(
            vibration.make("-", vibrating),
            frames(iter(lambda: [accelerations.frame()], []), 0.04, seconds),
            seconds,
            255,
        ),
        "pressure_100hz": cost(
            pressure_fast.make(
                "-", pressure_fast.Config(port="-", rate_hz=100.0, devices_=(pressure_fast.Sensor("a", 1),))
            ),
            frames(pressures(), 0.2, seconds),
            seconds,
            255,
        ),
        "retrofit_20hz": cost(
            elevator_retrofit.make("-", elevator_retrofit.Config(port="-", devices_=(kit,))),
            frames((retrofit.told(1, tick) for tick in ticks), 0.05, seconds),
            seconds,
            16,
        ),
        "serial_2_cars_1hz": cost(
            elevator_serial.make("-", elevator_serial.Config(port="-", region="regional_93", devices_=cars)),
            frames(iter(controllers.states_told, []), 1.0, seconds),
            seconds,
            16,
        ),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.line_drivers", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of stream, made beforehand")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.minutes * 60)
    if args.json:
        print(json.dumps(found))
    else:
        for name, one in found.items():
            print(f"{name}: {one['cpu_s_per_h']} CPU s an hour of stream, {one['values_per_h']} values told")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An accelerometer with three axes on a pseudo-terminal: sines, noise and shocks, sampled at its rate.

    python -m simulators.lines.accelerometer --rate-hz 1000

prints the port as JSON and measures until its input ends.
"""

from __future__ import annotations

import argparse
import math
import random
import struct
from collections.abc import Callable

from edge.drivers.vibration import RAW_AXES
from simulators.lines.talker import Told, serve

SAMPLES = 40  # in a frame
Wave = Callable[[float], tuple[float, float, float]]


def sines(amplitude_g: float, frequency_hz: float, *, shock_g: float = 0.0, noise_g: float = 0.0) -> Wave:
    """Return gravity along z with one sine along x and z, and a shock a second."""
    noise = random.Random(1)

    def at(t_s: float) -> tuple[float, float, float]:
        wave = amplitude_g * math.sin(2 * math.pi * frequency_hz * t_s)
        shock = shock_g * (t_s % 1 < 0.002)
        x, y, z = (noise.gauss(0, noise_g) if noise_g else 0.0 for _ in range(3))
        return wave + x, y, 1.0 + wave + shock + z

    return at


class Accelerometer:
    """One station's samples, frame after frame."""

    def __init__(self, station: int, rate_hz: float, full_scale_g: float, wave: Wave) -> None:
        self.wave = wave
        self.index = 0  # of the next sample
        self._station = station
        self._rate_hz = rate_hz
        self._scale = 32768 / full_scale_g

    def frame(self) -> Told:
        """Return the next frame's content."""
        raw: list[int] = []
        for number in range(self.index, self.index + SAMPLES):
            values = self.wave(number / self._rate_hz)
            raw += [max(-32768, min(32767, round(value * self._scale))) for value in values]
        payload = struct.pack(f">I{3 * SAMPLES}h", self.index, *raw)
        self.index += SAMPLES
        return self._station, RAW_AXES, payload


def main() -> int:
    """Measure until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m simulators.lines.accelerometer", description=__doc__)
    parser.add_argument("--rate-hz", type=float, default=1000.0)
    parser.add_argument("--baud", type=int, default=230_400)
    args = parser.parse_args()
    sensor = Accelerometer(1, args.rate_hz, 4.0, sines(0.2, 49.0, shock_g=1.0, noise_g=0.01))
    return serve("accelerometer", args.baud, lambda _: [sensor.frame()], SAMPLES / args.rate_hz)


if __name__ == "__main__":
    raise SystemExit(main())

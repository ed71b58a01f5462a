"""A fast pressure transmitter on a pseudo-terminal: a quiet main, with water hammer on request.

    python -m simulators.lines.pressure --rate-hz 100

prints the port as JSON and measures until its input ends, with a stroke every 20 seconds.
"""

from __future__ import annotations

import argparse
import math
import random
import struct

from edge.drivers.pressure_fast import FULL_SCALE, RAW_PRESSURE
from simulators.lines.talker import Told, serve

SAMPLES = 20  # in a frame
REST_MPA, NOISE_MPA = 0.31, 0.001
RING_S, DECAY_S = 0.4, 0.5  # of the wave that runs to and fro in the pipe


def ringing(since_s: float, amplitude_mpa: float) -> float:
    """Return the deviation so long after a valve was slammed: a damped wave that begins with the surge."""
    return amplitude_mpa * math.cos(2 * math.pi * since_s / RING_S) * math.exp(-since_s / DECAY_S)


class Transmitter:
    """One station's samples, frame after frame. `slam` begins a stroke, `shift` a new pressure."""

    def __init__(self, station: int, rate_hz: float, high_mpa: float = 1.6) -> None:
        self.rest_mpa = REST_MPA
        self.index = 0  # of the next sample
        self.broken: int | None = None  # the raw value of a broken wire
        self._station = station
        self._rate_hz = rate_hz
        self._high_mpa = high_mpa
        self._slam: tuple[float, float] | None = None
        self._noise = random.Random(1)

    def slam(self, amplitude_mpa: float) -> None:
        """Slam a valve."""
        self._slam = (self.index / self._rate_hz, amplitude_mpa)

    def pressure_mpa(self, t_s: float) -> float:
        """Return the pressure at a time."""
        swing = ringing(t_s - self._slam[0], self._slam[1]) if self._slam is not None else 0.0
        return self.rest_mpa + swing + self._noise.gauss(0, NOISE_MPA)

    def frame(self) -> Told:
        """Return the next frame's content."""
        pressures = (self.pressure_mpa((self.index + number) / self._rate_hz) for number in range(SAMPLES))
        raw = [max(0, min(FULL_SCALE, round(one / self._high_mpa * FULL_SCALE))) for one in pressures]
        raw = raw if self.broken is None else [self.broken] * SAMPLES
        payload = struct.pack(f">I{SAMPLES}h", self.index, *raw)
        self.index += SAMPLES
        return self._station, RAW_PRESSURE, payload


def main() -> int:
    """Measure until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m simulators.lines.pressure", description=__doc__)
    parser.add_argument("--rate-hz", type=float, default=100.0)
    args = parser.parse_args()
    transmitter = Transmitter(1, args.rate_hz)

    def source(at_s: float) -> list[Told]:
        if at_s % 20 < SAMPLES / args.rate_hz:
            transmitter.slam(0.4)
        return [transmitter.frame()]

    return serve("pressure", 115_200, source, SAMPLES / args.rate_hz)


if __name__ == "__main__":
    raise SystemExit(main())

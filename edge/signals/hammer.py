"""Water hammer in fast pressure: a swing from where the pressure was that is over within a second; pure.

A stroke is a swing of at least `least_mpa` that comes back within `back_s`, with all that rings after it; its amplitude
is the farthest it went. A swing that does not come back is a new pressure and no stroke. One sample alone is no swing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

BACK_SHARE = 0.25  # of the farthest: the pressure settles a little elsewhere when a valve has closed
CALM_S = 2.0  # so long without a swing, and the stroke is over
BASELINE_S = 2.0
LEAST_SAMPLES = 2


class Stroke(msgspec.Struct, frozen=True):
    """What is told of a stroke. place: index of the sample at which; amplitude_mpa: 0 says that it is over."""

    place: int
    amplitude_mpa: float


class Hammer:
    """Looks at one sensor's samples, MPa, one after the other. strokes, steps: how many there were so far.

    >>> hammer = Hammer(100.0, least_mpa=0.1, back_s=1.0)
    >>> hammer.take([0.3] * 50 + [0.3, 0.7, 0.8, 0.5, 0.3] + [0.3] * 300)
    [Stroke(place=54, amplitude_mpa=0.5), Stroke(place=254, amplitude_mpa=0.0)]
    """

    def __init__(self, rate_hz: float, least_mpa: float, back_s: float) -> None:
        self.strokes = self.steps = 0
        self.baseline_mpa: float | None = None
        self._least_mpa = least_mpa
        self._back = round(back_s * rate_hz)
        self._calm = round(CALM_S * rate_hz)
        self._follow = 1 / (BASELINE_S * rate_hz)
        self._out = 0  # samples of the present swing
        self._in = 0  # samples since the last one
        self._farthest_mpa = self._told_mpa = 0.0

    @property
    def calm(self) -> bool:
        """Whether nothing swings."""
        return not self._farthest_mpa

    def within(self, low_mpa: float, high_mpa: float) -> bool:
        """Return whether samples between these can begin no swing."""
        base = self.baseline_mpa
        return self.calm and base is not None and max(high_mpa - base, base - low_mpa) < self._least_mpa

    def settle(self, mean_mpa: float, samples: int) -> None:
        """Take samples that begin no swing, all at once."""
        assert self.baseline_mpa is not None
        self.baseline_mpa += (mean_mpa - self.baseline_mpa) * min(1.0, samples * self._follow)

    def forget(self) -> bool:
        """Begin anew: samples are missing, and with them where the pressure was. Return whether a stroke was told."""
        self.baseline_mpa = None
        return self._rest() is not None

    def take(self, samples: Sequence[float]) -> list[Stroke]:
        """Return what these samples tell."""
        found = ((place, self._step(value)) for place, value in enumerate(samples))
        return [Stroke(place, round(told, 6)) for place, told in found if told is not None]

    def _rest(self) -> float | None:
        """Forget the swing; return 0 where one was told."""
        told, self._told_mpa = self._told_mpa, 0.0
        self._farthest_mpa, self._out, self._in = 0.0, 0, 0
        return 0.0 if told else None

    def _step(self, value: float) -> float | None:
        if self.baseline_mpa is None:
            self.baseline_mpa = value
        off = abs(value - self.baseline_mpa)
        if self.calm and off < self._least_mpa:
            self.baseline_mpa += (value - self.baseline_mpa) * self._follow
            return None
        self._farthest_mpa = max(self._farthest_mpa, off)
        if off > max(self._least_mpa / 2, BACK_SHARE * self._farthest_mpa):
            return self._swing(value)
        return self._back_again(value)

    def _swing(self, value: float) -> float | None:
        self._out, self._in = self._out + 1, 0
        if self._out <= self._back:
            return None
        self.steps += 1
        self.baseline_mpa = value
        return self._rest()

    def _back_again(self, value: float) -> float | None:
        out, self._out, self._in = self._out, 0, self._in + 1
        if 0 < out < LEAST_SAMPLES and not self._told_mpa:
            return self._rest()  # one sample alone
        if out and self._farthest_mpa > self._told_mpa:
            self.strokes += not self._told_mpa
            self._told_mpa = self._farthest_mpa
            return self._told_mpa
        if self._in <= self._calm:
            return None
        self.baseline_mpa = value
        return self._rest()

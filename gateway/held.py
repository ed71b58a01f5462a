"""Telemetry that is read before the clock is set waits here for its true time; events never wait.

It waits in memory, as long as the clock holds (2 min from the start at most) and up to 16 MiB, and then goes on in its
order: with its true time where the clock was set meanwhile, else as it was stamped. What does not fit goes on as it was
stamped, the oldest first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from citybrain.counters import Counters
from citybrain.model import Lane, Reading
from edge.agent import Source
from gateway.times import BoxClock

MOST_BYTES = 16 << 20
READING_BYTES, VALUE_BYTES = 250, 60  # in memory: CPython 3.11 has 312 for a reading of one value, 500 for one of four

Given = tuple[Lane, Reading]


class Held:
    """All sources of a box, as one. Call `release` at a clean stop.

    counters: `held_total{time=true|as_stamped}` (readings); the gauge `held`.
    """

    def __init__(
        self, sources: Sequence[Source], clock: BoxClock, counters: Counters, most_bytes: int = MOST_BYTES
    ) -> None:
        self._sources = sources
        self._clock = clock
        self._counters = counters
        self._most_bytes = most_bytes
        self._waiting: deque[Reading] = deque()
        self._bytes = 0

    def poll(self, now_ms: int) -> list[Given]:
        """Return what the sources said that need not wait, behind what has waited for long enough."""
        given = [one for source in self._sources for one in source.poll(now_ms)]
        if not self._clock.holding:
            return self.release() + given
        found: list[Given] = []
        for lane, reading in given:
            if lane is Lane.EVENT:
                found.append((lane, reading))
            else:
                self._waiting.append(reading)
                self._bytes += _bytes(reading)
        while self._bytes > self._most_bytes:
            found.append(self._as_stamped())
        self._counters.gauges["held"] = float(len(self._waiting))
        return found

    def release(self) -> list[Given]:
        """Return all that waits, with the time it is known to have now."""
        found = [self._dated() for _ in range(len(self._waiting))]
        if found:
            self._counters.gauges["held"] = 0.0
        return found

    def _take(self) -> Reading:
        reading = self._waiting.popleft()
        self._bytes -= _bytes(reading)
        return reading

    def _as_stamped(self) -> Given:
        self._counters.add("held_total", time="as_stamped")
        return Lane.TELEMETRY, self._take()

    def _dated(self) -> Given:
        if not self._clock.set_in_time:
            return self._as_stamped()
        reading = self._take()
        self._counters.add("held_total", time="true")
        return Lane.TELEMETRY, Reading(reading.device, self._clock.held_ms(reading.observed_at), reading.values)


def _bytes(reading: Reading) -> int:
    return READING_BYTES + VALUE_BYTES * len(reading.values)

"""What a step of the gateway's clock means for what was stamped before it: durations are of the monotonic clock."""

from __future__ import annotations

from citybrain.clock import SECOND_MS, Clock, monotonic_s
from citybrain.model import Reading

STEP_MS = 20  # less is no step
UNDER_WAY_S = 2.0  # what a driver has stamped and not handed over when the clock steps comes within
STAMPED_MS = 5 * SECOND_MS  # and was stamped at most so long before


def ahead_ms(clock: Clock) -> int:
    """Return by how much a clock is ahead of the monotonic one."""
    return clock.now_ms() - round(monotonic_s() * SECOND_MS)


class Steps:
    """Watches a clock. Call `look` before readings are taken, `under_way` for each that the gateway's clock stamped."""

    def __init__(self, clock: Clock) -> None:
        self.ahead_ms = ahead_ms(clock)
        self._clock = clock
        self._moved_ms = 0
        self._before_ms = 0  # what the clock would say had it not stepped
        self._until_s = 0.0

    def look(self) -> int:
        """Return by how much the clock was moved since the last call, in ms; 0 where it ran on."""
        ahead = ahead_ms(self._clock)
        moved_ms = ahead - self.ahead_ms
        if abs(moved_ms) <= STEP_MS:
            return 0
        if abs(moved_ms) > SECOND_MS:
            now_s = monotonic_s()
            self._moved_ms, self._until_s = moved_ms, now_s + UNDER_WAY_S
            self._before_ms = round(now_s * SECOND_MS) + self.ahead_ms
        self.ahead_ms = ahead
        return moved_ms

    def under_way(self, reading: Reading) -> Reading:
        """Return a reading; one that was stamped just before the clock stepped, with the time it has now."""
        if not self._until_s or monotonic_s() > self._until_s:
            return reading
        late_ms = min(abs(self._moved_ms) // 2, SECOND_MS)  # a process hears of the step a little later
        if -STAMPED_MS <= reading.observed_at - self._before_ms <= late_ms:
            return Reading(reading.device, reading.observed_at + self._moved_ms, reading.values)
        return reading

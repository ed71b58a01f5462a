"""What a gateway says of itself every 10 s, as the device that bears its id."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from citybrain.clock import DAY_MS, SECOND_MS, monotonic_s
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from edge.driver import Quality
from gateway.broker.certificate import read_certificate
from gateway.spool import Spool
from gateway.times import BoxClock

EVERY_MS = 10 * SECOND_MS
HOUR_S = 3600.0
MARKS = 60  # of the last hour's bytes


class Expiry:
    """Until when our certificate is valid. The file is read when it is another one (a renewal), else once an hour."""

    def __init__(self, path: Path, counters: Counters) -> None:
        self._path = path
        self._counters = counters
        self._known: tuple[int, int] | None = None
        self._read_s = -HOUR_S
        self._not_after: int | None = None  # Unix s

    def days(self, now_ms: int) -> float | None:
        """Return the days that are left, one decimal, below zero once it has ended; None where it cannot be read."""
        try:
            found = self._path.stat()
            known = (found.st_ino, found.st_mtime_ns)
        except OSError:
            known = None
        if known != self._known or monotonic_s() - self._read_s >= HOUR_S:
            self._known, self._read_s = known, monotonic_s()
            self._read()
        return None if self._not_after is None else round((self._not_after * 1000 - now_ms) / DAY_MS, 1)

    def _read(self) -> None:
        try:
            self._not_after = read_certificate(self._path).not_after
        except ConfigError as error:
            self._not_after = None
            self._counters.add("errors_total", stage="certificate")
            self._counters.warn(str(error))


class Vitals:
    """A source (`edge.agent.Source`): `uptime_s`, `spooled`, `clock_offset_s`, `uplink_kb_per_h` (both directions),
    `certificate_days` (where there is a certificate and the clock is set), and `quality`, which says that what we tell
    has no sure time where the clock is not set.
    """

    def __init__(
        self, gateway: str, spool: Spool, clock: BoxClock, counters: Counters, certificate: Path | None = None
    ) -> None:
        self._gateway = gateway
        self._spool = spool
        self._clock = clock
        self._counters = counters
        self._expiry = Expiry(certificate, counters) if certificate is not None else None
        self._since_s = monotonic_s()
        self._due_ms = 0
        self._marks: deque[tuple[float, int]] = deque([(self._since_s, self._bytes())], MARKS)

    @property
    def uptime_s(self) -> float:
        return monotonic_s() - self._since_s

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        """Return a reading where one is due: at once, then at full 10 s so that gateways can be compared."""
        if 0 <= self._due_ms - now_ms <= EVERY_MS:
            return []
        in_turn = (
            0 <= now_ms - self._due_ms < EVERY_MS
        )  # else the process, or our time, before may have told the full 10 s
        at_ms = now_ms - now_ms % EVERY_MS if in_turn else now_ms
        self._due_ms = now_ms - now_ms % EVERY_MS + EVERY_MS
        values = {
            "uptime_s": round(self.uptime_s, 1),
            "spooled": float(self._spool.spooled()),
            "uplink_kb_per_h": round(self._per_hour() / 1000, 1),
        }
        if not self._clock.unset:
            values["clock_offset_s"] = round(self._clock.offset_s, 3)
            if self._expiry is not None and (days := self._expiry.days(now_ms)) is not None:
                values["certificate_days"] = days
        values["quality"] = float(Quality.CLOCK_UNSET if self._clock.unset else Quality.GOOD)
        return [(Lane.TELEMETRY, Reading(self._gateway, at_ms, values))]

    def _per_hour(self) -> float:
        now_s, total = monotonic_s(), self._bytes()
        since_s, before = self._marks[0]
        if now_s - self._marks[-1][0] >= HOUR_S / MARKS:
            self._marks.append((now_s, total))
        return (total - before) * HOUR_S / max(now_s - since_s, 1.0)

    def _bytes(self) -> int:
        return self._counters.values["sent_bytes_total"] + self._counters.values["received_bytes_total"]

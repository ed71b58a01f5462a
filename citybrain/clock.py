"""The only module that reads the system clock or waits.

Everything else is given the time. Simulated time and real time never meet: all processes of a run share one
`Clock` (origin and speed), while signatures and TLS use `real_unix_s`.
"""

from __future__ import annotations

import datetime
import struct
import threading
import time
from typing import Protocol

import msgspec

SECOND_MS = 1000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
TIMEX = struct.Struct("@I3l")  # of `struct timex` (adjtimex(2)): modes, offset, freq, maxerror
TIMEX_BYTES = 512  # more than it has anywhere
UNKNOWN_US = 16_000_000  # the kernel's maxerror where nothing keeps its clock


class Clock(Protocol):
    """Tells platform time in Unix milliseconds UTC."""

    def now_ms(self) -> int: ...


class RunClock(msgspec.Struct, frozen=True):
    """Platform time of one run: it passed `origin_ms` when real time was `started_ms`, and runs `speed` times as fast.

    With `origin_ms == started_ms` and speed 1 it is the real clock.
    """

    origin_ms: int
    started_ms: int
    speed: float = 1.0

    def now_ms(self) -> int:
        return self.origin_ms + int((real_unix_ms() - self.started_ms) * self.speed)

    def real_s(self, platform_ms: int) -> float:
        """Return how many real seconds that much platform time takes."""
        return platform_ms / SECOND_MS / self.speed


class ManualClock:
    """A clock that only moves when told; for offline runs and tests."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms

    def set_ms(self, now_ms: int) -> None:
        """Set the time, in Unix ms; stepping back is allowed, as it is in the field."""
        self._now_ms = now_ms


def system_clock() -> RunClock:
    """Return a clock at real time and speed 1."""
    return RunClock(origin_ms=0, started_ms=0)


def real_unix_ms() -> int:
    """Return the system's wall clock in ms."""
    return time.time_ns() // 1_000_000


def synchronised() -> bool:
    """Return whether something (NTP, PTP) keeps the system's clock right, as the kernel says; True where it cannot say.

    maxerror is what systemd looks at too: STA_UNSYNC may be set for another reason (src/basic/time-util.c).
    """
    import ctypes  # noqa: PLC0415  only a box that doubts its clock asks, and a Pi's memory is small

    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    told = ctypes.create_string_buffer(TIMEX_BYTES)
    if adjtimex is None or adjtimex(told) < 0:
        return True
    return int(TIMEX.unpack_from(told)[3]) < UNKNOWN_US


def real_unix_s() -> int:
    """Return the system's wall clock in s; for signatures and certificates only."""
    return int(time.time())


def monotonic_s() -> float:
    """Return seconds that never step back; for time-outs and measured durations, never stored."""
    return time.monotonic()


def wait_s(seconds: float, stop: threading.Event | None = None) -> bool:
    """Wait `seconds`, or until `stop` is set; return whether it was."""
    if stop is None:
        time.sleep(max(0.0, seconds))
        return False
    return stop.wait(max(0.0, seconds))


def wait_until_s(at_s: float, spin_s: float = 0.000_15) -> None:
    """Wait until `monotonic_s` is `at_s`, as exactly as can be: a sleep ends about 0.1 ms late, so the end is spun."""
    if (sleep_s := at_s - spin_s - monotonic_s()) > 0:
        wait_s(sleep_s)
    while monotonic_s() < at_s:
        pass


def iso(at_ms: int) -> str:
    """Return Unix ms as ISO 8601 in UTC with milliseconds, e.g. `2026-01-01T00:00:00.123Z`."""
    moment = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_iso(text: str) -> int:
    """Return an ISO 8601 time (UTC where it names no zone) as Unix ms; raises ValueError."""
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1000)
